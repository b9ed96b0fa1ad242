"""Fréchet and kernel distance between sets of features."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from srpo_cli.errors import UsageError
from srpo_cli.metrics.distribution import frechet_distance, kernel_distance, subset_size


@pytest.fixture
def features():
    """Correlated, off centre, (300, 6)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(300, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 1


@pytest.fixture
def others():
    """Of another distribution, and another number, (200, 6)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator)


def test_the_frechet_distance_is_that_of_the_fitted_gaussians(features, others):
    one, other = features.double().numpy(), others.double().numpy()
    one_cov, other_cov = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    means = np.square(one.mean(0) - other.mean(0)).sum()
    expected = means + np.trace(one_cov + other_cov - 2 * sqrtm(one_cov @ other_cov).real)
    assert frechet_distance(features, others) == pytest.approx(expected, rel=1e-6)


def test_a_set_is_at_no_frechet_distance_from_itself_and_shifts_add_their_square(features):
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-4)
    for length in (0.5, 2.0):
        shifted = features + torch.tensor([length, 0, 0, 0, 0, 0])
        assert frechet_distance(features, shifted) == pytest.approx(length**2, abs=1e-4)


def test_parts_of_a_large_set_are_added_up_exactly(features):
    many = features.repeat(5, 1)  # more than are taken at a time
    shifted = many + 1
    assert frechet_distance(many, shifted) == pytest.approx(6, abs=1e-4)


def unbiased_mmd(one, other):
    """Squared maximum mean discrepancy of the cubic kernel, all pairs, by its definition."""

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal(matrix):
        return (matrix.sum() - matrix.trace()) / (len(matrix) * (len(matrix) - 1))

    one, other = one.double(), other.double()
    within = off_diagonal(kernel(one, one)) + off_diagonal(kernel(other, other))
    return (within - 2 * kernel(one, other).mean()).item()


def test_the_kernel_distance_is_the_unbiased_one_up_to_its_subsets(features, others):
    mean, std = kernel_distance(features, others)
    error = std / 100**0.5  # 100 subsets
    assert mean == pytest.approx(unbiased_mmd(features, others), abs=4 * error)
    assert 0 < error < mean / 10


def test_the_kernel_distance_of_a_set_to_itself_is_none_and_grows_with_a_shift(features):
    own, std = kernel_distance(features, features)
    assert abs(own) < 3 * std
    near, far = (kernel_distance(features, features + shift)[0] for shift in (0.5, 2))
    assert own + 3 * std < near < far


def test_the_kernel_distance_is_the_same_every_time_and_leaves_torchs_numbers_alone(features, others):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = kernel_distance(features, others)
    assert torch.equal(torch.rand(1), expected)
    assert kernel_distance(features, others) == first
    assert kernel_distance(features, others, seed=1) != first


def test_subsets_are_a_thousand_or_half_of_the_smaller_set():
    assert subset_size(50_000, 3200) == 1000
    assert subset_size(300, 50_000) == 150


def test_too_few_pictures_are_refused_by_side(features):
    with pytest.raises(UsageError, match="fid needs 2 pictures or more, and the model has 1"):
        frechet_distance(features, features[:1])
    with pytest.raises(UsageError, match="kid needs 4 pictures or more, and the reference folder has 3"):
        kernel_distance(features[:3], features)
