"""Train the miniature's FluxTransformer2DModel by flow matching on cached latents and text features."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

GUIDANCE, RATE = 3.5, 1.5e-3
CONFIG = dict(
    patch_size=1,
    in_channels=64,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=96,
    pooled_projection_dim=96,
    guidance_embeds=True,
    axes_dims_rope=(8, 12, 12),
)


@dataclass(frozen=True)
class Schedule:
    """Steps in all, steps of linear decay at the end, and warm-up; the rate is flat in between."""

    steps: int
    decay: int
    warmup: int = 100

    def scale(self, step: int) -> float:
        left = self.steps - step
        return min((step + 1) / self.warmup, 1.0, max(left / self.decay, 0.02))


@dataclass(frozen=True)
class TrainingSet:
    """Packed latents (N, 36, 64), the caption of each (N,), and each distinct caption's T5 and CLIP features."""

    latents: Tensor
    caption: Tensor
    sequence: Tensor
    pooled: Tensor


def position_ids(tokens: int, edge: int) -> tuple[Tensor, Tensor]:
    """FLUX's text ids (tokens, 3), all zero, and image ids (edge * edge, 3), rows of (0, y, x)."""
    y, x = torch.meshgrid(torch.arange(edge), torch.arange(edge), indexing="ij")
    image = torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).float()
    return torch.zeros(tokens, 3), image


def draw_sigma(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels (B,): 60 % logit-normal, 40 % uniform."""
    normal = torch.randn(count, generator=generator).sigmoid()
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.6, normal, uniform)


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and feed-forward, AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = "transformer_blocks." in name and ".norm" not in name and parameter.ndim == 2
        (matrices if inside else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train_transformer(
    data: TrainingSet,
    folder: Path,
    schedule: Schedule,
    device: str,
    workers: int,
    seed: int = 0,
    batch_size: int = 64,
) -> FluxTransformer2DModel:
    """Train, in ``workers`` gloo processes on a CPU, and return the averaged (EMA) weights.

    ``folder`` keeps a checkpoint every 500 steps; a run that finds one goes on from there.
    """
    if workers > 1 and device == "cpu":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(_worker, (workers, port, data, folder, schedule, device, seed, batch_size), nprocs=workers)
    else:
        _worker(0, 1, 0, data, folder, schedule, device, seed, batch_size)
    model = FluxTransformer2DModel(**CONFIG)
    model.load_state_dict(torch.load(folder / "transformer.pt", weights_only=True)["ema"])
    return model.eval().requires_grad_(False)


def _worker(
    rank: int,
    world: int,
    port: int,
    data: TrainingSet,
    folder: Path,
    schedule: Schedule,
    device: str,
    seed: int,
    batch_size: int,
) -> None:
    """Train on this rank's share of every batch; gradients are averaged, so that all ranks keep the same weights."""
    if world > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(**CONFIG).to(device).train()
    parameters = list(model.parameters())
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizers = make_optimizers(model, RATE)
    path, start = folder / "transformer.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        ema, start = state["ema"], state["step"]
        for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
    live = list(model.state_dict().values())  # views of the weights, in the order of ``ema``
    text_ids, image_ids = (ids.to(device) for ids in position_ids(data.sequence.shape[1], 6))
    share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    losses = []
    for step in range(start, schedule.steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randint(len(data.latents), (batch_size,), generator=generator)
        sigma = draw_sigma(batch_size, generator)[share].to(device)
        noise = torch.randn(batch_size, *data.latents.shape[1:], generator=generator)[share].to(device)
        index = index[share]
        x_0, text = data.latents[index].to(device), data.caption[index]
        level = sigma[:, None, None]
        velocity = model(
            hidden_states=(1 - level) * x_0 + level * noise,
            encoder_hidden_states=data.sequence[text].to(device),
            pooled_projections=data.pooled[text].to(device),
            timestep=sigma,
            img_ids=image_ids,
            txt_ids=text_ids,
            guidance=torch.full_like(sigma, GUIDANCE),
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, noise - x_0)
        loss.backward()
        if world > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            dist.all_reduce(flat)
            for p, mean in zip(parameters, (flat / world).split([p.numel() for p in parameters]), strict=True):
                p.grad.copy_(mean.view_as(p))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * schedule.scale(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.values()), live, 1 - decay)
        losses.append(loss.item())
        if rank == 0 and (step + 1) % 100 == 0:
            print(f"transformer {step + 1}: loss {sum(losses[-100:]) / len(losses[-100:]):.4f}", flush=True)
        if rank == 0 and ((step + 1) % 500 == 0 or step + 1 == schedule.steps):
            stored = [optimizer.state_dict() for optimizer in optimizers]
            state = {"model": model.state_dict(), "ema": ema, "optimizers": stored, "step": step + 1}
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
    if world > 1:
        dist.destroy_process_group()
