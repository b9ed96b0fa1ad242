"""The palette: every text is readable on every ground that it stands on, light and dark."""

import re
from importlib.resources import files

import pytest

STYLE = (files("srpo_cli.pages") / "templates" / "style.css").read_text(encoding="utf-8")
SCHEMES = dict(zip(("light", "dark"), re.findall(r":root \{\n(.*?)\n\s*\}", STYLE, re.DOTALL)[:2], strict=True))
TEXTS = [
    *((ink, ground) for ink in ("ink", "muted", "accent", "worse") for ground in ("paper", "surface", "sunken")),
    ("ink", "accent-soft"),
    ("ink", "worse-soft"),
    *((f"k{i}-ink", f"k{i}") for i in range(4)),
]
MARKS = [*((f"s{i}", "surface") for i in range(8)), ("accent", "surface"), ("worse", "surface")]


def colours(scheme):
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", SCHEMES[scheme]))


def luminance(colour):
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_computed_as_it_should_be():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # WCAG's well-known near miss


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("text", "ground"), TEXTS)
def test_text_has_a_contrast_of_four_and_a_half(scheme, text, ground):
    palette = colours(scheme)
    assert contrast(palette[text], palette[ground]) >= 4.5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("mark", "ground"), MARKS)
def test_marks_have_a_contrast_of_three(scheme, mark, ground):
    palette = colours(scheme)
    assert contrast(palette[mark], palette[ground]) >= 3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_neighbouring_grades_differ_in_lightness(scheme):
    """So that the stacked bars can be read without colour, and in print."""
    palette = colours(scheme)
    for left, right in ((0, 1), (2, 3)):
        assert contrast(palette[f"k{left}"], palette[f"k{right}"]) >= 1.6


def test_the_style_fetches_nothing():
    assert "@import" not in STYLE
    assert "url(" not in STYLE
