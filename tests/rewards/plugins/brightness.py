"""Reward: how bright a picture is."""

import torch

from srpo_cli.rewards.plugins import reward


@reward(unit="mean of the pixels, 0 to 1", reads_text=False, differentiable=True)
def load(images, prompts):
    return torch.stack([image.mean() for image in images])
