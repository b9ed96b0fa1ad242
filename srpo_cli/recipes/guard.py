"""The guard of a run: watches what training does not optimise, warns, stops, and ranks the checkpoints.

Every rollout is drawn before the run is trained on it, so its picture is evidence that costs hardly more; a small
panel of held-out prompts, always from the same noises, shows what only pairs of pictures can. All is measured against
what the untrained model draws. :mod:`srpo_cli.metrics.guard` has the mathematics.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from srpo_cli.config.schema import TrainConfig
from srpo_cli.errors import SrpoError, one_line
from srpo_cli.metrics.guard import Discriminant, Place, Signal, Watch
from srpo_cli.metrics.pictures import STATISTICS
from srpo_cli.recipes.figures import CAPTION_MARGIN, CLIPPING, GAP, REWARD, Figures
from srpo_cli.recipes.parts import Parts, load_reward
from srpo_cli.runtime.distributed import Ranks
from srpo_cli.runtime.folder import RunFolder, write_atomically
from srpo_cli.runtime.plan import Effort

GUARD, PANEL = "guard.json", "panel.safetensors"
CALIBRATION = 64
"""Pictures of each kind that corridors are measured on, at most."""
PANEL_PROMPTS = 4
"""Held-out prompts that are drawn again and again, each from two noises."""

_LEAST_CALIBRATION = 8
_LEAST_PANEL = 3  # prompts: of fewer nothing is known of how they differ
_OF_BASE = 2  # draws of the panel by the untrained model, without and with the positive word
_LEAST_DRAWS = _OF_BASE + 1
_PER_CHECK = 40  # rollouts behind the means of a check, about
_PANEL_NOISES = 2
_PANEL = PANEL_PROMPTS * _PANEL_NOISES
_THUMBNAIL = 64  # pixels: what pairs of pictures are compared at
_BACKWARD = 3  # a pass with a gradient, in forwards
_FOR_CALIBRATION = 0.8  # of the budget
_FOR_CALIBRATION_OF_GIVEN = 0.5  # of a run on given pictures, of which the panel alone shows the model's own
_TREND = 5  # fresh steps to either side of a checkpoint that its place is read from, at least

_LOOK = {
    "saturation": "saturation",
    "contrast": "contrast",
    "highlights": "highlights",
    "high_frequency": "grain",
    "grid": "grid",
    CLIPPING: CLIPPING,
}
"""Signals that are one figure of a picture's look, and the figure."""

_BAD = {"grid": "high", CLIPPING: "high"}
"""Which way these go when they go wrong; the rest of the look can go wrong either way."""

_WHOLE_LOOK = "statistics"
_MINIATURE_JUDGE = "miniature:clip"

Draw = Callable[[Sequence[str], Sequence[int]], Iterator[tuple[slice, Tensor]]]
"""Prompts, and numbers of the noises to start from, to pictures, a batch at a time: as rollouts are drawn."""


