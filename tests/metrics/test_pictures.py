"""Picture statistics on pictures whose values can be worked out by hand."""

import pytest
import torch

from srpo_cli.metrics.pictures import STATISTICS, picture_statistics


def measure(image: torch.Tensor) -> dict[str, float]:
    return dict(zip(STATISTICS, picture_statistics(image[None])[0].tolist(), strict=True))


def test_a_grey_picture_has_no_colour_no_grain_no_contrast():
    values = measure(torch.full((3, 48, 48), 0.4))
    assert values["brightness"] == pytest.approx(0.4, abs=1e-6)
    for name in ("grain", "saturation", "chroma", "highlights", "contrast", "grid"):
        assert values[name] == pytest.approx(0, abs=1e-6), name


def test_saturation_is_that_of_hsv():
    image = torch.tensor([0.8, 0.4, 0.2])[:, None, None].expand(3, 48, 48)
    assert measure(image)["saturation"] == pytest.approx(1 - 0.2 / 0.8, abs=1e-6)


def test_grain_measures_noise_and_not_edges():
    generator = torch.Generator().manual_seed(0)
    edges = torch.zeros(3, 48, 48)
    edges[:, :, 24:] = 0.8
    noisy = 0.5 + 0.05 * torch.randn(1, 48, 48, generator=generator).expand(3, -1, -1)
    assert measure(edges)["grain"] == pytest.approx(0, abs=1e-6)
    # A 3 x 3 mean takes 1/9 of white noise's variance with it: 0.05 * sqrt(1 - 1/9).
    assert measure(noisy)["grain"] == pytest.approx(0.05 * (8 / 9) ** 0.5, rel=0.05)


def test_a_pattern_on_the_token_grid_shows():
    generator = torch.Generator().manual_seed(0)
    plain = 0.5 + 0.02 * torch.randn(3, 48, 48, generator=generator)
    grid = plain.clone()
    grid[:, ::8] += 0.1
    grid[:, :, ::8] += 0.1
    assert measure(grid)["grid"] > measure(plain)["grid"] + 0.2


def test_a_fine_wave_lies_in_a_higher_band_than_a_coarse_one():
    axis = torch.arange(48) / 48

    def bands(cycles: int) -> int:
        wave = (0.5 + 0.3 * torch.sin(2 * torch.pi * cycles * axis)).expand(3, 48, 48)
        values = measure(wave)
        return max(range(1, 6), key=lambda k: values[f"band_{k}"])

    assert bands(2) == 1
    assert bands(12) == 3
    assert bands(22) == 5
