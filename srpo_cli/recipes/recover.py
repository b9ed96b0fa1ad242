"""Recover: how well one model step recovers a picture from each noise level, after Figure 3 of arXiv:2509.06942.

A picture is encoded, noised with a known noise at many levels, and the model is called once at each. The same
velocity then serves every method: the ordinary one-step prediction, which ReFL judges, and Direct-Align with the step
sizes asked for, denoising and inverting. With the same velocity a method's latent error is its gain times the
velocity's error, so that what differs between methods is known beforehand; what a reward makes of it is not.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.v2.functional as V
from PIL import Image, ImageOps
from torch import Tensor

from srpo_cli import __version__
from srpo_cli.algorithms.injection import SigmaDraws
from srpo_cli.config.schema import AlgorithmConfig
from srpo_cli.core.recover import add_noise, recover
from srpo_cli.core.relative import Branch
from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.metrics.likeness import ENOUGH_PICTURES, RANKS_KEPT, psnr, rank_correlation, ranking_window, rms, ssim
from srpo_cli.miniature.world import SIZE
from srpo_cli.models.flux import Flux, LatentSpace, load_flux, load_latent_space
from srpo_cli.recipes import sample
from srpo_cli.recipes.methods import make_draws
from srpo_cli.recipes.parts import check_miniature_prompts, chunks, draw_pictures, load_reward
from srpo_cli.rewards.base import Reward
from srpo_cli.runtime.devices import best_device
from srpo_cli.runtime.folder import disk_errors, write_atomically
from srpo_cli.runtime.inputs import Picture
from srpo_cli.runtime.pictures import (
    METADATA_KEY,
    SHEET,
    is_sheet,
    open_picture,
    open_with_metadata,
    prompt_of,
    save_grid,
    save_png,
)
from srpo_cli.runtime.progress import CountProgress
from srpo_cli.runtime.quiet import quiet_libraries
from srpo_cli.runtime.seeding import generator
from srpo_cli.runtime.sources import Source

ROWS, SUMMARY, CURVE = "rows.jsonl", "summary.json", "curve.png"
ROUND_TRIP, NOISED, ONE_STEP, DIRECT_ALIGN = "round_trip", "noised", "one_step", "direct_align"

_LARGEST = 2 * 1024**2  # px of a picture as it is studied; FLUX.1 was made for up to two megapixels
_LARGEST_BATCH, _BATCH_PIXELS = 16, 2 * 1024**2
_NEAREST_TO_NOISE = 1e-6  # least share of the picture that a method may be left with; it divides by this
_STRIPS = 8  # pictures that get a strip
_CELL = 256  # px of a picture's longer side on a strip
_FACTS = ("sigma", "method", "branch", "delta_sigma", "gain", "label")
_FIGURES = ("psnr", "ssim", "psnr_picture", "ssim_picture", "latent_error", "reward", "reward_deviation")
_EMPTY = 0.93  # grey of a cell that has no picture


@dataclass(frozen=True)
class Method:
    """One way from ``x_t`` to an estimate of ``x_0``, of a fixed step (``delta_sigma``) or a fixed gain.

    ``delta_sigma`` and ``gain`` are negative where the step inverts; None: not what decides this method. A fixed gain
    is equation 5 of the paper read literally, with alpha taken where the model is called.
    """

    name: str
    delta_sigma: float | None = None
    gain: float | None = None

    @property
    def branch(self) -> Branch | None:
        decides = self.delta_sigma if self.gain is None else self.gain
        return None if decides is None else "denoise" if decides > 0 else "invert"

    @property
    def size(self) -> tuple[float, float]:
        """Length of the step and size of the gain, 0 where it does not decide; the same in both branches."""
        return abs(self.delta_sigma or 0.0), abs(self.gain or 0.0)

    @property
    def label(self) -> str:
        """What tables and pictures call the method."""
        if self.name != DIRECT_ALIGN:
            return self.name.replace("_", "-")
        delta_sigma, gain = self.size
        size = f"{delta_sigma:g}" if self.gain is None else f"gain {gain:g}"
        return f"Direct-Align {size} {self.branch}"

    def step(self, sigma: float) -> float | None:
        """``delta_sigma`` from ``sigma``, signed; None where it would leave the noise levels of pictures, [0, 1)."""
        if self.name == NOISED:
            return 0.0
        if self.name == ONE_STEP:
            return sigma
        delta = self.delta_sigma if self.gain is None else self.gain * (1 - sigma) / (1 - self.gain)
        sigma_next = sigma - delta
        return delta if sigma_next > -1e-9 and 1 - sigma_next > _NEAREST_TO_NOISE else None

    def gain_at(self, sigma: float) -> float:
        """The factor from the velocity's error to that of the recovered latents, where :meth:`step` has one."""
        delta = self.step(sigma)
        return delta / (1 - sigma + delta)

    def facts(self, sigma: float) -> dict[str, Any]:
        """What identifies a row of this method, where :meth:`step` has a step."""
        aligned = self.name == DIRECT_ALIGN
        return {
            "sigma": sigma,
            "method": self.name,
            "branch": self.branch,
            "delta_sigma": self.step(sigma) if aligned else None,
            "gain": None if self.name == NOISED else self.gain_at(sigma),
        }

    def __call__(self, x_t: Tensor, eps: Tensor, velocity: Tensor, sigma: Tensor, delta_sigma: Tensor) -> Tensor:
        """Clean latents of (B, ...); ``sigma`` and ``delta_sigma`` (B, 1, ...)."""
        if self.name == NOISED:
            return x_t
        if self.name == ONE_STEP:
            return x_t - sigma * velocity
        return recover(x_t, eps, velocity, sigma, delta_sigma)


