"""Which control words a reward reads, on the pictures at hand: ask before a training run depends on them.

What a word does to a picture is its *shift*: the reward for the prompt with the word minus that without. A word that
shifts all pictures alike cannot tell them apart, however far it shifts them; a pair of words whose shifts go together
has no gap; and a word that the reward does not understand shifts by whatever its syllables happen to do.

How a word that is understood is told from one that is not, was chosen on the miniature's reward, whose vocabulary is
known: 8 style words of its captions against 25 real words that it never saw and 19 made-up ones, on renders of which
the true style is known: 12 draws of 24 out of 40 prompts, the same words for choosing and for these figures. The
chance that a known word is ranked above an unseen one (AUC) is

    criterion                                          five styles mixed     no style at all
    size of the mean shift                                   0.71                 0.76
    spread of the shift over the pictures                    0.97                 0.76
    agreement of two templates, over the pictures            0.95                 0.74
    agreement of prompts, over the pictures                  1.00                 0.98

so *agreement* it is: the correlation, over the pictures, of the shift under a picture's own prompt with the mean shift
under others' prompts. A word with a meaning finds the same pictures photographic whatever else the prompt says. The
floor is the 95 % point of the agreement of made-up words (Fisher's z). With 24 pictures 90 to 100 % of the known words
pass it and 4 to 7 % of the unseen ones, with 8 pictures 74 to 99 % and 5 to 8 %. Pictures that do not differ in what a
word means cannot show that it is understood: words of light on pictures in one light reach an AUC of 0.86 only. Nor can
pictures without prompts, 0.55 to 0.94 depending on what the text is compared with, or with one prompt for all, 0.86:
with fewer than eight different prompts it is left open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srpo_cli.algorithms.base import ControlWords
from srpo_cli.errors import UsageError
from srpo_cli.metrics.intervals import mean_interval
from srpo_cli.rewards.base import Reward

FEWEST_PICTURES = 3
"""Below it neither an interval nor a correlation means anything."""

FEW_PICTURES = 8
"""Below it the intervals are said to be wide, and more than a quarter of the words that are understood go unnoticed."""

MADE_UP = (
    *(
        "blorvek",
        "snirtal",
        "quenvish",
        "draploom",
        "mustrivan",
        "felkorb",
        "zintrup",
        "glavendor",
        "prish",
        "tuvermal",
    ),
    *("klonti", "sworb", "hurn", "pelm", "yastrow", "vind", "crothal", "brem", "oldu"),
)
"""Words without a meaning, of four to nine letters as words have: what a reward does to them is noise."""

OTHER_PROMPTS = 4
"""Prompts of other pictures that a word is tried with. Two are nearly as good (AUC 0.97 for 0.98), eight no better."""

_BATCH = 16
_NORMAL_95 = 1.645  # one-sided
_NORMAL_95_BOTH = 1.960

Row = dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Calibration:
    """What a reward does with control words, on some pictures.

    Attributes:
        reward, unit: which reward, and what one number of it is.
        template: how a word is put to a prompt.
        pictures: how many there were.
        words: one row for each word, sorted by shift: ``word``, ``side`` ("positive" or "negative"), ``shift`` with
            ``shift_low`` and ``shift_high`` (mean over the pictures and its 95 % bootstrap interval), ``shift_sd``
            (in standard deviations of the plain reward over the pictures), ``direction`` ("up", "down", or "as noise"
            where the shift is one that made-up words have), ``spread`` (standard deviation of the shift over the
            pictures), ``quality`` (correlation of the shift with the plain reward), ``agreement`` (see the module)
            and ``understood``; the last two None with fewer than eight different prompts.
        pairs: one row for each positive with each negative word: ``positive``, ``negative``, ``gap`` with ``gap_low``
            and ``gap_high`` (mean difference of the rewards and its interval), ``spread``, ``win_rate`` (share of the
            pictures whose gap is above zero) and ``redundancy``, the correlation of both shifts.
        redundancy: one row for every two words: ``first``, ``second``, ``redundancy``.
        noise: the shifts between which 95 % of made-up words lie.
        floor: agreement that a word must exceed to count as understood; None with too few different prompts.
        notes: what to know besides.
    """

    reward: str
    unit: str
    template: str
    pictures: int
    words: list[Row]
    pairs: list[Row]
    redundancy: list[Row]
    noise: tuple[float, float]
    floor: float | None
    notes: tuple[str, ...] = ()

    def summary(self) -> list[str]:
        """Lines for people: what to leave, what to use."""
        lost = [str(row["word"]) for row in self.words if row["understood"] is False]
        usable = [row for row in self.pairs if row["positive"] not in lost and row["negative"] not in lost]
        lines = [f"not understood by {self.reward}, as far as these pictures show: {', '.join(lost)}"] if lost else []
        if usable:
            best = max(usable, key=lambda row: row["spread"])
            lines.append(
                f"the pair that tells these pictures apart best: {best['positive']} / {best['negative']} "
                f"(mean gap {best['gap']:+.3g}, spread {best['spread']:.3g})"
            )
        else:
            lines.append("no pair of a positive and a negative word has both understood: try more frequent words")
        return [*lines, *self.notes]

    def save_picture(self, path: Path) -> None:
        """Draw the shifts with their intervals, and the redundancy of every two words, as a PNG."""
        _draw(self, path)


@torch.no_grad()
def calibrate(reward: Reward, pictures: Sequence[Tensor], prompts: Sequence[str], words: ControlWords) -> Calibration:
    """Measure what each control word does to this reward on these pictures.

    Costs one vision pass per picture and one text pass for each word and made-up word with each prompt where the reward
    keeps features (see ``Reward.scores``); else 5 times (words + 20) calls per picture.

    Args:
        reward: one that reads text.
        pictures: at least ``FEWEST_PICTURES``, (3, H, W) in [0, 1], each of its own size. Of the kind that is to be
            trained: what a word moves depends on them.
        prompts: N texts without control words; empty where there is none, then the text is the word alone and the
            plain reward that of the empty text.
        words: the words and how they are put to a prompt. A word given on both sides counts as positive.

    Raises UsageError for too few pictures, or a reward that reads no text.
    """
    if not reward.reads_text:
        raise UsageError(f"reward {reward.name} reads no text, so there are no words to calibrate: choose another")
    if len(pictures) < FEWEST_PICTURES or len(pictures) != len(prompts):
        raise UsageError(
            f"--calibrate got {len(pictures)} pictures with {len(prompts)} prompts: "
            f"it needs {FEWEST_PICTURES} or more, {FEW_PICTURES} for intervals worth reading"
        )
    names = list(dict.fromkeys(words.all))
    plain, shifts, others = _measure(reward, pictures, prompts, words, [*names, *MADE_UP])
    noise_shifts = torch.stack([shifts[word] for word in MADE_UP]).mean(1)
    centre, reach = noise_shifts.mean().item(), _NORMAL_95_BOTH * noise_shifts.std().item()
    noise = (centre - reach, centre + reach)
    prompted = len(_different(prompts)) >= FEW_PICTURES
    agreements = {word: _correlation(shifts[word], others[word]) if prompted else None for word in shifts}
    floor = _floor([agreements[word] for word in MADE_UP]) if prompted else None
    rows = [
        _word_row(word, word in words.positive, plain, shifts[word], agreements[word], noise, floor) for word in names
    ]
    return Calibration(
        reward=reward.name,
        unit=reward.unit,
        template=words.template,
        pictures=len(pictures),
        words=sorted(rows, key=lambda row: row["shift"], reverse=True),
        pairs=[
            _pair_row(positive, negative, shifts)
            for positive, negative in product(dict.fromkeys(words.positive), dict.fromkeys(words.negative))
        ],
        redundancy=[
            {"first": first, "second": second, "redundancy": _correlation(shifts[first], shifts[second])}
            for first, second in combinations(names, 2)
        ],
        noise=noise,
        floor=floor,
        notes=_notes(prompts),
    )


def _notes(prompts: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if len(prompts) < FEW_PICTURES:
        notes.append(
            f"{len(prompts)} pictures: intervals are wide, words may be misjudged; give {FEW_PICTURES} or more"
        )
    different = len(_different(prompts))
    if not different:
        notes.append("no prompts: which words are understood cannot be told, and the text is the word alone")
    elif different < FEW_PICTURES:
        notes.append(
            f"{different} different prompts: {FEW_PICTURES} or more are needed to tell which words are understood"
        )
    return tuple(notes)


def _measure(
    reward: Reward, pictures: Sequence[Tensor], prompts: Sequence[str], words: ControlWords, names: list[str]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The plain reward, each word's shift, and its mean shift under other prompts, all (N,) in float64."""
    ring = _different(prompts) or [""]
    place = {prompt: i for i, prompt in enumerate(ring)}
    columns = [list(prompts)]
    for step in range(1, OTHER_PROMPTS + 1):
        columns.append([ring[(place.get(prompt, -1) + step) % len(ring)] for prompt in prompts])
    texts = [column if word is None else _texts(words, word, column) for word in (None, *names) for column in columns]
    parts = []
    for start in range(0, len(pictures), _BATCH):
        part = slice(start, start + _BATCH)
        batch = [picture.to(reward.device) for picture in pictures[part]]
        scores = reward.scores(batch, *(column[part] for column in texts))
        parts.append(torch.stack(scores).double().cpu())
    table = torch.cat(parts, 1).unflatten(0, (len(names) + 1, len(columns)))  # (words, prompts, pictures)
    plain, shifts = table[0], table[1:] - table[:1]
    own = dict(zip(names, shifts[:, 0], strict=True))
    return plain[0], own, dict(zip(names, shifts[:, 1:].mean(1), strict=True))


