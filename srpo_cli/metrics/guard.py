"""When training has gone too far: corridors, crossings and a ranking, by what training does not optimise.

The untrained model says itself which way to go. Drawn for a prompt it gives *base* pictures; asked for the positive
word in so many words it gives *asked* ones, and every figure of a picture has a mean over either. From the one to the
other, and some way beyond, is the figure's corridor. A method that hacks its reward leaves corridors: at the base's end
(a plain reward that drives pictures away from what was asked for), or at the other (a relative reward that overshoots).
The same two means make an axis, 0 at the base and 1 at the asked pictures, on which checkpoints are ranked.

A method of this project, not of arXiv:2509.06942.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

Family = Literal["look", "words", "content", "reward", "panel"]

_SHRINKAGE = 0.3
_LEAST_SEPARATION = 4.0  # standard errors between base and asked pictures; an axis of less is mostly noise
_FAMILIES_THAT_STOP = 2
_LEAST_SERIES = 8  # steps: how much they differ is known too badly from fewer, for limits so far out
_CLEAR = 0.1  # of the way: a smaller difference may be chance


@dataclass(frozen=True)
class Signal:
    """A figure of pictures that is watched.

    Args:
        name: what records and messages call it.
        family: what it is about. Signals of one family move together, so that two of them are one piece of evidence.
        base, asked: its means over pictures of the untrained model, drawn for the prompts, and for the prompts with
            the positive word.
        spread: its standard deviation between pictures, of base or asked ones, whichever is larger.
        count: independent pictures behind each of the two means.
        source: "rollouts", or "panel" for what is measured on held-out prompts.
        trained: whether the run optimises it.
        axis: whether checkpoints are ranked by it.
        bad: which way out of its corridor is a bad sign; "back" is the one at the base's end, away from where it leads.
    """

    name: str
    family: Family
    base: float
    asked: float
    spread: float
    count: int
    source: Literal["rollouts", "panel"] = "rollouts"
    trained: bool = False
    axis: bool = False
    bad: Literal["either", "high", "low", "back"] = "either"

    @classmethod
    def between(cls, name: str, family: Family, base: ArrayLike, asked: ArrayLike, **facts: Any) -> Signal:
        """From a figure of base and asked pictures, (N,) each."""
        base, asked = np.asarray(base, float), np.asarray(asked, float)
        spread = max(base.std(ddof=1), asked.std(ddof=1))  # pictures to come may be like either
        return cls(name, family, float(base.mean()), float(asked.mean()), float(spread), len(base), **facts)

    def corridor(self, reach: float) -> tuple[float, float]:
        """Lowest and highest mean on the way from the base to ``reach`` times the asked pictures."""
        end = self.base + reach * (self.asked - self.base)
        return min(self.base, end), max(self.base, end)

    @property
    def error(self) -> float:
        """Standard error of either mean."""
        return self.spread / math.sqrt(self.count)

    @property
    def sides(self) -> tuple[Literal["low", "high"], ...]:
        """The ways out of its corridor that are bad signs."""
        if self.bad == "back":
            return ("low",) if self.asked >= self.base else ("high",)
        return ("low", "high") if self.bad == "either" else (self.bad,)

    def outside(self, mean: float, reach: float) -> float:
        """How far a mean is out of the corridor for the bad, in its unit; 0 within, nan where ``mean`` is."""
        if math.isnan(mean):
            return math.nan
        low, high = self.corridor(reach)
        return max(0.0, *({"low": low - mean, "high": mean - high}[side] for side in self.sides))

    def progress(self, mean: float) -> float:
        """Where a mean is on the way: 0 at the base, 1 at the asked pictures."""
        return (mean - self.base) / (self.asked - self.base)

    @property
    def precision(self) -> float:
        """Of the :meth:`progress` of one picture, which is the inverse of its variance."""
        return ((self.asked - self.base) / self.spread) ** 2 if self.spread else 0.0

    @property
    def tells(self) -> bool:
        """Whether base and asked pictures differ enough to make an axis."""
        return self.precision * self.count / 2 > _LEAST_SEPARATION**2

    def to_json(self, reach: float) -> dict[str, Any]:
        """All of it, with the corridor as ``low`` and ``high``."""
        low, high = self.corridor(reach)
        return {**asdict(self), "low": low, "high": high}


class Discriminant(NamedTuple):
    """The mixture of several figures that tells base from asked pictures best."""

    weights: NDArray[np.float64]
    offset: float

    @classmethod
    def between(cls, base: ArrayLike, asked: ArrayLike) -> Discriminant:
        """Fisher's discriminant, 0 at the mean of the base pictures' figures and 1 at that of the asked ones'.

        ``base`` and ``asked`` are (N, K). The covariance within is shrunk towards its diagonal, because N is small.
        """
        base, asked = np.asarray(base, float), np.asarray(asked, float)
        covariance = (np.cov(base.T) + np.cov(asked.T)) / 2
        scale = np.sqrt(np.diag(covariance).clip(1e-12))
        correlation = covariance / np.outer(scale, scale)
        within = (1 - _SHRINKAGE) * correlation + _SHRINKAGE * np.eye(len(scale))
        way = (asked.mean(0) - base.mean(0)) / scale
        direction = np.linalg.solve(within, way)
        weights = direction / max(direction @ way, 1e-12) / scale
        return cls(weights, float(-weights @ base.mean(0)))

    def __call__(self, figures: ArrayLike) -> NDArray[np.float64]:
        """(..., K) -> (...)."""
        return np.asarray(figures, float) @ self.weights + self.offset

    @classmethod
    def held_out(cls, base: ArrayLike, asked: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What pictures that it has not been fitted to score, (N,) of either kind: each by the fit to all others.

        A mixture of many figures finds differences in the pictures that it is fitted to which others do not have.
        """
        kinds = np.asarray(base, float), np.asarray(asked, float)
        scores = np.empty(len(kinds[0])), np.empty(len(kinds[1]))
        for kind in (0, 1):
            for left_out in range(len(kinds[kind])):
                others = list(kinds)
                others[kind] = np.delete(kinds[kind], left_out, 0)
                scores[kind][left_out] = cls.between(*others)(kinds[kind][left_out])
        return scores


