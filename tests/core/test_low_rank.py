"""The nearest matrix of a rank, against the whole singular value decomposition."""

import pytest
import torch

from srpo_cli.core.low_rank import nearest_low_rank

SHAPES = [(9, 9), (7, 12), (12, 7)]


@pytest.fixture(params=SHAPES, ids=str)
def matrix(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.randn(request.param, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_its_error_is_the_singular_values_that_are_left_out(matrix, rank):
    up, down = nearest_low_rank(matrix, rank)
    assert up.shape == (matrix.shape[0], rank)
    assert down.shape == (rank, matrix.shape[1])
    left_out = torch.linalg.svdvals(matrix)[rank:].norm()
    torch.testing.assert_close((matrix - up @ down).norm(), left_out)


def test_it_is_the_truncated_decomposition(matrix):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    up, down = nearest_low_rank(matrix, 2)
    torch.testing.assert_close(up @ down, (u[:, :2] * s[:2]) @ v[:2])


def test_at_full_rank_and_beyond_nothing_is_lost(matrix):
    up, down = nearest_low_rank(matrix, 100)
    assert up.shape[1] == min(matrix.shape)
    torch.testing.assert_close(up @ down, matrix)


def test_both_factors_carry_an_equal_share_of_each_singular_value(matrix):
    up, down = nearest_low_rank(1e-5 * matrix, 4)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


def test_a_matrix_of_a_lower_rank_and_nothing_at_all_have_finite_factors():
    for matrix in (torch.ones(4, 6), torch.zeros(4, 6)):
        up, down = nearest_low_rank(matrix, 3)
        assert up.dtype == matrix.dtype
        torch.testing.assert_close(up @ down, matrix)