def _different(prompts: Sequence[str]) -> list[str]:
    """The different prompts in their order, empty ones left out."""
    return [prompt for prompt in dict.fromkeys(prompts) if prompt.strip()]


def _texts(words: ControlWords, word: str, prompts: list[str]) -> list[str]:
    """Each prompt with the word put to it; the word alone where there is no prompt."""
    return [words.texts(word, [prompt])[0] if prompt.strip() else word for prompt in prompts]


def _word_row(
    word: str,
    positive: bool,
    plain: Tensor,
    shift: Tensor,
    agreement: float | None,
    noise: tuple[float, float],
    floor: float | None,
) -> Row:
    mean, low, high = mean_interval(shift)
    deviation = plain.std().item()
    direction = "up" if low > noise[1] else "down" if high < noise[0] else "as noise"
    return {
        "word": word,
        "side": "positive" if positive else "negative",
        "shift": mean,
        "shift_low": low,
        "shift_high": high,
        "shift_sd": mean / deviation if deviation > 0 else None,
        "direction": direction,
        "spread": shift.std().item(),
        "quality": _correlation(shift, plain),
        "agreement": agreement,
        "understood": None if floor is None else agreement is not None and agreement > floor,
    }


def _pair_row(positive: str, negative: str, shifts: dict[str, Tensor]) -> Row:
    gap = shifts[positive] - shifts[negative]
    mean, low, high = mean_interval(gap)
    return {
        "positive": positive,
        "negative": negative,
        "gap": mean,
        "gap_low": low,
        "gap_high": high,
        "spread": gap.std().item(),
        "win_rate": (gap > 0).double().mean().item(),
        "redundancy": _correlation(shifts[positive], shifts[negative]),
    }


