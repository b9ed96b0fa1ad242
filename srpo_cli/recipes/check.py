"""Whether a reward can be trained on: its training path against its reference path, and its gradient against itself.

A slip in preprocessing shifts every score and stops nothing. The two paths are therefore compared twice: on the
pictures as they are, where their crops and resizes differ on purpose, and on squares of the tower's own size, where
no resize is left and they have to agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from srpo_cli.errors import SrpoError, UsageError, one_line
from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.preprocess import Images

SAME_SCORE = 1e-4
"""Largest difference of the paths on squares of the tower's size, as a share of the mean absolute score. Equal
pixels give equal scores; on the miniature a mean that is off by one 8-bit level moves them by 2e-3."""

DEAD_PIXELS = 0.05
"""Largest share of pixels without gradient. Antialiased, every pixel that the tower sees has one, and patches that do
not fill its square leave up to 3.1 % unseen (SigLIP's 27 of 14 px in 384). Bicubic without antialias reads four pixels
in each direction, so at six times the tower's size it leaves 56 % out."""

SAME_RANKS = 0.9
"""Least rank correlation of the two paths that needs no note."""

DERIVATIVE_ERROR = 0.05
"""Largest relative error of the gradient against finite differences; the miniature's stays below 0.001 in float32."""

CLAMPED = 0.5
"""Share of pixels that lose their gradient where all leave [0, 1] together; a clamp makes it 1."""

ENLARGED = 6
"""Multiple of the tower's size at which a resize without antialias shows for certain; below four times bicubic still
touches every pixel."""

_OUTSIDE = 1.05  # added to or taken from a picture in [0, 1], puts every pixel out of it
_PROBED = 3  # pictures whose gradient is compared with differences; each costs 20 forwards
_DIRECTIONS = 4
# Steps by the change of the score that they should make, as a share of it. A right gradient agrees at one of the two,
# a wrong one at neither. Measured on the miniature, random directions: 1e-5 is off by 0.9 % from float32's rounding,
# 1e-4 by 0.04 %, 1e-3 by 0.6 % and 1e-2 by 60 % from the score's curvature.
_CHANGES = (1e-4, 1e-3)
# And steps by the pixels, for a score that is near zero: its own size then says nothing about its rounding.
_STEPS = (1e-3, 1e-2)
_SMALLEST_SCORE = 1e-2  # below it the paths are compared as if it were this
_ENOUGH_TO_RANK = 3
_BATCH = 8


@dataclass(frozen=True)
class Check:
    """How a reward's training path does.

    Attributes:
        reward, weights, unit, dtype: which reward, in what it runs.
        reference, training: names of the two preprocessings; empty for a reward that takes pictures as they are.
        pictures: how many were looked at.
        score_reference, score_training: mean scores.
        difference_mean, difference_max: training minus reference, mean and largest absolute value, on the pictures
            as they are; crops and resizes are part of it.
        difference_squares: largest absolute difference on squares of the tower's size, where both should be equal.
        rank_correlation: Spearman's, of the two paths' scores; None for fewer than three pictures.
        gradient_norm: mean over the pictures of the L2 norm of d score / d pixels.
        dead_pixels: share of pixels inside the crop without gradient; of pictures as they are.
        dead_enlarged: the same for the first picture enlarged to ``ENLARGED`` times the tower's size.
        outside_crop: share of the pixels that a centre crop leaves out; no fault.
        dead_outside_range: share of the gradient's pixels lost once all pixels lie outside [0, 1].
        error_along, error_random: relative error of the derivative against central differences, along the gradient
            and along random directions; None where it was not measured.
        failures: what is wrong, in words; none of it for a good reward.
        notes: what to know besides.
    """

    reward: str
    weights: str
    unit: str
    dtype: str
    reference: str
    training: str
    pictures: int
    score_reference: float | None = None
    score_training: float | None = None
    difference_mean: float | None = None
    difference_max: float | None = None
    difference_squares: float | None = None
    rank_correlation: float | None = None
    gradient_norm: float | None = None
    dead_pixels: float | None = None
    dead_enlarged: float | None = None
    outside_crop: float | None = None
    dead_outside_range: float | None = None
    error_along: float | None = None
    error_random: float | None = None
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """ "ok", or every failure in words."""
        return "; ".join(self.failures) or "ok"

    def row(self) -> dict[str, str | int | float | None]:
        """All of it as one flat row, the verdict last."""
        row = asdict(self)
        row.pop("failures")
        return row | {"notes": "; ".join(self.notes), "verdict": self.verdict}


def check_reward(reward: Reward, pictures: Sequence[Tensor], prompts: Sequence[str], seed: int = 0) -> Check:
    """Compare a reward's training path with its reference path, and its gradient with finite differences.

    Differences are taken in float32, the precision in which rewards are trained on: a float64 copy would double the
    memory of a large tower and still pass through the casts inside it. The step is sized by the change of the score
    that it makes, where neither rounding nor curvature weighs.

    Args:
        reward: a reward with its weights, in float32 for the finite differences.
        pictures: N of them, (3, H, W) in [0, 1], each of its own size.
        prompts: N texts.
        seed: of the random directions.

    Raises UsageError without pictures. A reward that raises is a failure of its row, named like the others.
    """
    if not pictures or len(pictures) != len(prompts):
        raise UsageError(f"--check needs pictures, and a prompt for each: got {len(pictures)} and {len(prompts)}")
    reference, training = reward.via("reference"), reward.via("training")
    dtype = next((p.dtype for p in reward.parameters()), torch.float32)
    facts: dict = {
        "reward": reward.name,
        "weights": reward.weights,
        "unit": reward.unit,
        "dtype": str(dtype).removeprefix("torch."),
        "reference": reference.preprocess.mode if reference.preprocess else "",
        "training": training.preprocess.mode if training.preprocess else "",
        "pictures": len(pictures),
    }
    failures: list[str] = []
    notes: list[str] = []
    pictures = [picture.to(reward.device, torch.float32) for picture in pictures]
    for measure in (_compare, _differentiate):
        try:
            facts |= measure(reference, training, pictures, prompts, seed, failures, notes)
        except (SrpoError, RuntimeError, ValueError, TypeError) as error:
            failures.append(f"fails with {type(error).__name__}: {one_line(error)}")
            break
    return Check(**facts, failures=tuple(failures), notes=tuple(notes))


def _compare(
    reference: Reward,
    training: Reward,
    pictures: list[Tensor],
    prompts: Sequence[str],
    seed: int,
    failures: list[str],
    notes: list[str],
) -> dict[str, float | None]:
    """Scores of both paths."""
    old, new = (_scores(path, pictures, prompts) for path in (reference, training))
    if not (old.isfinite().all() and new.isfinite().all()):
        failures.append(f"scores that are not finite: {_count_bad(old)} by reference, {_count_bad(new)} in training")
        return {}
    squares = _squares(training, pictures)
    apart = (_scores(training, squares, prompts) - _scores(reference, squares, prompts)).abs().max().item()
    if not apart <= SAME_SCORE * max(old.abs().mean().item(), _SMALLEST_SCORE):
        failures.append(
            f"the paths differ by {apart:.2g} on squares of the tower's size, where no resize is left: "
            "compare their channel order, mean, std and range"
        )
    ranks = _rank_correlation(old, new)
    if ranks is not None and ranks < SAME_RANKS:
        notes.append(
            f"the training path ranks these pictures otherwise (rank correlation {ranks:.2f}): it crops or resizes "
            "as the reference does not"
        )
    return {
        "score_reference": old.mean().item(),
        "score_training": new.mean().item(),
        "difference_mean": (new - old).mean().item(),
        "difference_max": (new - old).abs().max().item(),
        "difference_squares": apart,
        "rank_correlation": ranks,
    }


def _differentiate(
    reference: Reward,
    training: Reward,
    pictures: list[Tensor],
    prompts: Sequence[str],
    seed: int,
    failures: list[str],
    notes: list[str],
) -> dict[str, float | None]:
    """Gradient of the training path: is it there, everywhere, and right?"""
    if not training.differentiable or (training.preprocess and not training.preprocess.differentiable):
        failures.append("not differentiable: it can score, it cannot train")
        return {}
    norms, dead, outside, along, across = [], [], [], [], []
    exact = all(p.dtype in (torch.float32, torch.float64) for p in training.parameters())
    if not exact:
        notes.append("finite differences need float32 weights: not measured")
    generator = torch.Generator().manual_seed(seed)
    for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        score, gradient = _gradient(training, picture, prompt)
        if gradient is None:
            failures.append("no gradient: the score is detached from the pixels")
            return {"gradient_norm": 0.0, "dead_pixels": 1.0}
        if not gradient.isfinite().all():
            failures.append(f"a gradient that is not finite, at picture {i + 1}")
            return {}
        inside = _inside_crop(training, picture)
        norms.append(gradient.norm().item())
        dead.append(_dead(gradient)[inside].float().mean().item())
        outside.append(1 - inside.float().mean().item())
        if exact and i < _PROBED and norms[-1] > 0:
            scale = max(abs(score), 1e-3)
            random = torch.randn(_DIRECTIONS, *picture.shape, generator=generator).to(picture.device)
            along.append(_error(training, picture, prompt, gradient, gradient[None] / norms[-1], scale))
            across.append(_error(training, picture, prompt, gradient, random, scale))
    enlarged = _dead_enlarged(training, pictures[0], prompts[0])
    lost = _dead_outside_range(training, pictures[0], prompts[0])
    facts = {
        "gradient_norm": sum(norms) / len(norms),
        "dead_pixels": sum(dead) / len(dead),
        "dead_enlarged": enlarged,
        "outside_crop": sum(outside) / len(outside),
        "dead_outside_range": lost,
        "error_along": max(along, default=None),
        "error_random": max(across, default=None),
    }
    if min(norms) == 0:
        failures.append(f"a gradient of zero, at picture {norms.index(0) + 1}")
        return facts
    if facts["dead_pixels"] > DEAD_PIXELS:
        failures.append(
            f"{facts['dead_pixels']:.1%} of the pixels have no gradient: a resize without antialias, or a part cut off"
        )
    elif enlarged is not None and enlarged > DEAD_PIXELS:
        failures.append(
            f"{enlarged:.1%} of the pixels have no gradient at {ENLARGED} times the tower's size: "
            "a resize without antialias"
        )
    if lost > CLAMPED:
        failures.append(f"pixels outside [0, 1] have no gradient ({lost:.0%} of them): a clamp; a decoder overshoots")
    for name, error in (("the gradient", facts["error_along"]), ("random directions", facts["error_random"])):
        if error is not None and not error <= DERIVATIVE_ERROR:
            failures.append(f"a wrong gradient: off by {error:.1%} from finite differences along {name}")
    if facts["outside_crop"] > 0:
        notes.append(f"the centre crop leaves {facts['outside_crop']:.0%} of the pixels without gradient")
    return facts


@torch.no_grad()
def _scores(reward: Reward, pictures: Images, prompts: Sequence[str]) -> Tensor:
    """Scores (N,) in float64 on the CPU."""
    parts = [slice(start, start + _BATCH) for start in range(0, len(pictures), _BATCH)]
    return torch.cat([reward(pictures[part], list(prompts[part])).double().cpu() for part in parts])


def _squares(reward: Reward, pictures: list[Tensor]) -> list[Tensor]:
    """The centre square of each picture at the tower's size, on 8-bit levels so that a path through Pillow is exact."""
    if reward.preprocess is None:
        return pictures
    size = reward.preprocess.size
    squares = [_resize(_centre(picture), size).clamp(0, 1) for picture in pictures]
    return [(square * 255).round() / 255 for square in squares]


def _centre(picture: Tensor) -> Tensor:
    height, width = picture.shape[-2:]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    return picture[..., top : top + edge, left : left + edge]


def _resize(picture: Tensor, size: int) -> Tensor:
    return F.interpolate(picture[None], (size, size), mode="bicubic", antialias=True)[0]


def _gradient(reward: Reward, picture: Tensor, prompt: str) -> tuple[float, Tensor | None]:
    """Score of one picture and its gradient (3, H, W); None where the score does not depend on the pixels."""
    leaf = picture.detach().clone().requires_grad_()
    score = reward(leaf[None], [prompt]).sum()
    if not score.requires_grad:
        return score.item(), None
    return score.item(), torch.autograd.grad(score, leaf, allow_unused=True)[0]


def _dead(gradient: Tensor) -> Tensor:
    """Which pixels have no gradient in any channel, (H, W)."""
    return (gradient == 0).all(0)


def _inside_crop(reward: Reward, picture: Tensor) -> Tensor:
    """Pixels that the training path is meant to see, (H, W): less than all for a centre crop."""
    height, width = picture.shape[-2:]
    seen = torch.ones(height, width, dtype=torch.bool, device=picture.device)
    if reward.preprocess and reward.preprocess.mode == "crop" and height != width:
        edge = min(height, width)
        # The crop is placed in whole pixels of the tower, so its border moves by up to one of them.
        rounding = math.ceil(edge / reward.preprocess.size)
        for axis, length in enumerate((height, width)):
            if length > edge:
                margin = (length - edge) // 2 + rounding
                seen.narrow(axis, 0, margin).fill_(False)
                seen.narrow(axis, length - margin, margin).fill_(False)
    return seen


def _dead_enlarged(reward: Reward, picture: Tensor, prompt: str) -> float | None:
    """Share of pixels without gradient of a square that is ``ENLARGED`` times as large as the tower's."""
    if reward.preprocess is None:
        return None
    large = _resize(_centre(picture), ENLARGED * reward.preprocess.size)
    _, gradient = _gradient(reward, large, prompt)
    return _dead(gradient).float().mean().item()


def _dead_outside_range(reward: Reward, picture: Tensor, prompt: str) -> float:
    """Share of pixels that lose their gradient when the picture leaves [0, 1] as a whole, on the worse side."""
    square = _centre(picture)
    before = _dead(_gradient(reward, square, prompt)[1])
    after = [_dead(_gradient(reward, square + by, prompt)[1]) for by in (_OUTSIDE, -_OUTSIDE)]
    alive = (~before).sum().clamp(min=1)
    return max(((dead & ~before).sum() / alive).item() for dead in after)


@torch.no_grad()
def _error(reward: Reward, picture: Tensor, prompt: str, gradient: Tensor, directions: Tensor, scale: float) -> float:
    """Relative error of the directional derivatives, root mean square over ``directions`` (D, 3, H, W)."""
    expected = (directions * gradient).flatten(1).sum(1).double().cpu()
    # For unit noise per pixel, as for the gradient's own direction, the derivative is of the gradient's norm.
    size = gradient.norm().item()
    errors = []
    for step in (*(change * scale / size for change in _CHANGES), *_STEPS):
        moved = torch.cat([picture + step * directions, picture - step * directions])
        up, down = _scores(reward, moved, [prompt] * len(moved)).chunk(2)
        measured = (up - down) / (2 * step)
        errors.append(((measured - expected).square().mean() / measured.square().mean()).sqrt().item())
    return min(errors)


def _rank_correlation(old: Tensor, new: Tensor) -> float | None:
    if len(old) < _ENOUGH_TO_RANK or old.std() == 0 or new.std() == 0:
        return None
    return float(spearmanr(old.numpy(), new.numpy()).statistic)


def _count_bad(scores: Tensor) -> str:
    return f"{int((~scores.isfinite()).sum())} of {len(scores)}"
