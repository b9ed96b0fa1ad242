"""Random translation and pixel noise."""

from __future__ import annotations

import torch

from srpo_cli.rewards.augment import Augment


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


IMAGES = torch.rand(6, 3, 9, 12, generator=seeded())


def test_nothing_asked_is_nothing_done() -> None:
    assert Augment()(IMAGES) is IMAGES


def test_every_sample_is_moved_by_its_own_whole_pixels() -> None:
    moved = Augment(shift=3)(IMAGES, seeded(1))
    offsets = set()
    for before, after in zip(IMAGES, moved, strict=True):
        # The middle of the picture moves without touching a border.
        found = [
            (dy, dx)
            for dy in range(-3, 4)
            for dx in range(-3, 4)
            if torch.equal(after[:, 3:6, 3:9], before[:, 3 + dy : 6 + dy, 3 + dx : 9 + dx])
        ]
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) > 3


def test_the_largest_translation_reflects_the_border() -> None:
    image = torch.arange(5.0).expand(64, 3, 5, 5)
    corners = {tuple(row[0, 0].tolist()) for row in Augment(shift=1)(image, seeded())}
    assert corners == {(0, 1, 2, 3, 4), (1, 0, 1, 2, 3), (1, 2, 3, 4, 3)}


def test_noise_has_the_asked_deviation_and_its_generator_decides() -> None:
    flat = torch.full((4, 3, 64, 64), 0.5)
    noisy = Augment(noise=0.05)(flat, seeded(3))
    assert abs(noisy.std().item() - 0.05) < 1e-3
    assert torch.equal(noisy, Augment(noise=0.05)(flat, seeded(3)))
    assert not torch.equal(noisy, Augment(noise=0.05)(flat, seeded(4)))


def test_the_gradient_of_a_translation_counts_every_pixel_once_or_reflected() -> None:
    images = IMAGES.clone().requires_grad_()
    Augment(shift=3, noise=0.1)(images, seeded()).sum().backward()
    assert images.grad.sum() == images.numel()


def test_with_a_generator_each_a_picture_is_changed_alike_in_any_batch() -> None:
    together = Augment(shift=3, noise=0.1)(IMAGES, [seeded(i) for i in range(6)])
    alone = [Augment(shift=3, noise=0.1)(IMAGES[i : i + 1], [seeded(i)]) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))
