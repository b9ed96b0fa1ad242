"""SRPO's training step written by hand in plain torch and diffusers: what the product's step is measured against.

Its mathematics: draw clean latents, log their reward and gap, and for every pair of noise levels call the transformer
once for both branches, recover, decode, judge, differentiate, clip and update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.given import Generators, Given


class BareLoop:
    """The loop; :meth:`step` takes one step."""

    def __init__(self, given: Given) -> None:
        self.given, self.config, options = given, given.config, given.config.optimizer
        self.parameters = [p for p in given.transformer.parameters() if p.requires_grad]
        settings = (options.lr, tuple(options.betas), options.eps, options.weight_decay)
        self.optimizer = given.optimizer or torch.optim.AdamW(self.parameters, *settings)
        self.dtype, self.device = self.parameters[0].dtype, self.parameters[0].device
        unit = 2 ** len(given.vae.config.block_out_channels)
        self.rows, self.columns = (edge // unit for edge in self.config.model.size)
        places = torch.cartesian_prod(torch.arange(self.rows), torch.arange(self.columns))
        self.image_ids = F.pad(places, (1, 0)).to(self.device, torch.float32)
        self.statistics = [torch.tensor(v, device=self.device).view(3, 1, 1) for v in (given.mean, given.std)]

    def step(self, step: int) -> list[dict[str, float]]:
        """One step, counted from 0; returns what is logged of every update."""
        config, batch = self.config, self.config.train.batch_size
        numbers = range(step * batch, (step + 1) * batch)
        prompts = [self.given.prompts[n % len(self.given.prompts)] for n in numbers]
        encoded = zip(*map(self.given.encoded, prompts), strict=True)
        texts = [torch.stack(column).to(self.device, self.dtype) for column in encoded]
        noise = self.noise(step, numbers)
        x_0 = self.rollout(noise, texts)
        logged = self.measure(x_0, prompts, self.seeds("gap augmentation", numbers))
        places, augmentations = self.seeds("injection", numbers), self.seeds("augmentation", numbers)
        shared = self.given.draw(places) if config.algorithm.schedule == "reference" else None
        told = []
        for pair in range(config.algorithm.pairs):
            loss = self.descend(x_0, noise, texts, prompts, shared or self.given.draw(places), step + 1, augmentations)
            told.append(self.update({"loss": loss, **(logged if pair == 0 else {})}))
        return told

    def seeds(self, purpose: str, numbers: Sequence[int]) -> Generators:
        return [self.given.seeded(self.config.train.seed, purpose, number) for number in numbers]

    def noise(self, step: int, numbers: Sequence[int]) -> Tensor:
        shape = (1, self.given.vae.config.latent_channels, self.rows, 2, self.columns, 2)
        seeds = self.seeds("rollout", [step] if self.config.rollout.shared_noise else numbers)
        noise = torch.cat([torch.randn(shape, generator=seed) for seed in seeds])
        return noise.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2).to(self.device).expand(len(numbers), -1, -1)

    def velocity(self, latents: Tensor, time: Tensor, texts: Sequence[Tensor], guidance: float) -> Tensor:
        return self.given.transformer(
            hidden_states=latents.to(self.dtype),
            timestep=(time * 1000).to(self.dtype).expand(len(latents)) / 1000,  # as diffusers rounds it
            guidance=torch.full((len(latents),), guidance, device=self.device),
            encoder_hidden_states=texts[0],
            pooled_projections=texts[1],
            txt_ids=self.image_ids.new_zeros(texts[0].shape[1], 3),
            img_ids=self.image_ids,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def rollout(self, noise: Tensor, texts: Sequence[Tensor]) -> Tensor:
        sigmas = self.given.sigmas
        told = (sigmas * 1000).floor() / 1000 if self.config.algorithm.schedule == "reference" else sigmas
        x, sigmas, told = noise, sigmas.to(self.device), told.to(self.device)
        for sigma, below, time in zip(sigmas[:-1], sigmas[1:], told, strict=False):
            x = x + (below - sigma) * self.velocity(x, time, texts, self.config.rollout.guidance)
        return x

    def decode(self, latents: Tensor) -> Tensor:
        grid = latents.view(len(latents), self.rows, self.columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        vae, plane = self.given.vae, grid.reshape(len(latents), -1, 2 * self.rows, 2 * self.columns)
        pixels = vae.decode((plane / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def augment(self, images: Tensor, seeds: Generators) -> Tensor:
        shift, noise, (height, width) = self.config.reward.shift, self.config.reward.noise, images.shape[-2:]
        moved, added = [], []
        if not shift and not noise:
            return images
        for image, seed in zip(F.pad(images, [shift] * 4, mode="reflect"), seeds, strict=True):
            top, left = torch.randint(2 * shift + 1, (2,), generator=seed).tolist()
            moved.append(image[:, top : top + height, left : left + width])
            added.append(torch.randn(3, height, width, generator=seed))
        return torch.stack(moved) + noise * torch.stack(added).to(images)

    def see(self, images: Tensor) -> Tensor:
        side, edges = self.given.side, images.shape[-2:]
        size = tuple(side * edge // min(edges) for edge in edges)
        if size != edges:
            images = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)
        top, left = (round((edge - side) / 2) for edge in size)
        pixels = (images[..., top : top + side, left : left + side] - self.statistics[0]) / self.statistics[1]
        return F.normalize(self.given.clip.encode_image(pixels.to(next(self.given.clip.parameters()).dtype)).float())

    def rate(self, seen: Tensor, prompts: Sequence[str], word: str = "") -> Tensor:
        template = self.config.control_words.template if word else "{prompt}"
        return (seen * self.read([template.format(word=word, prompt=prompt) for prompt in prompts])).sum(-1)

    def read(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self.given.features[text] for text in texts])

    @torch.no_grad()
    def measure(self, x_0: Tensor, prompts: Sequence[str], seeds: Generators) -> dict[str, Tensor]:
        words, images = self.config.control_words, self.decode(x_0)
        plain, changed = self.see(images), self.augment(images, seeds)
        seen = plain if changed is images else self.see(changed)
        lists = (words.positive, words.negative)
        desired, undesired = (sum(self.rate(seen, prompts, word) for word in words) / len(words) for words in lists)
        return {"reward": self.rate(plain, prompts).mean(), "sgp_gap": (desired - undesired).mean()}

    def descend(self, x_0: Tensor, eps: Tensor, texts: Any, prompts: Any, draw: Any, step: int, seeds: Any) -> Tensor:
        count = len(draw)
        x_0, eps, *texts = (torch.cat([tensor] * count) for tensor in (x_0, eps, *texts))
        sigma, told, recovered, positive, negative = (torch.cat(c).to(self.device) for c in zip(*draw, strict=True))
        sigma, recovered = sigma[:, None, None], recovered[:, None, None]
        x_t = sigma * eps + (1 - sigma) * x_0
        velocity = self.velocity(x_t, told, texts, self.config.algorithm.guidance)
        x_hat = (x_t - (sigma - recovered) * velocity - recovered * eps) / (1 - recovered)
        leaf = x_hat.detach().requires_grad_()
        loss = self.loss(leaf, [*prompts] * count, positive, negative, step, [*seeds] * count)
        loss.backward(inputs=leaf)
        x_hat.backward(leaf.grad)
        return loss.detach()

    def loss(self, latents: Tensor, prompts: Any, positive: Tensor, negative: Tensor, step: int, seeds: Any) -> Tensor:
        words, margin = self.config.control_words, self.config.algorithm.hinge
        seen = self.see(self.augment(self.decode(latents), seeds))
        pair = (listed[step % len(listed)] for listed in (words.positive, words.negative))
        reward = sum(w * self.rate(seen, prompts, x) for w, x in zip((positive, negative), pair, strict=True))
        return (-reward if margin is None else (margin - reward).relu()).mean()

    def update(self, values: dict[str, Tensor]) -> dict[str, float]:
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.grad_clip)
        told = torch.stack([*values.values(), norm]).tolist()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return dict(zip((*values, "grad_norm"), told, strict=True))
