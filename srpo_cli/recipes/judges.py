"""Judges of a benchmark's pictures: rewards, control words, statistics, the oracle, diversity, distance to a set.

What a metric needs is planned by name, before anything is loaded, so that a mistake is told before pictures are drawn;
then one judge at a time is loaded, looks at the pictures of all models, and is let go.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_type_hints

import torch
from torch import Tensor

from srpo_cli.algorithms.base import ControlWords
from srpo_cli.config.benchmark import Benchmark
from srpo_cli.config.load import MINIATURE
from srpo_cli.errors import MissingError, SrpoError, UsageError
from srpo_cli.metrics.aggregate import Measure, hundredfold, mean, mean_absolute
from srpo_cli.metrics.distribution import frechet_distance, kernel_distance
from srpo_cli.metrics.diversity import mean_pairwise_distance
from srpo_cli.metrics.pictures import STATISTICS, picture_statistics
from srpo_cli.miniature.oracle import CONTENT, PHOTOGRAPHS_PER_PROMPT, Oracle
from srpo_cli.miniature.world import SIZE, parse
from srpo_cli.models.flux import load_latent_space
from srpo_cli.recipes.parts import chunks, load_reward
from srpo_cli.recipes.score import decode, to_images
from srpo_cli.registry import METRICS, REWARDS, PluginFile, metric_parts
from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.inception import load_inception
from srpo_cli.rewards.vision import VisionReward
from srpo_cli.runtime.benchmarks import Item
from srpo_cli.runtime.distributed import ALONE, Ranks
from srpo_cli.runtime.inputs import list_pictures
from srpo_cli.runtime.seeding import derive

Announce = Callable[[str], None]

_TITLES = {  # as the papers that print them do
    "aesthetic-v2.5": "Aes",
    "deqa": "DeQA",
    "hpsv2.1": "HPS",
    "imagereward": "IR",
    "pickscore": "Pick",
}
_COSINE_DIGITS, _DIGITS = 4, 3
_MINIATURE_GRID, _FLUX_GRID = 8, 16  # pixels between the borders of tokens
_PHOTOGRAPHS_SEED = 0
_REFERENCE_BATCH = 16
_PIXELS = 2**22  # measured at a time


@dataclass(frozen=True)
class Picture:
    """A picture to be judged: 8-bit pixels (H, W, 3), and what it was drawn from."""

    item: Item
    pixels: Tensor


class Judge(Protocol):
    """Gives numbers to pictures, one by one.

    Attributes:
        name: of the plan that it comes from.
        record: all that decides its numbers: weights, preprocessing, words.
        columns: what it says of a picture.
        measures: figures that are computed from the means of its columns.
    """

    name: str
    record: Mapping[str, Any]
    columns: tuple[str, ...]
    measures: tuple[Measure, ...]

    def __call__(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """Each column's numbers, float64 (N,) on the CPU, all of them finite.

        ``pictures`` may have different sizes. All pictures that a model drew of a prompt are among them, or none:
        whoever calls never cuts a prompt in two. What a picture gets does not depend on the others' prompts.
        """


class SetJudge(Protocol):
    """Gives numbers to all of a model's pictures together; its measures have no columns."""

    name: str
    record: Mapping[str, Any]
    measures: tuple[Measure, ...]

    def update(self, pictures: Sequence[Picture]) -> None:
        """Look at some of the pictures."""

    def compute(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Each measure's figure of all pictures that any rank has looked at since the last call, and forget them."""


class Skipped(NamedTuple):
    """A metric that could not be measured, and why, with the command that mends it."""

    metric: str
    reason: str


def _fits_all(_items: Sequence[Item]) -> None:
    """The check of what can judge any prompt."""


@dataclass(frozen=True)
class JudgePlan:
    """One judge, not loaded yet, and the metrics that it serves.

    Attributes:
        name: of the judge; no other plan of a benchmark has it.
        metrics: as they were asked for.
        make: loads it onto a device; told about downloads before they start (None: nothing is downloaded).
        headings: by the name of each measure that it will make, the measure's title.
        of_set: whether it makes a :class:`SetJudge`.
        check: UsageError for prompts that it cannot judge.
    """

    name: str
    metrics: tuple[str, ...]
    make: Callable[[torch.device, Announce | None], Judge | SetJudge]
    headings: Mapping[str, str]
    of_set: bool = False
    check: Callable[[Sequence[Item]], None] = _fits_all

    def load(self, device: torch.device, announce: Announce | None = None) -> Judge | SetJudge:
        """The judge. MissingError, with the command that fetches it, for what is not here: see :meth:`skipped`."""
        return self.make(device, announce)

    def skipped(self, error: MissingError) -> list[Skipped]:
        """Its metrics, left out for an error of :meth:`load`; the reason stands behind the name, and repeats it not."""
        return [Skipped(metric, re.sub(f"^{re.escape(metric)}:? ", "", str(error))) for metric in self.metrics]


@dataclass(frozen=True)
class How:
    """What judges are made with.

    Attributes:
        benchmark: its control words and its pictures of a prompt.
        weights: by a name of ``registry.weights_of``, where weights are.
        reference: folder of pictures that ``fid`` and ``kid`` compare with.
        preprocess: one of the rewards' preprocessings; None: each one's reference.
        dtype: what rewards compute in.
    """

    benchmark: Benchmark
    weights: Mapping[str, Path] = field(default_factory=dict)
    reference: Path | None = None
    preprocess: str | None = None
    dtype: torch.dtype = torch.float32

    def reward(self, name: str, device: torch.device, announce: Announce | None) -> Reward:
        """The named reward behind the preprocessing."""
        return load_reward(name, self.weights.get(name), device, self.dtype, announce).via(self.preprocess)


def headings_of(measures: Iterable[Measure]) -> dict[str, str]:
    """Titles of measures by their names."""
    return {measure.name: measure.title for measure in measures}


def plan_judges(
    benchmark: Benchmark,
    weights: Mapping[str, Path] | None = None,
    reference: Path | None = None,
    preprocess: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[JudgePlan]:
    """The judges of a benchmark's metrics, in their order; one for several metrics that read the same features.

    Loads no weights. UsageError for an unknown metric, and for one that cannot be what it is asked to be: ``sgp:`` of
    a reward that reads no text, features of a reward that has none, diversity of single pictures, a distance to no
    reference. The arguments are those of :class:`How`.
    """
    how = How(benchmark, weights or {}, reference, preprocess, dtype)
    asked: dict[tuple[Callable[..., JudgePlan], str], list[str]] = {}
    for metric in dict.fromkeys(benchmark.metrics):
        kind, reward = metric_parts(metric)
        planner = plan_reward if kind == "reward" else METRICS.get(metric)
        asked.setdefault((planner, reward), []).append(metric)
    return [planner(tuple(metrics), reward, how) for (planner, reward), metrics in asked.items()]


def _by_size(pictures: Sequence[Picture], device: torch.device) -> Iterator[tuple[list[int], Tensor]]:
    """Pictures of each size with their numbers, as images (B, 3, H, W) in [0, 1], few enough for any memory."""
    by_size: dict[torch.Size, list[int]] = {}
    for number, picture in enumerate(pictures):
        by_size.setdefault(picture.pixels.shape, []).append(number)
    for shape, numbers in by_size.items():
        for part in chunks(len(numbers), max(1, _PIXELS // (shape[0] * shape[1]))):
            pixels = torch.stack([pictures[number].pixels for number in numbers[part]])
            yield numbers[part], to_images(pixels.to(device))


def _images(pictures: Sequence[Picture], device: torch.device) -> Tensor | list[Tensor]:
    """What a reward takes: one tensor where all sizes are the same."""
    if len({picture.pixels.shape for picture in pictures}) == 1:
        return to_images(torch.stack([picture.pixels for picture in pictures]).to(device))
    return [to_images(picture.pixels.to(device)) for picture in pictures]


# --- rewards and control words ------------------------------------------------------------------------------------


class RewardJudge:
    """A reward for the prompt, and for control words put to it, at the price of one look at each picture.

    Args:
        name: what the reward is called in columns and measures.
        reward: judges.
        plain: whether the reward for the prompt itself is wanted.
        words: control words, where the gap between them is wanted.
    """

    def __init__(self, name: str, reward: Reward, plain: bool, words: ControlWords | None) -> None:
        self.name, self.reward, self.plain, self.words = name, reward, plain, words
        self.record: dict[str, Any] = {
            "weights": reward.weights,
            "preprocess": reward.preprocess.mode if reward.preprocess else None,
            "unit": reward.unit,
        }
        own = [_reward_measure(name, reward.unit)] if plain else []
        if words:
            self.record["control_words"] = {
                "positive": list(words.positive),
                "negative": list(words.negative),
                "template": words.template,
            }
            own += _gap_measures(name)
        self.measures = tuple(own)
        gap = tuple(f"{part}:{name}" for part in ("positive", "negative", "gap", "win")) if words else ()
        self.columns = ((name,) if plain else ()) + gap

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        prompts = [picture.item.prompt for picture in pictures]
        texts = [self.words.texts(word, prompts) for word in self.words.all] if self.words else []
        texts = [prompts, *texts] if self.plain else texts
        rewards = self.reward.scores(_images(pictures, self.reward.device), *texts)
        terms = [reward.double().cpu() for reward in rewards]
        values = [terms.pop(0)] if self.plain else []
        if self.words:
            stacked, split = torch.stack(terms), len(self.words.positive)
            gap = self.words.gap(terms)
            values += [stacked[:split].mean(0), stacked[split:].mean(0), gap, (gap.sign() + 1) / 2]
        self._check(values, pictures)
        return dict(zip(self.columns, values, strict=True))

    def _check(self, values: Sequence[Tensor], pictures: Sequence[Picture]) -> None:
        """SrpoError for a number that no mean can be taken of."""
        bad = (~torch.stack(list(values)).isfinite().all(0)).nonzero().flatten()
        if len(bad):
            raise SrpoError(f"{self.name} gave no finite number for a picture of {pictures[int(bad[0])].item.id}")


def plan_reward(metrics: tuple[str, ...], reward: str, how: How) -> JudgePlan:
    """The judge of a reward that is asked for by its name, as ``sgp:``, or both."""
    kinds = [metric_parts(metric)[0] for metric in metrics]
    words = ControlWords(**how.benchmark.control_words.model_dump()) if "sgp" in kinds else None
    if words and not _kind_of(reward).reads_text:
        _refuse_words(reward)

    def make(device: torch.device, announce: Announce | None) -> RewardJudge:
        loaded = how.reward(reward, device, announce)
        if words and not loaded.reads_text:  # known of a plug-in only now
            _refuse_words(reward)
        return RewardJudge(reward, loaded, "reward" in kinds, words)

    plain = [_reward_measure(reward, unit="")] if "reward" in kinds else []
    return JudgePlan(reward, metrics, make, headings_of([*plain, *(_gap_measures(reward) if words else [])]))


def _refuse_words(reward: str) -> None:
    raise UsageError(f"sgp:{reward}: {reward} reads no text, so control words cannot move it: take {reward} alone")


def _kind_of(reward: str) -> type[Reward]:
    """What a reward's loader makes; of other people's rewards it is known only when they are loaded."""
    return get_type_hints(REWARDS.get(reward))["return"]


def _title(reward: str) -> str:
    if reward.startswith("clip:"):
        return f"CLIPScore ({reward.removeprefix('clip:')})"
    plugin = REWARDS.plugin(reward)
    short = Path(plugin.path).stem if isinstance(plugin, PluginFile) else reward
    return _TITLES.get(short, short)


def _reward_measure(reward: str, unit: str) -> Measure:
    note = (
        f"cosine with {reward.removeprefix('clip:')}; often printed times 100" if reward.startswith("clip:") else unit
    )
    title = "plain reward" if reward == MINIATURE else _title(reward)  # a model has that name too
    return Measure(reward, title, (reward,), digits=_COSINE_DIGITS if unit == "cosine" else _DIGITS, note=note)


def _gap_measures(reward: str) -> list[Measure]:
    title, gap = f"SGP-{_title(reward)}", (f"gap:{reward}",)
    note = "reward for the positive words minus that for the negative ones"
    return [
        Measure(f"sgp:{reward}", title, gap, digits=5, note=note),
        Measure(
            f"sgp_x100:{reward}",
            f"{title} x 100",
            gap,
            reduce=hundredfold,
            digits=_DIGITS,
            note=f"100 times the {note}",
        ),
        Measure(
            f"sgp_win_rate:{reward}",
            f"{title} win rate",
            (f"win:{reward}",),
            digits=_DIGITS,
            note="share of pictures that the positive words are more rewarded for; ties count half",
        ),
    ]


# --- statistics ---------------------------------------------------------------------------------------------------


class StatisticsJudge:
    """What can be measured on pixels, without a learned judge; ``device`` does the measuring."""

    name = "statistics"
    columns = (*STATISTICS, "clipping")
    measures = tuple(
        Measure(column, title, (column,), better="", note=note)
        for column, title, note in (
            ("saturation", "saturation", "mean HSV saturation"),
            ("contrast", "contrast", "standard deviation of the luma"),
            ("grain", "grain", "fine detail that is not edges"),
            ("grid", "grid", "detail that repeats at the borders of tokens"),
            ("band_5", "high frequencies", "log power of the finest fifth of the spectrum"),
            ("highlights", "highlights", "share of colourless pixels far brighter than around them"),
            ("clipping", "clipping", "share of pixels with a channel at 0 or 255"),
        )
    )
    record: Mapping[str, Any] = {"grid": {f"{SIZE}x{SIZE}": _MINIATURE_GRID, "other": _FLUX_GRID}}

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        table = torch.empty(len(pictures), len(self.columns), dtype=torch.float64)
        for numbers, images in _by_size(pictures, self.device):
            grid = _MINIATURE_GRID if images.shape[-2:] == (SIZE, SIZE) else _FLUX_GRID
            table[numbers, :-1] = picture_statistics(images, grid).double().cpu()
            table[numbers, -1] = ((images == 0) | (images == 1)).any(1).float().mean((1, 2)).double().cpu()
        return dict(zip(self.columns, table.unbind(1), strict=True))


def plan_statistics(metrics: tuple[str, ...], _reward: str, _how: How) -> JudgePlan:
    """The judge of pixels."""
    headings = headings_of(StatisticsJudge.measures)
    return JudgePlan(StatisticsJudge.name, metrics, lambda device, _announce: StatisticsJudge(device), headings)


# --- the miniature's oracle ---------------------------------------------------------------------------------------


class OracleJudge:
    """The oracle's words on pictures of the miniature's world.

    Each prompt is compared with photographs of its own, which depend on nothing but the prompt and its place in the
    benchmark, and go through the miniature's autoencoder as its pictures did.

    Args:
        oracle: judges.
        round_trip: sends pictures (N, 3, H, W) in [0, 1] through the autoencoder.
    """

    name = "oracle"
    columns = ("photo", *CONTENT, *(f"deviation:{name}" for name in STATISTICS))
    measures = (
        Measure(
            "photo_distance",
            "photo distance",
            tuple(f"deviation:{name}" for name in STATISTICS),
            reduce=mean_absolute,
            better="lower",
            note="two-sided distance of the statistics to photographs of the same prompts, in their spreads",
        ),
        Measure("photo_rate", "photo rate", ("photo",), note="share within the region of 90 % of photographs"),
        Measure(
            "caption_accuracy",
            "caption",
            CONTENT,
            reduce=mean,
            note="mean of shape, colour, ground and light shown as asked; an open ground counts as shown",
        ),
        *(Measure(f"{name}_accuracy", name, (name,), note="share shown as asked") for name in CONTENT),
    )

    def __init__(self, oracle: Oracle, round_trip: Callable[[Tensor], Tensor]) -> None:
        self.oracle, self.round_trip = oracle, round_trip
        self.record: dict[str, Any] = {
            "photographs": PHOTOGRAPHS_PER_PROMPT,
            "photographs_seed": _PHOTOGRAPHS_SEED,
            "spread": [float(f"{value:.6g}") for value in oracle.spread.tolist()],
        }
        self._photographs: dict[tuple[int, str], Tensor] = {}

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        items = [picture.item for picture in pictures]
        check_world(items)
        _check_size(pictures)
        images = to_images(torch.stack([picture.pixels for picture in pictures]))
        prompts = [item.prompt for item in items]
        statistics = picture_statistics(images)
        photographs = torch.stack([self.photographs(item).mean(0) for item in items])
        values = [
            self.oracle.is_photo(statistics, prompts)[:, None],
            self.oracle.caption_hits(images, prompts),
            (statistics - photographs) / self.oracle.spread,
        ]
        table = torch.cat([value.double() for value in values], 1)
        return dict(zip(self.columns, table.unbind(1), strict=True))

    def photographs(self, item: Item) -> Tensor:
        """Statistics of the photographs of a prompt, (photographs, statistics)."""
        key = item.index, item.prompt
        if key not in self._photographs:
            seed = derive(_PHOTOGRAPHS_SEED, "photographs", item.index)
            self._photographs[key] = self.oracle.reference([item.prompt], self.round_trip, seed).statistics
        return self._photographs[key]


def check_world(items: Sequence[Item]) -> None:
    """UsageError for a prompt that the oracle's world cannot show."""
    for item in items:
        if parse(item.prompt) is None:
            raise UsageError(
                f"oracle: it knows only the miniature's world, not {item.prompt!r}: leave it out, or use prompts like "
                "'a red sphere on a wooden table, natural lighting'"
            )


def _check_size(pictures: Sequence[Picture]) -> None:
    for picture in pictures:
        height, width = picture.pixels.shape[:2]
        if (height, width) != (SIZE, SIZE):
            raise UsageError(
                f"oracle: it judges the miniature's pictures of {SIZE}x{SIZE} px, and {picture.item.id} has "
                f"{height}x{width}: leave it out"
            )


def plan_oracle(metrics: tuple[str, ...], _reward: str, _how: How) -> JudgePlan:
    """The judge of the miniature's world."""

    def make(device: torch.device, _announce: Announce | None) -> OracleJudge:
        space = load_latent_space("miniature", torch.bfloat16, device)

        @torch.no_grad()
        def round_trip(pictures: Tensor) -> Tensor:
            return space.decode(space.encode(pictures), tuple(pictures.shape[-2:])).cpu()

        return OracleJudge(Oracle.load(), round_trip)

    return JudgePlan(OracleJudge.name, metrics, make, headings_of(OracleJudge.measures), check=check_world)


# --- diversity ----------------------------------------------------------------------------------------------------


def _diversity_title(reward: str) -> str:
    return f"diversity ({_title(reward)})"


class DiversityJudge:
    """How unlike each other a prompt's pictures are, by a reward's picture features; the same for all of them.

    Args:
        reward_name: what the reward is called.
        reward: has the features.
        images: pictures of each prompt.
    """

    def __init__(self, reward_name: str, reward: VisionReward, images: int) -> None:
        self.reward, self.images = reward, images
        self.name = f"diversity:{reward_name}"
        self.columns = (self.name,)
        self.record: dict[str, Any] = {"weights": reward.weights, "preprocess": reward.preprocess.mode}
        note = f"mean cosine distance between the {images} pictures of a prompt"
        self.measures = (Measure(self.name, _diversity_title(reward_name), self.columns, digits=4, note=note),)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        features = self.reward.image_features(_images(pictures, self.reward.device)).cpu()
        values = torch.empty(len(pictures), dtype=torch.float64)
        numbers = sorted(range(len(pictures)), key=lambda number: pictures[number].item.index)
        for _, group in groupby(numbers, lambda number: pictures[number].item.index):
            own = list(group)
            if len(own) != self.images:
                raise ValueError(
                    f"{len(own)} of {self.images} pictures of {pictures[own[0]].item.id}: give all at once"
                )
            values[own] = mean_pairwise_distance(features[own])
        return {self.name: values}


def plan_diversity(metrics: tuple[str, ...], reward: str, how: How) -> JudgePlan:
    """The judge of how unlike a prompt's pictures are."""
    images = how.benchmark.images_per_prompt
    if images < 2:
        raise UsageError(f"{metrics[0]} compares the pictures of a prompt, and there is 1: give --num-images 2 or more")
    _check_features(metrics[0], reward)

    def make(device: torch.device, announce: Announce | None) -> DiversityJudge:
        return DiversityJudge(reward, how.reward(reward, device, announce), images)

    return JudgePlan(metrics[0], metrics, make, {metrics[0]: _diversity_title(reward)})


def _check_features(metric: str, reward: str) -> None:
    """UsageError for a reward that does not give its picture features."""
    if not issubclass(_kind_of(reward), VisionReward):
        raise UsageError(
            f"{metric}: {reward} has no picture features to compare: take a CLIP, like clip:ViT-B-32/openai"
        )


# --- distance to a reference set ----------------------------------------------------------------------------------


class DistanceJudge:
    """Fréchet and kernel distance between a model's pictures and a folder of others, by the features of a network.

    Args:
        name: of the plan.
        kinds: which of "fid" and "kid".
        suffix: ":REWARD", empty for Inception's features.
        features: of pictures of (H, W, 3) 8-bit pixels, (N, D).
        reference: the folder.
        record: of the network.
    """

    def __init__(
        self,
        name: str,
        kinds: Sequence[str],
        suffix: str,
        features: Callable[[Sequence[Tensor]], Tensor],
        reference: Path,
        record: Mapping[str, Any],
    ) -> None:
        self.name, self.kinds, self.suffix, self._features = name, kinds, suffix, features
        self.measures = _distance_measures(kinds, suffix)
        self._seen: list[Tensor] = []
        self._reference, digest = _read_reference(reference, features)
        self.record = {**record, "reference": {"pictures": len(self._reference), "sha256": digest}}

    def update(self, pictures: Sequence[Picture]) -> None:
        self._seen.append(self._features([picture.pixels for picture in pictures]).float().cpu())

    def compute(self, ranks: Ranks = ALONE) -> dict[str, float]:
        own = torch.cat(self._seen) if self._seen else self._reference[:0]
        self._seen = []
        features = torch.cat(ranks.gather(own))
        figures = {}
        if "fid" in self.kinds:
            figures[f"fid{self.suffix}"] = frechet_distance(self._reference, features)
        if "kid" in self.kinds:
            figures[f"kid{self.suffix}"], figures[f"kid_std{self.suffix}"] = kernel_distance(self._reference, features)
        return figures


def _distance_measures(kinds: Sequence[str], suffix: str) -> tuple[Measure, ...]:
    of = f" ({_title(suffix[1:])})" if suffix else ""
    note = f"on the features of {suffix[1:]}, not Inception's" if suffix else "Inception's features"
    spread = f"over subsets; {note}"
    known = {
        "fid": [Measure(f"fid{suffix}", f"FID{of}", (), better="lower", note=note)],
        "kid": [
            Measure(f"kid{suffix}", f"KID{of}", (), better="lower", digits=5, note=f"mean {spread}"),
            Measure(f"kid_std{suffix}", f"KID std{of}", (), better="", digits=5, note=f"standard deviation {spread}"),
        ],
    }
    return tuple(measure for kind in ("fid", "kid") if kind in kinds for measure in known[kind])


def _read_reference(folder: Path, features: Callable[[Sequence[Tensor]], Tensor]) -> tuple[Tensor, str]:
    """Features of all pictures below a folder, in the order of their names, and the digest of their pixels.

    SrpoError for one that cannot be read: a reference with holes is another one.
    """
    digest = hashlib.sha256()
    rows: list[Tensor] = []
    batch: list[Tensor] = []
    sources = list_pictures([str(folder)])
    for number, source in enumerate(sources, 1):
        decoded = decode(source)
        if decoded is not None:  # else a sheet of this program's own
            if decoded.error:
                raise SrpoError(f"{decoded.error}: take it out of the reference pictures")
            digest.update(decoded.pixels.numpy().tobytes())
            batch.append(decoded.pixels)
        if batch and (len(batch) == _REFERENCE_BATCH or number == len(sources)):
            rows.append(features(batch).float().cpu())
            batch = []
    if not rows:
        raise UsageError(f"{folder} holds no picture to compare with")
    return torch.cat(rows), digest.hexdigest()[:16]


def plan_distances(metrics: tuple[str, ...], reward: str, how: How) -> JudgePlan:
    """The judge of a model's distance to the reference pictures."""
    reference = how.reference
    if reference is None:
        raise UsageError(f"{metrics[0]} compares with pictures, and none are given: --reference FOLDER")
    if not reference.is_dir():
        raise UsageError(f"{metrics[0]}: {reference} is no folder of pictures to compare with")
    if reward:
        _check_features(metrics[0], reward)
    list_pictures([str(reference)])  # refuses one that holds none
    kinds = [metric_parts(metric)[0] for metric in metrics]

    def make(device: torch.device, announce: Announce | None) -> DistanceJudge:
        features, record = _features_of(reward, how, device, announce)
        return DistanceJudge(metrics[0], kinds, f":{reward}" if reward else "", features, reference, record)

    def check(items: Sequence[Item]) -> None:
        pictures, least = len(items) * how.benchmark.images_per_prompt, 4 if "kid" in kinds else 2
        if pictures < least:
            raise UsageError(
                f"{metrics[0]} needs {least} pictures or more, and there are {pictures}: take more prompts"
            )

    headings = headings_of(_distance_measures(kinds, f":{reward}" if reward else ""))
    return JudgePlan(metrics[0], metrics, make, headings, of_set=True, check=check)


def _features_of(
    reward: str, how: How, device: torch.device, announce: Announce | None
) -> tuple[Callable[[Sequence[Tensor]], Tensor], dict[str, Any]]:
    """What gives features of 8-bit pictures, a reward or Inception, and what decides them."""
    if not reward:
        inception = load_inception("inception", how.weights.get("inception"), device, announce)
        return inception, {"weights": inception.weights}
    loaded = how.reward(reward, device, announce)

    @torch.no_grad()
    def features(pictures: Sequence[Tensor]) -> Tensor:
        return torch.cat([loaded.image_features(to_images(pixels.to(device))[None]) for pixels in pictures])

    return features, {"weights": loaded.weights, "preprocess": loaded.preprocess.mode}