@dataclass(frozen=True)
class Plan:
    """What the guard may spend.

    Attributes:
        calibration: base pictures, and asked ones, to draw; 0: there is no guard.
        every: steps between checks.
        panel: steps after which the panel is drawn.
        steps: that the run was planned to take.
        shortfall: why there is no guard.
    """

    calibration: int
    every: int
    panel: tuple[int, ...] = ()
    steps: int = 0
    shortfall: str = ""

    @classmethod
    def of(cls, config: TrainConfig, batch: int, ranks: int = 1) -> Plan:
        """For a run whose step has ``batch`` rollouts, its work shared by so many ``ranks``.

        Work is counted in forwards of the transformer for one picture.
        """
        steps, share, effort = config.train.steps, config.guard.share, Effort.of(config)
        # A group's pictures are much alike, and a replayed step draws none.
        every = max(1, round(_PER_CHECK / (batch // config.algorithm.group))) * (config.rollout.replay + 1)
        if config.guard.action == "off":
            return cls(0, every, steps=steps)
        given = config.rollout.source == "pictures"
        drawn = 0 if given else config.rollout.steps / (config.rollout.replay + 1)
        budget = share * steps * batch * (drawn + effort.forwards + _BACKWARD * effort.calls)

        def cost(pictures: int) -> float:
            return math.ceil(pictures / ranks) * ranks * config.rollout.steps

        # A target draws base pictures in any case, and asked ones where it or captions need them: the guard looks on.
        kinds = 0 if config.algorithm.target_asks else 2 if config.algorithm.target is None else 1
        part = _FOR_CALIBRATION_OF_GIVEN if given else _FOR_CALIBRATION
        looks = _LEAST_DRAWS * cost(_PANEL) if given else 0.0
        most = min(part * budget, budget - looks)
        affordable = [n for n in range(1, CALIBRATION + 1) if kinds * cost(n) <= most]
        count = affordable[-1] if affordable else 0
        if count < _LEAST_CALIBRATION:
            least = kinds * cost(_LEAST_CALIBRATION)
            needed = share * max(least / part, least + looks) / budget
            enough, longer = math.ceil(100 * needed) / 100, math.ceil(steps * needed / share)
            pays_for = "a look at the model's own" if given else f"{_LEAST_CALIBRATION} pictures of each kind"
            ways = [f"set guard.share={enough:g}"] if enough <= 1 else []
            why = f"{100 * share:g} % of the work of {steps} steps does not pay for {pays_for}: "
            return cls(0, every, steps=steps, shortfall=why + ", or ".join([*ways, f"take {longer} steps"]))
        affordable_looks = int((budget - kinds * cost(count)) // cost(_PANEL)) - _OF_BASE
        if given:
            every = max(every, math.ceil(steps / affordable_looks))
            return cls(count, every, tuple(due_steps(steps, every)), steps)
        # Nobody knows when a run will collapse: at ever longer intervals.
        due = [step for step in (every * 2**k for k in range(32)) if step < steps] + [steps]
        return cls(count, every, tuple(_spread_out(due, affordable_looks)), steps)

    @classmethod
    def as_begun(cls, config: TrainConfig, batch: int, ranks: int, folder: Path) -> Plan:
        """Of a run that goes on: what it was begun with, whatever its length and its ``ranks`` are now."""
        path = folder / GUARD
        if config.guard.action == "off":
            return cls.of(config, batch, ranks)
        if not path.is_file():
            return replace(cls.of(config, batch, ranks), calibration=0, panel=(), shortfall="as this run was begun")
        plan = _read_json(path)["plan"]
        return cls(**{**plan, "panel": tuple(plan["panel"])})


def due_steps(steps: int, every: int) -> list[int]:
    """After which steps of a run there is a check: every so many, and after the last."""
    return list(dict.fromkeys([*range(every, steps + 1, every), steps]))


def _spread_out(due: Sequence[int], count: int) -> list[int]:
    """So many of the steps, the last among them, evenly over their list."""
    if count >= len(due):
        return list(due)
    return [due[len(due) - 1 - round(k * len(due) / count)] for k in reversed(range(count))]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
        if not state["plan"].keys() == Plan.__dataclass_fields__.keys():
            raise ValueError("its plan has other keys")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SrpoError(
            f"{path} cannot be read ({one_line(error)}): remove it, and the run goes on without a guard"
        ) from error
    return state


class Guard:
    """Watches one run. All ranks are told the same figures and come to the same conclusions.

    Args:
        config: of the run.
        plan: what it may spend; one without calibration leaves it inactive.
        figures: measures pictures.
        panel: a few held-out prompts.
        batch: rollouts of a step.
        folder: of the run.
        ranks: the processes.
        say: where lines for the user go.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        figures: Figures,
        panel: Sequence[str],
        batch: int,
        folder: RunFolder,
        ranks: Ranks,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.plan, self.figures = config, plan, figures
        self._panel_prompts = len(panel) if len(panel) >= _LEAST_PANEL else 0
        self.panel = [prompt for prompt in panel[: self._panel_prompts] for _ in range(_PANEL_NOISES)]
        self.folder, self.ranks, self.say = folder, ranks, say
        self._independent = batch // config.algorithm.group
        self.watch: Watch | None = None
        self.best: Place | None = None
        self.stopped = False
        self.seconds = 0.0
        """What the guard itself took."""
        self.seconds_beside = 0.0
        """What of it was not part of a step."""
        self._places: list[Place] = []
        self._mixture: Discriminant | None = None
        self._calibrated: dict[str, list[list[float]]] = {}
        self._base_panel: Tensor | None = None

    @contextmanager
    def timed(self, beside: bool = False) -> Iterator[None]:
        """Count what is done here as the guard's own time, ``beside`` the steps or within one."""
        started = self._now()
        try:
            yield
        finally:
            seconds = self._now() - started
            self.seconds += seconds
            self.seconds_beside += seconds * beside

    def _now(self) -> float:
        """The time when all that was asked for has been computed."""
        if self.ranks.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    # --- calibration ----------------------------------------------------------------------------------------------

    def calibrate(self, base: Tensor, asked: Tensor, draw: Draw) -> None:
        """Set the corridors by what the untrained model draws.

        Args:
            base, asked: figures of its pictures without and with the positive word, (N, K) each: those of ``figures``,
                then the gap as it is measured of rollouts.
            draw: draws the panel.
        """
        self._calibrated = {"base": base.tolist(), "asked": asked.tolist()}
        signals = self._signals(base.double().numpy(), asked.double().numpy())
        if self.plan.panel and self.panel:
            signals += self._begin_panel(draw)
        self._watch(signals)
        axes = [signal.name for signal in signals if signal.axis]
        word = self.figures.words.positive[0]
        if not axes:
            self.say(f"guard: asked for {word!r} the base model draws much the same: checkpoints are not ranked")

    def _signals(self, base: np.ndarray, asked: np.ndarray) -> list[Signal]:
        names = [*self.figures.names, GAP]
        columns = {name: (base[:, i], asked[:, i]) for i, name in enumerate(names)}
        look = [np.stack([columns[name][kind] for name in STATISTICS], 1) for kind in (0, 1)]
        self._mixture = Discriminant.between(*look)
        signals = [
            Signal.between(name, "look", *columns[column], bad=_BAD.get(name, "either"))
            for name, column in _LOOK.items()
        ]
        signals.append(self._as_axis(Signal.between(_WHOLE_LOOK, "look", *Discriminant.held_out(*look))))
        relative = self.config.algorithm.compares_words
        for name in names:
            _, _, kind = name.rpartition("/")
            if kind == GAP:
                signal = Signal.between(name, "words", *columns[name], trained=relative and name == GAP)
                signals.append(signal if name == GAP else self._as_axis(signal))
            elif kind == CAPTION_MARGIN:
                trained = self.config.algorithm.holds_captions and name == CAPTION_MARGIN
                signals.append(Signal.between(name, "content", *columns[name], trained=trained, bad="low"))
            elif kind == REWARD:  # how far it goes the way that asked pictures go says little
                trained = not relative and name == REWARD
                signals.append(Signal.between(name, "reward", *columns[name], trained=trained, bad="back"))
        return [signal for signal in signals if signal.spread]  # of one that never varies nothing can be said

    @staticmethod
    def _as_axis(signal: Signal) -> Signal:
        return replace(signal, axis=signal.tells)

    def _watch(self, signals: Sequence[Signal]) -> None:
        guard = self.config.guard
        checks = {
            "rollouts": len(due_steps(max(self.plan.steps, self.config.train.steps), self.plan.every)),
            "panel": max(1, len(self.plan.panel)),
        }
        tests = sum(checks[signal.source] * len(signal.sides) for signal in signals)
        by_name = {signal.name: signal for signal in signals}
        fresh = self.config.rollout.replay + 1
        # An average takes every update in, of which a step may have several.
        updates = self.config.algorithm.pairs if self.config.algorithm.update == "pair" else 1
        decay = (self.config.train.ema or 0.0) ** updates
        width = max(self.plan.every, _TREND * fresh)
        given = self.config.rollout.source == "pictures"
        self.watch = Watch(by_name, guard.reach, guard.alpha, self.plan.every, tests, width, decay, given)

    # --- the panel ------------------------------------------------------------------------------------------------

    def _begin_panel(self, draw: Draw) -> list[Signal]:
        """Look at what the untrained model makes of the panel, without and with the positive word."""
        self._base_panel, _ = self._draw_panel(draw, self.panel)
        prompts = self.figures.words.asked(self.panel[::_PANEL_NOISES])
        asked, _ = self._draw_panel(draw, [prompt for prompt in prompts for _ in range(_PANEL_NOISES)])
        with self.ranks.together():
            if self.ranks.leads:
                write_atomically(self.folder.path / PANEL, save({"base": self._base_panel}))
        # Pictures of one prompt are not independent: one figure for each prompt.
        moved = _by_prompt(_rms(asked - self._base_panel))
        spread = _diversity(self._base_panel), _diversity(asked)
        signals = [
            Signal.between("base_distance", "panel", torch.zeros(len(moved)), moved, source="panel", bad="high"),
            Signal.between("diversity", "panel", *spread, source="panel", bad="low"),
        ]
        return [replace(signals[0], spread=moved.std().item()), signals[1]]

    def _see_panel(self, step: int, draw: Draw) -> None:
        now, rows = self._draw_panel(draw, self.panel)
        means = {"base_distance": _rms(now - self._base_panel).mean(), "diversity": _diversity(now).mean()}
        self.watch.note(step, self._panel_prompts, {name: mean.item() for name, mean in means.items()})
        if self.config.rollout.source == "pictures":  # which are not the model's own
            figures = dict(zip(self.figures.names, rows.double().mean(0).tolist(), strict=True))
            self.note(step, figures, self._panel_prompts)

    def _draw_panel(self, draw: Draw, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Thumbnails (N, 3, h, w) and figures (N, K) of what is drawn for ``prompts``; each rank draws its share."""
        own = list(self.ranks.share(len(prompts)))
        share = []
        with self.ranks.together():  # none waits for the pictures of one that has failed
            for part, images in draw([prompts[i] for i in own], own):
                size = [min(edge, _THUMBNAIL) for edge in images.shape[-2:]]
                thumbnails = F.interpolate(images.float(), size, mode="area").cpu()
                share.append((thumbnails, self.figures.measure(images, [self.panel[i] for i in own[part]]).cpu()))
        drawn = [one for of_rank in self.ranks.gather(share) for one in of_rank]
        return torch.cat([thumbnails for thumbnails, _ in drawn]), torch.cat([rows for _, rows in drawn])

    def measure(self, images: Tensor, prompts: Sequence[str], rewards: Sequence[Tensor]) -> Tensor:
        """Figures of fresh rollouts' pictures, see :meth:`Figures.measure`."""
        with self.timed():
            return self.figures.measure(images, prompts, rewards)

    # --- watching -------------------------------------------------------------------------------------------------

    def note(self, step: int, figures: Mapping[str, float], count: int | None = None) -> None:
        """Take the mean figures of the pictures of the model as it is after ``step`` updates."""
        if not self.watch:
            return
        own = {name: figures[_LOOK.get(name, name)] for name in self.watch.signals if _LOOK.get(name, name) in figures}
        look = float(self._mixture([figures[name] for name in STATISTICS]))
        self.watch.note(step, count or self._independent, {**own, _WHOLE_LOOK: look})

    def is_due(self, step: int, last: bool) -> bool:
        """Whether there is a check after so many steps, the ``last`` of the run or not."""
        return self.watch is not None and (last or step % self.plan.every == 0)

    def wants_panel(self, step: int) -> bool:
        """Whether the check after so many steps draws the panel, which needs the weights of all ranks."""
        return self._base_panel is not None and step in self.plan.panel

    def check(self, step: int, draw: Draw | None = None) -> bool:
        """Test all signals, tell what crosses for the first time, and say whether the run should end.

        ``draw`` is for the panel, where :meth:`wants_panel` it.
        """
        with self.timed(beside=True):
            if draw:
                self._see_panel(step, draw)
            for signal in self.watch.check(step):
                self.say(f"guard: at step {step} {self._told(signal)}")
        collapsed = self.watch.collapsed
        if collapsed and collapsed["step"] == step:
            self.say(f"guard: collapsed at step {step}: {', '.join(collapsed['signals'])} are out of their corridors")
        self.stopped = bool(collapsed) and self.config.guard.action == "stop"
        return self.stopped

    def _told(self, signal: Signal) -> str:
        """How far a signal was out of its corridor at the last check."""
        check, (low, high) = self.watch.checks[-1], signal.corridor(self.watch.reach)
        value = check["values"][signal.name]
        side, limit = ("below", low) if value < low else ("above", high)
        errors = f"{check['z'][signal.name]:.1f} standard errors"
        return f"{signal.name} ({signal.family}) is {value:.3f}, {errors} {side} its corridor's {limit:.3f}"

    def rank(self, checkpoints: Sequence[int], ended: bool = False) -> Place | None:
        """The best of the checkpoints of these steps; None where none is known to be better than the base model.

        Of a run that has ``ended``, and not collapsed, it is the last one unless another is clearly better.
        """
        if self.watch:
            self._places = self.watch.rank(checkpoints)
            self.best = self.watch.best(checkpoints, keep_last=ended and not self.watch.collapsed)
        return self.best

    @property
    def has_ranked(self) -> bool:
        """Whether the last :meth:`rank` knew where checkpoints are."""
        return bool(self._places)

    # --- where it stands ------------------------------------------------------------------------------------------

    def to_json(self, seconds: float) -> dict[str, Any]:
        """What a page tells of the run, which took so many ``seconds``."""
        guard, words = self.config.guard, self.config.control_words
        return {
            "version": 1,
            "action": guard.action,
            "plan": asdict(self.plan),
            "words": {"positive": list(words.positive), "negative": list(words.negative)},
            "pictures": {
                "calibration": len(self._calibrated["base"]),
                "panel": len(self.panel) * (self._base_panel is not None),
            },
            **self.watch.to_json(),
            "checkpoints": [place._asdict() for place in self._places],
            "best": self.best._asdict() if self.best else None,
            "collapsed": self.watch.collapsed,
            "stopped": self.watch.collapsed if self.stopped else None,
            "cost": {
                "seconds": self.seconds,
                "beside": self.seconds_beside,
                "share": self.seconds / seconds if seconds else 0.0,
            },
            "calibration": self._calibrated,
        }

    def write(self, seconds: float) -> None:
        """Keep what is known, for a page and for a run that goes on; on rank 0."""
        if self.watch and self.ranks.leads:
            self.folder.write_json(GUARD, self.to_json(seconds))

    def restore(self, step: int) -> None:
        """Come to where the run stood after ``step`` steps, without a word; inactive where it was."""
        if not self.plan.calibration:
            return
        with self.ranks.together():
            read = self._read() if self.ranks.leads else None
        state, self._base_panel = self.ranks.from_rank_0(read)
        self._calibrated, cost = state["calibration"], state["cost"]
        self.seconds, self.seconds_beside = cost["seconds"], cost["beside"]
        base, asked = (np.array(self._calibrated[kind]) for kind in ("base", "asked"))
        fields = Signal.__dataclass_fields__
        panel = [Signal(**{key: one[key] for key in fields}) for one in state["signals"] if one["source"] == "panel"]
        self._watch([*self._signals(base, asked), *panel])
        self.watch.restore(state, step, step if self.config.rollout.source == "pictures" else step - 1)
        collapsed = self.watch.collapsed
        self.stopped = collapsed is not None and self.config.guard.action == "stop"

    def _read(self) -> tuple[dict[str, Any], Tensor | None]:
        panel = self.folder.path / PANEL
        try:
            base = load_file(panel)["base"] if panel.is_file() else None
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise SrpoError(
                f"{panel} cannot be read ({one_line(error)}): remove it, and the run goes on without its panel"
            ) from error
        return _read_json(self.folder.path / GUARD), base


def make_guard(
    config: TrainConfig,
    plan: Plan,
    parts: Parts,
    prompts: Sequence[str],
    panel: Sequence[str],
    batch: int,
    folder: RunFolder,
    ranks: Ranks,
    say: Callable[[str], None],
    announce: Callable[[str], None] | None = None,
) -> Guard:
    """The guard of a run with the rewards that it watches; ``prompts`` are all whose pictures it will see.

    Other arguments as for :class:`Guard`, and ``announce`` as for :func:`srpo_cli.recipes.parts.load_reward`.
    """
    dtype = torch.float32 if ranks.device.type == "cpu" else getattr(torch, config.model.dtype)
    names = _judges(config, parts) if plan.calibration else ()
    judges = {name: load_reward(name, None, ranks.device, dtype, announce).via("training") for name in names}
    figures = Figures(parts.reward, judges, parts.algorithm.control_words, prompts, parts.model.granularity)
    return Guard(config, plan, figures, panel, batch, folder, ranks, say)


def _judges(config: TrainConfig, parts: Parts) -> Sequence[str]:
    """Names of the rewards to watch."""
    if config.guard.rewards != "auto":
        return config.guard.judges
    idle = parts.knows_only_the_world and _MINIATURE_JUDGE not in config.reward.parts
    return (_MINIATURE_JUDGE,) if idle else ()


def _rms(difference: Tensor) -> Tensor:
    """Root mean square of each picture, (N, 3, h, w) -> (N,)."""
    return difference.square().mean((1, 2, 3)).sqrt()


def _by_prompt(figures: Tensor) -> Tensor:
    """Means over the pictures of each prompt, (N,) -> (N / 2,)."""
    return figures.view(-1, _PANEL_NOISES).mean(1)


def _diversity(pictures: Tensor) -> Tensor:
    """How far apart the pictures of each prompt are, (N, 3, h, w) -> (N / 2,)."""
    return _rms(pictures[::_PANEL_NOISES] - pictures[1::_PANEL_NOISES])