class Variance(NamedTuple):
    """An estimate of a variance, and the degrees of freedom that it has."""

    value: float
    freedom: float

    def __add__(self, other: Variance) -> Variance:
        """Of the sum of two independent things, by Welch and Satterthwaite."""
        total = self.value + other.value
        if not total:
            return Variance(0.0, min(self.freedom, other.freedom))
        return Variance(total, total**2 / (self.value**2 / self.freedom + other.value**2 / other.freedom))


def scatter(values: ArrayLike) -> Variance:
    """Of one of two or more values in a series about its slow course: half the mean square of successive differences.

    Von Neumann's estimator, which a drift hardly moves. Its values need not be independent pictures: those of a step
    that share a noise are alike, so that their mean varies more than their number says.
    """
    values = np.asarray(values, float)
    count = len(values)
    return Variance(float(np.square(np.diff(values)).mean() / 2), 2 * (count - 1) ** 2 / (3 * count - 4))


def threshold(alpha: float, tests: int, freedom: float) -> float:
    """Standard errors out of its corridor at which a signal has crossed.

    With so many ``tests`` in a run (bad sides of signals, times checks) the probability that any of them crosses while
    nothing is trained is at most ``alpha``: by Bonferroni's inequality, for means that are normal and errors that are
    estimated with ``freedom`` degrees of freedom. Untrained pictures are at one end of every corridor.
    """
    return float(student.isf(alpha / tests, freedom))


def has_collapsed(crossed: Iterable[Signal]) -> bool:
    """Whether what has crossed at one check is evidence enough to stop: two families, for one may be a fluke."""
    return len({signal.family for signal in crossed}) >= _FAMILIES_THAT_STOP


def _known(notes: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, int]]:
    """Mean and number of pictures of a signal in the notes that have it; a figure that is no number is none."""
    found = ((note["means"].get(name, math.nan), note["count"]) for note in notes)
    return [(mean, count) for mean, count in found if math.isfinite(mean)]