def _correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's; None where one of them does not vary beyond float32's last digits."""
    if min(a.std().item(), b.std().item()) < 1e-6 * max(a.abs().max().item(), b.abs().max().item(), 1e-6):
        return None
    return torch.corrcoef(torch.stack([a, b]))[0, 1].clamp(-1, 1).item()


def _floor(agreements: Sequence[float | None]) -> float:
    """The 95 % point of made-up words' agreements, as a normal distribution of Fisher's z."""
    z = torch.tensor([a or 0.0 for a in agreements], dtype=torch.float64).clamp(-0.999, 0.999).atanh()
    return math.tanh((z.mean() + _NORMAL_95 * z.std()).item())


_COLOURS = {"positive": "#1b6ca8", "negative": "#c4512d"}
_GREY = "#9a9a9a"


def _draw(calibration: Calibration, path: Path) -> None:
    """The picture of :meth:`Calibration.save_picture`; matplotlib takes a second to load, so only here."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    edge = 1.4 + 0.38 * max(len(calibration.words), 5)
    figure = Figure(figsize=(8 + edge, edge + 1), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    forest, heat = figure.subplots(1, 2, width_ratios=[8, edge])
    _draw_shifts(forest, calibration)
    _draw_redundancy(heat, calibration)
    figure.legend(*forest.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _colour(row: Row) -> str:
    return _GREY if row["understood"] is False else _COLOURS[row["side"]]


def _draw_shifts(axes: Any, calibration: Calibration) -> None:
    """One line per word, the largest shift on top: the mean, its interval, and its spread over the pictures behind."""
    rows = calibration.words[::-1]
    axes.axvspan(*calibration.noise, color="#000000", alpha=0.08, lw=0, label="95 % of made-up words")
    axes.axvline(0, color="#000000", lw=0.8)
    labelled = set()
    for place, row in enumerate(rows):
        colour, lost = _colour(row), row["understood"] is False
        label = "not understood" if lost else row["side"]
        spread = [row["shift"] - row["spread"], row["shift"] + row["spread"]]
        axes.plot(spread, [place, place], color=colour, alpha=0.22, lw=7, solid_capstyle="butt")
        axes.plot([row["shift_low"], row["shift_high"]], [place, place], color=colour, lw=2)
        shown = None if label in labelled else label
        axes.plot(row["shift"], place, "x" if lost else "o", color=colour, ms=6, ls="", label=shown)
        labelled.add(label)
    axes.set_yticks(range(len(rows)), [_word_label(row) for row in rows])
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(_colour(row))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"shift of {calibration.reward}" + (f" ({calibration.unit})" if calibration.unit else ""))
    axes.set_title(
        f"Shift by each word, {calibration.pictures} pictures\nline: 95 % interval, band: spread", fontsize=10
    )
    axes.grid(axis="x", alpha=0.25)


def _word_label(row: Row) -> str:
    mark = "+" if row["side"] == "positive" else "\u2212"
    word = _shortened(str(row["word"]), 28)
    return f"{word} (not understood)  {mark}" if row["understood"] is False else f"{word}  {mark}"


def _shortened(word: str, length: int) -> str:
    return word if len(word) <= length else word[: length - 1] + "\u2026"


def _draw_redundancy(axes: Any, calibration: Calibration) -> None:
    """Correlation of every two words' shifts, in the order of the shifts."""
    names = [str(row["word"]) for row in calibration.words]
    place = {name: i for i, name in enumerate(names)}
    table = torch.eye(len(names))
    for row in calibration.redundancy:
        i, j = place[row["first"]], place[row["second"]]
        value = math.nan if row["redundancy"] is None else row["redundancy"]
        table[i, j] = table[j, i] = value
    axes.imshow(table.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    short = [_shortened(name, 18) for name in names]
    axes.set_xticks(range(len(names)), short, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), short)
    for axis in (axes.get_xticklabels(), axes.get_yticklabels()):
        for tick, row in zip(axis, calibration.words, strict=True):
            tick.set_color(_colour(row))
    for i, j in product(range(len(names)), repeat=2):
        value = table[i, j].item()
        if not math.isnan(value):
            text = f"{value:.1f}".replace("-0.0", "0.0").replace("-", "\u2212")
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color="w" if abs(value) > 0.6 else "k")
    axes.set_title("Redundancy of two words:\ncorrelation of their shifts", fontsize=10)
