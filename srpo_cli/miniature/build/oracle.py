"""Train the oracle's classifier and measure the photographs that it compares with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from srpo_cli.metrics.pictures import STATISTICS, picture_statistics
from srpo_cli.miniature.build.renders import Renders
from srpo_cli.miniature.build.reward import shift
from srpo_cli.miniature.oracle import HEADS, Classifier
from srpo_cli.miniature.world import GROUNDS, LIGHTS, PHOTO, draw_realism, draw_scenes, render


def train_classifier(
    renders: Renders, copies: Tensor, steps: int, device: str, seed: int = 0, log: Callable[[str], None] = print
) -> Classifier:
    """Train on renders and on their ``copies`` through the autoencoder (uint8, same order), shifted and noised."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Classifier().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        index = torch.randint(len(renders) - renders.held_out, (64,), generator=generator)
        source = renders.images if step % 2 else copies
        images = shift(source[index].float() / 255, generator)
        images = images * (0.9 + 0.2 * torch.rand(64, 1, 1, 1, generator=generator))
        images = (images + 0.03 * torch.randn(images.shape, generator=generator)).clamp(0, 1).to(device)
        logits = model(images)
        loss = sum(F.cross_entropy(logits[name], getattr(renders.scenes, name)[index].to(device)) for name in HEADS)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps - 1:
            log(f"oracle {step}: loss {loss.item():.3f} held out {accuracy(model, renders, copies, device)}")
            model.train()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model: Classifier, renders: Renders, copies: Tensor, device: str) -> dict[str, float]:
    """Accuracy of each head on the held-out copies."""
    logits = model.eval()(copies[-renders.held_out :].float().to(device) / 255)
    scenes = renders.scenes[-renders.held_out :]
    return {n: round((logits[n].argmax(1).cpu() == getattr(scenes, n)).float().mean().item(), 3) for n in HEADS}


def measure_photographs(round_trip: Callable[[Tensor], Tensor], count: int = 6000, seed: int = 77) -> dict[str, Tensor]:
    """Mean statistics of photographs by ground and light, their precision and spread, and the radius that holds 90 %.

    ``round_trip`` sends pictures through the autoencoder. Half of the photographs give the means and the covariance,
    the other half the radius.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes = draw_scenes(count, generator)
    style = torch.full_like(scenes.style, PHOTO)
    scenes = scenes.with_style(PHOTO, draw_realism(style, generator))
    statistics = torch.cat([picture_statistics(round_trip(render(scenes[i : i + 64]))) for i in range(0, count, 64)])
    cell = scenes.ground * len(LIGHTS) + scenes.light
    fit, check = slice(None, count // 2), slice(count // 2, None)
    cells = torch.stack([statistics[fit][cell[fit] == i].mean(0) for i in range(len(GROUNDS) * len(LIGHTS))])
    residual = statistics - cells[cell]
    precision = torch.linalg.inv(torch.cov(residual[fit].T) + 1e-8 * torch.eye(len(STATISTICS)))
    distance = ((residual[check] @ precision) * residual[check]).sum(1).sqrt()
    return {
        "cells": cells.view(len(GROUNDS), len(LIGHTS), -1),
        "precision": precision,
        "spread": statistics.std(0),
        "radius": distance.quantile(0.9),
    }
