"""How unlike each other pictures are, by their features."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from srpo_cli.metrics.diversity import mean_pairwise_distance


def test_it_is_the_mean_over_all_pairs():
    features = F.normalize(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    pairs = [1 - (one @ other).item() for one, other in combinations(features, 2)]
    assert mean_pairwise_distance(features) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


@pytest.mark.parametrize(
    ("rows", "distance"),
    [([[1.0, 0.0]] * 4, 0.0), ([[1.0, 0.0], [0.0, 1.0]], 1.0), ([[1.0, 0.0], [-1.0, 0.0]], 2.0)],
)
def test_copies_are_at_0_right_angles_at_1_opposites_at_2(rows, distance):
    assert mean_pairwise_distance(torch.tensor(rows)) == pytest.approx(distance, abs=1e-12)
