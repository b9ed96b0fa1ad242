"""Figures and names as pages write them."""
# ruff: noqa: RUF001  (a true minus and a dash are what is tested)

import math

import pytest

from srpo_cli.pages.writing import interval, isolated, listed, number, p_value, percent, plain


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (0.28949, 3, False, "0.289"),
        (-0.4567, 2, False, "−0.46"),
        (0.4567, 2, True, "+0.46"),
        (-0.0004, 2, True, "0.00"),
        (1234.5, 0, False, "1234"),
        (None, 3, False, "–"),
        (math.nan, 3, True, "–"),
        (math.inf, 3, False, "–"),
    ],
)
def test_a_number_has_its_decimals_a_true_minus_and_no_sign_on_nothing(value, digits, sign, text):
    assert number(value, digits, sign) == text


def test_an_interval_without_ends_says_so():
    assert interval({"low": -0.5, "high": 0.25}, 2, sign=True) == "[−0.50, +0.25]"
    assert interval({"low": None}, 2) == "[–, –]"


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.0004, "p < 0.001"), (0.001, "p = 0.001"), (0.0234, "p = 0.02"), (1.0, "p = 1.00"), (None, "p –")],
)
def test_p_values_are_written_as_papers_do_and_in_a_column_without_their_name(p, text):
    assert p_value(p) == text
    assert p_value(p, named=False) == text.removeprefix("p ").removeprefix("= ")


def test_shares_are_percentages():
    assert percent(0.389, 1) == "38.9 %"
    assert percent(None) == "–"


def test_lists_read_as_language():
    assert [listed("abc"[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]


def test_control_characters_go_and_all_other_text_stays():
    assert plain("a\x00b\x1bc\td\ne 日本 שלום") == "abc\td\ne 日本 שלום"


def test_only_text_that_turns_the_line_is_isolated():
    assert isolated("tuned (2)") == "tuned (2)"
    assert isolated("מודל") == "\u2068מודל\u2069"
    assert isolated("a\u202eb") == "\u2068a\u202eb\u2069"