@dataclass(frozen=True)
class Request:
    """What to study.

    Attributes:
        pictures: what to recover; none: ``prompt`` is rolled out ``num_images`` times.
        prompt: that of every picture; None: each picture's own, from a ``.txt`` beside it or its metadata.
        sigmas: noise levels, rising, in (0, 1].
        delta_sigmas, gains: step sizes of Direct-Align and gains in their place, all in (0, 1); both branches of each.
        noise_only: no transformer: the true velocity in place of the model's.
        seed: of noise and rollouts.
        size: height and width, px; None: each picture's own, or the nearest that the model can take.
        guidance, steps: of the model's call, and of rollouts (None: the model's own).
        reward, weights: name, and where the weights of rewards are by their names; None: the miniature's on the
            miniature, else none.
    """

    pictures: Sequence[Picture] = ()
    prompt: str | None = None
    num_images: int = 1
    sigmas: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.975)
    delta_sigmas: Sequence[float] = (0.025, 0.075)
    gains: Sequence[float] = ()
    noise_only: bool = False
    seed: int = 0
    size: tuple[int, int] | None = None
    guidance: float = 3.5
    steps: int | None = None
    reward: str | None = None
    weights: Mapping[str, Path] = field(default_factory=dict)

    @property
    def methods(self) -> list[Method]:
        """The methods to compare, in the order of rows and tables."""
        methods = [Method(NOISED)] if self.noise_only else []
        methods.append(Method(ONE_STEP))
        for delta in self.delta_sigmas:
            methods += [Method(DIRECT_ALIGN, delta_sigma=delta), Method(DIRECT_ALIGN, delta_sigma=-delta)]
        for gain in self.gains:
            methods += [Method(DIRECT_ALIGN, gain=gain), Method(DIRECT_ALIGN, gain=-gain)]
        return methods


@dataclass(frozen=True)
class PresetWindow:
    """Where a preset's training calls the model, and how long its step is there."""

    preset: str
    low: float
    high: float
    delta_sigma: float

    @classmethod
    def of(cls, preset: str, algorithm: AlgorithmConfig) -> PresetWindow:
        """In noise levels, whichever schedule the preset is written in."""
        draws = make_draws(algorithm)
        if isinstance(draws, SigmaDraws):
            return cls(preset, *draws.window, draws.delta_sigma)
        low, high = draws.sigmas[-1].item(), draws.sigmas[0].item()
        delta_sigma = draws.at(draws.timestep_length // 2)[0].delta_sigma
        return cls(preset, low, high, abs(delta_sigma.item()))

    def __str__(self) -> str:
        return (
            f"{self.preset} trains at sigma {self.low:.3g} to {self.high:.3g} with delta_sigma {self.delta_sigma:.3g}"
        )


@dataclass(frozen=True)
class Subject:
    """A picture to study, (1, 3, H, W) in [0, 1], and what it is called."""

    name: str
    images: Tensor
    prompt: str | None

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.images.shape[-2:])


