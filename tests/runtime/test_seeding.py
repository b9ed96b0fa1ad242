"""What is drawn depends on seed, purpose and counters, and on nothing else."""

import torch

from srpo_cli.runtime.seeding import generator


def draw(*arguments):
    return torch.randn(4, generator=generator(*arguments))


def test_the_same_arguments_draw_the_same():
    torch.manual_seed(1)
    first = draw(42, "rollout", 3)
    torch.manual_seed(2)
    assert torch.equal(draw(42, "rollout", 3), first)


def test_each_argument_counts():
    drawn = [draw(42, "rollout", 3), draw(43, "rollout", 3), draw(42, "samples", 3), draw(42, "rollout", 4)]
    drawn += [draw(42, "rollout", 3, 0), draw(4, "2:rollout", 3)]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)