def trend(steps: ArrayLike, values: ArrayLike, at: float, width: int) -> float:
    """A noisy series at one step: a straight line through what lies within ``width`` steps of it, read off there.

    Where the series ends sooner after ``at``, the line begins as much earlier. nan with fewer than two values.
    """
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    if not len(steps):
        return math.nan
    missing = min(max(0.0, at + width - steps.max()), width)
    near = (steps >= at - width - missing) & (steps <= at + width)
    x, y = steps[near] - at, values[near]
    return float(np.polyfit(x, y, 1)[-1]) if len(set(x)) > 1 else math.nan


class Place(NamedTuple):
    """How far a checkpoint is along each axis, and how far from the end of the way, short of it or past it.

    The distance is a mean over the axes by their precision.
    """

    step: int
    distance: float
    axes: dict[str, float]


@dataclass
class Watch:
    """Follows the signals of one run; given the same notes it comes to the same conclusions.

    Args:
        signals: what is watched, by name.
        reach: how far it is right to go, 1 at the asked pictures.
        alpha: probability of any warning in a run in which nothing is trained.
        every: steps between checks, each of what was noted since the last.
        tests: bad sides of signals, times checks of the run as it is planned.
        width: steps to either side that are looked at for where a checkpoint is.
        given: whether rollouts are given pictures, so that all that is noted are looks at the panel.
        decay: from step to step of the average of weights that a checkpoint is for; 0: it is for those of its step,
            which draw the pictures.
    """

    signals: Mapping[str, Signal]
    reach: float
    alpha: float
    every: int
    tests: int
    width: int = 5
    decay: float = 0.0
    given: bool = False
    notes: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    collapsed: dict[str, Any] | None = None

    @property
    def _tested(self) -> int:
        """How many notes have had their check."""
        return self.checks[-1]["tested"] if self.checks else 0

    def note(self, step: int, count: int, means: Mapping[str, float]) -> None:
        """Take means of ``count`` independent pictures of the model as it is after ``step`` updates of the run."""
        self.notes.append({"step": step, "count": count, "means": dict(means)})

    def check(self, step: int) -> list[Signal]:
        """Test every signal that was noted since the last check; returns those that cross for the first time."""
        recent = self.notes[self._tested :]
        values, outside, crossed = {}, {}, []
        for name, signal in self.signals.items():
            earlier, own = (_known(notes, name) for notes in (self.notes[: self._tested], recent))
            if not own:
                continue
            count = sum(n for _, n in own)
            values[name] = sum(mean * n for mean, n in own) / count
            variance = self._variance(signal, [mean for mean, _ in earlier], len(own), count)
            if variance is None:
                continue
            outside[name] = signal.outside(values[name], self.reach) / math.sqrt(variance.value)
            if outside[name] > threshold(self.alpha, self.tests, variance.freedom):
                crossed.append(signal)
        names = [signal.name for signal in crossed]
        self.checks.append({"step": step, "values": values, "z": outside, "crossed": names, "tested": len(self.notes)})
        if self.collapsed is None and has_collapsed(crossed):
            self.collapsed = {"step": step, "signals": names}
        told = {warning["signal"] for warning in self.warnings}
        new = [signal for signal in crossed if signal.name not in told]
        for signal in new:
            low, high = signal.corridor(self.reach)
            self.warnings.append(
                {"step": step, "signal": signal.name, "value": values[signal.name], "low": low, "high": high}
            )
        return new

    def _variance(self, signal: Signal, earlier: Sequence[float], steps: int, count: int) -> Variance | None:
        """Of the difference between a mean of so many ``steps`` and pictures and one of the calibration.

        Steps are the independent unit. They are taken to differ as the ``earlier`` ones of the run did, since a
        collapse would hide in what it adds to the differences itself, but never less than so many independent pictures
        would. None where earlier steps are too few. Looks at the panel are of prompts, which are independent.
        """
        known = Variance(signal.error**2, signal.count - 1)
        least = Variance(signal.spread**2 / count, signal.count - 1)
        if signal.source == "panel" or self.given:
            return least + known
        if len(earlier) < _LEAST_SERIES:
            return None
        value, freedom = scatter(earlier)
        return max(Variance(value / steps, freedom), least) + known

    def rank(self, checkpoints: Sequence[int]) -> list[Place]:
        """Where the checkpoints of these steps are; without an axis, or pictures near one, nowhere."""
        axes = [signal for signal in self.signals.values() if signal.axis]
        places = []
        for step in checkpoints:
            progress = {signal.name: signal.progress(self._trend(signal.name, step)) for signal in axes}
            known = [signal for signal in axes if not math.isnan(progress[signal.name])]
            if known:
                away = [abs(progress[signal.name] - self.reach) for signal in known]
                weights = [signal.precision for signal in known]
                places.append(Place(step, float(np.average(away, weights=weights)), progress))
        return places

    def _trend(self, name: str, step: int) -> float:
        known = [(note["step"], note["means"].get(name, math.nan)) for note in self.notes]
        known = [(at, mean) for at, mean in known if math.isfinite(mean)]
        # Where weights that move evenly have their average.
        behind = self.decay * (1 - self.decay**step) / (1 - self.decay)
        return trend([at for at, _ in known], [mean for _, mean in known], step - behind, self.width)

    def best(self, checkpoints: Sequence[int], keep_last: bool = False) -> Place | None:
        """The checkpoint nearest to the end of the way; None where none is clearly nearer than the untrained model.

        With ``keep_last`` it is the last one, unless another is clearly nearer.
        """
        places = self.rank(checkpoints)
        nearest = min(places, key=lambda place: place.distance, default=None)
        if nearest is None or nearest.distance > self.reach - _CLEAR:  # the untrained model is at 0
            return None
        last = max(places, key=lambda place: place.step)
        return last if keep_last and last.distance <= nearest.distance + _CLEAR else nearest

    def to_json(self) -> dict[str, Any]:
        """All of it, for :meth:`restore` and for a page: notes as a column for each signal of the rollouts."""
        names = {source: [n for n, s in self.signals.items() if s.source == source] for source in ("rollouts", "panel")}
        of = {source: [note for note in self.notes if {*own} & {*note["means"]}] for source, own in names.items()}
        series = {name: [note["means"].get(name) for note in of["rollouts"]] for name in names["rollouts"]}
        marks = {key: [note[key] for note in of["rollouts"]] for key in ("step", "count")}
        return {
            "reach": self.reach,
            "alpha": self.alpha,
            "every": self.every,
            "tests": self.tests,
            "width": self.width,
            "decay": self.decay,
            "signals": [signal.to_json(self.reach) for signal in self.signals.values()],
            "series": {**marks, **series},
            "panel": [{"step": note["step"], "count": note["count"], **note["means"]} for note in of["panel"]],
            "checks": self.checks,
            "warnings": self.warnings,
            "collapsed": self.collapsed,
        }

    def restore(self, state: Mapping[str, Any], step: int, newest: int) -> None:
        """Go on from :meth:`to_json` as it was after ``step`` steps and their check, where one was due.

        ``newest`` is the last step whose model's rollouts, or what stands for them, had been noted by then.
        """
        rows = [dict(zip(state["series"], row, strict=True)) for row in zip(*state["series"].values(), strict=True)]
        panel = [row for row in state["panel"] if row["step"] <= step]
        rows = [*panel, *(row for row in rows if row["step"] <= newest)]
        for row in sorted(rows, key=lambda row: row["step"]):  # a panel comes before the rollouts that follow it
            means = {name: row[name] for name in self.signals if row.get(name) is not None}
            self.note(row["step"], row["count"], means)
        self.checks = [check for check in state["checks"] if check["step"] <= step]
        self.warnings = [warning for warning in state["warnings"] if warning["step"] <= step]
        collapsed = state["collapsed"]
        self.collapsed = collapsed if collapsed and collapsed["step"] <= step else None