class Ruler:
    """Measures what became of one picture.

    Args:
        subject: the picture.
        x_0: its latents, (1, ...).
        round_trip: ``x_0`` decoded, (1, 3, H, W): the best that any method can reach.
        reward: judges pictures for the subject's prompt; None: nothing does.
    """

    def __init__(self, subject: Subject, x_0: Tensor, round_trip: Tensor, reward: Reward | None) -> None:
        self.subject, self.x_0, self.round_trip, self.reward = subject, x_0, round_trip, reward
        self._picture = subject.images.to(round_trip)
        self._clean = self._rewards(self._picture)[0]

    def rows(
        self, label: str, facts: Sequence[Mapping[str, Any]], images: Tensor, x_0_hat: Tensor
    ) -> list[dict[str, Any]]:
        """A row for each of B recovered pictures (B, 3, H, W), their latents (B, ...) and what identifies them."""
        trip, picture = self.round_trip.expand_as(images), self._picture.expand_as(images)
        columns = {
            "psnr": psnr(images, trip).tolist(),
            "ssim": ssim(images, trip).tolist(),
            "psnr_picture": psnr(images, picture).tolist(),
            "ssim_picture": ssim(images, picture).tolist(),
            "latent_error": rms(x_0_hat, self.x_0).tolist(),
        }
        if self.reward:
            columns["reward"] = self._rewards(images)
            columns["reward_deviation"] = [reward - self._clean for reward in columns["reward"]]
            columns["reward_picture"] = [self._clean] * len(images)
        named = {"picture": self.subject.name, "prompt": self.subject.prompt, **dict.fromkeys(_FACTS), "label": label}
        if self.reward:
            mode = self.reward.preprocess.mode if self.reward.preprocess else None
            named |= {"reward_name": self.reward.name, "preprocess": mode, "reward_weights": self.reward.weights}
        values = zip(*columns.values(), strict=True)
        return [
            {**named, **fact, **dict(zip(columns, value, strict=True))}
            for fact, value in zip(facts, values, strict=True)
        ]

    def _rewards(self, images: Tensor) -> list[float | None]:
        if self.reward is None:
            return [None] * len(images)
        prompts = [self.subject.prompt or ""] * len(images)
        return self.reward(images.to(self.reward.device), prompts).tolist()


