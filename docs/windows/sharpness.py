"""Reward: how sharp a picture is, which nothing but its finest detail decides."""

import torch
import torch.nn.functional as F

from srpo_cli.rewards.plugins import reward


@reward(unit="root mean square of the picture less its 3x3 mean", reads_text=False, differentiable=True)
def load(images, prompts):
    values = []
    for image in images:
        coarse = F.avg_pool2d(F.pad(image[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
        values.append((image - coarse).square().mean().sqrt())
    return torch.stack(values)