class Study:
    """Runs a request: :meth:`rows` yields what was measured, picture by picture; then :meth:`finish` sums up.

    Args:
        source: the model, or in a ``noise_only`` request what holds the autoencoder.
        output: folder to write to.
        say: told what the user should know and is no result.
        window: a preset's, to be drawn.
    """

    def __init__(
        self,
        source: Source,
        request: Request,
        output: Path,
        say: Callable[[str], None],
        window: PresetWindow | None = None,
    ) -> None:
        self.source, self.request, self.output, self.say, self.window = source, request, output, say, window
        self.methods = request.methods
        self._rows: list[dict[str, Any]] = []
        self._strips: list[str] = []
        self._reward: Reward | None = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each picture's round trip, and for each picture, sigma and method."""
        request = self.request
        if self.source.base == "miniature" and request.size not in (None, (SIZE, SIZE)):
            raise UsageError(f"size {'x'.join(map(str, request.size))}: the miniature takes {SIZE}x{SIZE} and no other")
        listed = _listed(request)
        reward_name = self._reward_name([prompt for _, prompt in listed])
        with disk_errors(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
        quiet_libraries()
        device = best_device()
        reward = None
        if reward_name:
            reward = load_reward(reward_name, request.weights.get(reward_name), device, announce=self.say)
            _check_prompts(listed, reward)
            self._reward = reward
        if request.noise_only:
            model = load_latent_space(self.source.base, torch.bfloat16, device)
            self.say(f"{self.source.base}: the autoencoder alone; every method is given the true velocity")
        else:
            model = load_flux(self.source.base, torch.bfloat16, device, self.source.tuned)
        with CountProgress(len(listed), "pictures") as progress:
            for number, subject in enumerate(self._subjects(model, listed)):
                found, pictures = self._study(model, reward, subject, number)
                self._rows += found
                if number < _STRIPS:
                    self._strip(subject, pictures, number)
                yield from found
                progress.update(number + 1)
        if len(listed) > _STRIPS:
            self.say(f"strips: of the first {_STRIPS} of {len(listed)} pictures")

    def finish(self) -> dict[str, Any]:
        """Write the rows, the curve and the summary, and return the latter.

        Its ``means`` hold a row for each sigma and method, averaged over the pictures that have one, and its
        ``windows`` one for each method: the sigmas in which the reward ranks as on the clean round trips.
        """
        means = _means(self._rows)
        windows = [] if self.request.noise_only else _windows(means, self.methods)
        pictures = len({row["picture"] for row in self._rows})
        summary = {
            "model": self.source.base,
            "weights": str(self.source.weights) if self.source.weights and not self.request.noise_only else None,
            "velocity": "true" if self.request.noise_only else "model",
            "reward": self._reward and self._reward.name,
            "reward_weights": self._reward and self._reward.weights,
            "pictures": pictures,
            "seed": self.request.seed,
            "guidance": self.request.guidance,
            "srpo": __version__,
            "preset": vars(self.window) if self.window else None,
            "rank_kept": RANKS_KEPT,
            "pictures_needed": ENOUGH_PICTURES,
            "windows": windows,
            "means": means,
        }
        write_atomically(self.output / ROWS, "".join(map(_json_line, self._rows)))
        write_atomically(self.output / SUMMARY, json.dumps(summary, indent=2) + "\n")
        _curve(self.curve, means, windows, self.methods, self.window)
        return summary

    def _reward_name(self, prompts: Sequence[str | None]) -> str | None:
        """The reward to use; None, with a note, where none was named and there is no default."""
        if self.request.reward:
            return self.request.reward
        if self.source.base != "miniature":
            self.say("no reward: --reward NAME adds its column and the recommended window")
            return None
        without = sum(prompt is None for prompt in prompts)
        if without and self.request.noise_only:
            self.say(f"no reward: {without} of {len(prompts)} pictures have no prompt (--prompt gives one)")
            return None
        return "miniature"

    def _subjects(self, model: LatentSpace, listed: Sequence[tuple[Path | None, str | None]]) -> Iterator[Subject]:
        """The pictures, opened and fitted, or drawn."""
        request = self.request
        if self.source.base == "miniature" and not request.noise_only:
            check_miniature_prompts([prompt or "" for _, prompt in listed])
        without = sum(not (prompt or "").strip() for _, prompt in listed)
        if without and not request.noise_only:
            self.say(f"{without} of {len(listed)} pictures have no prompt: the model reads an empty one")
        for number, (path, prompt) in enumerate(listed):
            if path is None:
                yield self._rolled_out(model, number, prompt)
                continue
            picture = open_picture(path)
            own = (picture.height, picture.width)
            size = self._size(model, own)
            if size != own:
                self.say(f"{path}: {own[0]}x{own[1]} px, fitted to {size[0]}x{size[1]}")
                picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS)
            yield Subject(str(path), V.to_dtype(V.pil_to_tensor(picture), torch.float32, scale=True)[None], prompt)

    def _size(self, model: LatentSpace, own: tuple[int, int]) -> tuple[int, int]:
        """The size in which a picture of size ``own`` is studied."""
        if self.source.base == "miniature":
            return SIZE, SIZE
        return self.request.size or model.nearest_size(own, _LARGEST)

    def _rolled_out(self, model: Flux, number: int, prompt: str) -> Subject:
        asked = sample.Request([prompt], self.request.seed, 1, self.request.steps, self.request.guidance)
        steps, own = asked.settings(model)
        size = self.request.size or own
        seed = self.request.seed + number
        noise = [torch.Generator().manual_seed(seed)]
        images = draw_pictures(model, [prompt], noise, size, steps, self.request.guidance, 1)
        path = self.output / f"rollout-seed{seed}.png"
        facts = {"prompt": prompt, "seed": seed, "model": self.source.base, "steps": steps, "srpo": __version__}
        save_png(images[0], path, facts)
        return Subject(str(path), images, prompt)

    @torch.no_grad()
    def _study(
        self, model: LatentSpace, reward: Reward | None, subject: Subject, number: int
    ) -> tuple[list[dict[str, Any]], dict[tuple[str, float], Tensor]]:
        """The rows of one picture by rising sigma, and the pictures (3, H, W) of its strip by label and sigma."""
        size, request = subject.size, self.request
        x_0 = model.encode(subject.images).float()
        eps = model.noise(1, size, generator(request.seed, "recover", number)).float()
        ruler = Ruler(subject, x_0, model.decode(x_0, size), reward)

        rows = ruler.rows("round trip", [{"sigma": 0.0, "method": ROUND_TRIP}], ruler.round_trip, x_0)
        pictures = {(ROUND_TRIP, 0.0): ruler.round_trip[0].cpu()}
        for part in chunks(len(request.sigmas), max(1, min(_LARGEST_BATCH, _BATCH_PIXELS // (size[0] * size[1])))):
            sigmas = request.sigmas[part]
            sigma = torch.tensor(sigmas, device=x_0.device)[:, None, None]
            x_t = add_noise(x_0, eps, sigma)
            velocity = self._velocity(model, subject, x_0, eps, x_t, sigma.flatten())
            for method in dict.fromkeys([Method(NOISED), *self.methods]):
                steps = {i: step for i, level in enumerate(sigmas) if (step := method.step(level)) is not None}
                if not steps:
                    continue
                able = list(steps)
                delta_sigma = torch.tensor(list(steps.values()), device=x_0.device)[:, None, None]
                x_0_hat = method(x_t[able], eps, velocity[able], sigma[able], delta_sigma)
                images = model.decode(x_0_hat, size)
                if number < _STRIPS:
                    levels = [(method.label, sigmas[i]) for i in able]
                    pictures |= dict(zip(levels, images.cpu(), strict=True))
                if method in self.methods:
                    facts = [method.facts(sigmas[i]) for i in able]
                    rows += ruler.rows(method.label, facts, images, x_0_hat)
        rows.sort(key=lambda row: row["sigma"])  # stable: the methods keep their order
        return rows, pictures

    def _velocity(
        self, model: LatentSpace, subject: Subject, x_0: Tensor, eps: Tensor, x_t: Tensor, sigma: Tensor
    ) -> Tensor:
        """The model's velocity at each sigma (B,) from one call each, or the true one, (B, ...) float32."""
        if not isinstance(model, Flux):
            return (eps - x_0).expand_as(x_t)
        conditioning = model.encode_prompts([subject.prompt or ""]).select([0] * len(x_t))
        return model.velocity(x_t, sigma, conditioning, self.request.guidance, subject.size).float()

    def _strip(self, subject: Subject, pictures: Mapping[tuple[str, float], Tensor], number: int) -> None:
        """One sheet: what the noise leaves and what each method makes of it, a column for each sigma."""
        shown = _strip_size(subject.size)
        empty = torch.full((3, *shown), _EMPTY)
        labels = ["noised", *(method.label for method in self.methods if method.name != NOISED)]
        sheet = []
        for label in labels:
            reference = subject.images[0] if label == labels[0] else pictures[ROUND_TRIP, 0.0]
            cells = [reference, *(pictures.get((label, sigma)) for sigma in self.request.sigmas)]
            sheet.append(torch.stack([empty if cell is None else _shrunk(cell, shown) for cell in cells]))
        captions = ["picture (top) and its round trip", *(f"sigma {sigma:g}" for sigma in self.request.sigmas)]
        stem = re.sub(r"[^\w.-]+", "-", Path(subject.name).stem)[:60]
        name = f"strip-{number + 1}-{stem}.png"
        save_grid(sheet, self.output / name, labels, captions)
        self._strips.append(name)

    @property
    def strips(self) -> list[Path]:
        """The strips that were written."""
        return [self.output / name for name in self._strips]

    @property
    def curve(self) -> Path:
        """The curve that :meth:`finish` writes."""
        return self.output / CURVE


def _listed(request: Request) -> list[tuple[Path | None, str | None]]:
    """Each picture's path and prompt; a path of None is to be rolled out."""
    if not request.pictures:
        return [(None, request.prompt)] * request.num_images
    listed: dict[Path, str | None] = {}
    for picture in request.pictures:
        path = Path(picture.file)
        try:
            _, metadata = open_with_metadata(path)
        except SrpoError as error:
            raise UsageError(f"{error}: mend or remove it, or name the others") from error
        if not (picture.found and is_sheet(metadata)):
            listed[path] = prompt_of(path, metadata) if request.prompt is None else request.prompt
    if not listed:
        raise UsageError(f"nothing to recover: {path} is a sheet of pictures, and there is no other; name pictures")
    return list(listed.items())


def _check_prompts(listed: Sequence[tuple[Path | None, str | None]], reward: Reward) -> None:
    """Refuse to judge a picture by a text that it does not have."""
    if not reward.reads_text:
        return
    for path, prompt in listed:
        if not (prompt or "").strip():
            raise UsageError(
                f"{path} has no prompt, and {reward.name} reads one: give --prompt TEXT, or {path.stem}.txt beside it"
            )


def _strip_size(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, _CELL / max(size))
    return tuple(max(1, round(edge * scale)) for edge in size)


def _shrunk(image: Tensor, size: tuple[int, int]) -> Tensor:
    return image if tuple(image.shape[-2:]) == size else V.resize(image, list(size), antialias=True)


# Summing up


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in row.items() if value is not None}, ensure_ascii=False) + "\n"


def _means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each sigma and method: every figure's mean over the pictures, and the reward's rank correlation.

    The ranking to keep is that of the round trips: what the autoencoder loses is not for a method to recover. The
    round trips' own correlation is with the pictures.
    """
    pictures = {row["picture"]: row["reward_picture"] for row in rows if "reward_picture" in row}
    clean = {row["picture"]: row["reward"] for row in rows if row["method"] == ROUND_TRIP and "reward" in row}
    means = []
    for group in _by_method(rows):
        first = group[0]
        named = {key: first[key] for key in _FACTS}
        mean = {key: sum(row[key] for row in group) / len(group) for key in _FIGURES if key in first}
        if clean:
            ranking = pictures if first["method"] == ROUND_TRIP else clean
            reference = [ranking[row["picture"]] for row in group]
            mean["rank_correlation"] = rank_correlation([row["reward"] for row in group], reference)
            rewards, originals = [row["reward"] for row in group], [pictures[row["picture"]] for row in group]
            mean["rank_correlation_picture"] = rank_correlation(rewards, originals)
        means.append({**named, "pictures": len(group), **mean})
    return means


def _by_method(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of all pictures together for each sigma and method, by rising sigma."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["sigma"], row["label"]), []).append(row)
    return sorted(groups.values(), key=lambda group: group[0]["sigma"])


def _windows(means: Sequence[dict[str, Any]], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """For each method the sigmas in which the reward ranks the recovered pictures as the clean round trips.

    Empty where no rank correlation could be taken.
    """
    ranked = [mean for mean in means if mean.get("rank_correlation") is not None]
    windows = []
    for method in methods if ranked else ():
        mine = [mean for mean in ranked if mean["label"] == method.label]
        found = ranking_window([mean["sigma"] for mean in mine], [mean["rank_correlation"] for mean in mine])
        low, high = found or (None, None)
        windows.append({"label": method.label, "sigma_low": low, "sigma_high": high})
    return windows


def _curve(
    path: Path,
    means: Sequence[dict[str, Any]],
    windows: Sequence[dict[str, Any]],
    methods: Sequence[Method],
    preset: PresetWindow | None,
) -> None:
    """One panel for each figure over sigma, a line for each method, and the windows where there are any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {"psnr": "PSNR against the round trip, dB", "latent_error": "latent error, RMS"}
    if "reward" in means[0]:
        panels["reward_deviation"] = "reward minus the clean picture's"
    if windows:
        panels["rank_correlation"] = "rank correlation with the round trips' rewards; bars: windows"
    rows = -(-len(panels) // 2)
    columns = -(-len(panels) // rows)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.9 * rows + 0.6), layout="constrained")
    sizes = list(dict.fromkeys(method.size for method in methods if method.name == DIRECT_ALIGN))
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=False):
        for number, method in enumerate(methods):
            mine = [mean for mean in means if mean["label"] == method.label and mean[key] is not None]
            other = "black" if method.name == ONE_STEP else "0.6"
            style = {
                "color": f"C{sizes.index(method.size)}" if method.size in sizes else other,
                "linestyle": "--" if method.branch == "invert" else "-",
            }
            sigmas, values = [mean["sigma"] for mean in mine], [mean[key] for mean in mine]
            axis.plot(sigmas, values, marker="o", markersize=3, label=method.label, **style)
            if key == "rank_correlation" and windows[number]["sigma_low"] is not None:
                ends = [windows[number]["sigma_low"], windows[number]["sigma_high"]]
                height = 0.03 * (len(methods) - number)  # in the order of the legend, from the bottom of the panel
                axis.plot(ends, [height] * 2, linewidth=3, transform=axis.get_xaxis_transform(), **style)
        if key == "latent_error":
            axis.set_yscale("log")
        if key == "reward_deviation":
            axis.axhline(0, color="0.6", linewidth=0.8)
        if key == "rank_correlation":
            axis.axhline(RANKS_KEPT, color="0.6", linewidth=0.8, linestyle=":")
            bottom = min(0.0, *(mean[key] for mean in means if mean[key] is not None))
            axis.set_ylim(bottom - 0.05 * (len(methods) + 1), 1.05)
        if preset:
            axis.axvspan(preset.low, preset.high, color="0.9", zorder=0, label=f"window of {preset.preset}")
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="sigma", xlim=(0, 1))
        axis.grid(alpha=0.3)
    for unused in list(axes.flat)[len(panels) :]:
        unused.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=110, metadata={METADATA_KEY: json.dumps(SHEET)})
    plt.close(figure)
    write_atomically(path, encoded.getvalue())
