"""Score: rewards of pictures, plain or for control words, row by row while the next pictures are decoded."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from queue import Queue
from threading import Lock, Thread
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from srpo_cli.algorithms.base import ControlWords
from srpo_cli.core.relative import WordWeights, guided, relative_reward, sgp, srp, upstream
from srpo_cli.errors import SrpoError
from srpo_cli.metrics.intervals import Interval, bootstrap
from srpo_cli.recipes.parts import load_reward
from srpo_cli.rewards.base import Reward
from srpo_cli.runtime.devices import best_device
from srpo_cli.runtime.distributed import ALONE, Ranks
from srpo_cli.runtime.inputs import Picture
from srpo_cli.runtime.pictures import is_sheet, open_with_metadata, prompt_of
from srpo_cli.runtime.quiet import quiet_libraries

Form = Literal["plain", "sgp", "srp", "cfg", "upstream"]
Announce = Callable[[str], None]

_MINIATURE = "miniature"
_RESULTS = frozenset(
    ("reward", "score", "positive", "negative", "gap", "unit", "preprocess", "reward_weights", "error")
)  # keys of a row that scoring makes
_PIXELS = 2**24  # judged at a time: 200 MB as float32, as a batch of sixteen pictures of a megapixel is
_WORKERS = 4  # threads that decode and judge, a batch each


@dataclass(frozen=True)
class Wording:
    """The texts that a picture is judged by, and what is made of their rewards.

    ``plain`` is the reward for the prompt; ``sgp`` that for the positive words; ``srp`` positive minus negative;
    ``cfg`` the paper's ``k C_pos + (1 - k) C_neg``; ``upstream`` the reference code's ``(1 + k) C_pos - C_neg``. Over
    several words each term is their mean. A picture without a prompt is judged by the word alone.
    """

    form: Form = "plain"
    positive: Sequence[str] = ()
    negative: Sequence[str] = ()
    template: str = ControlWords.template
    k: float = 0.0

    @property
    def words(self) -> tuple[str, ...]:
        return (*self.positive, *self.negative)

    def control_words(self) -> ControlWords:
        """The words of both sides; UsageError where one side has none."""
        return ControlWords(self.positive, self.negative, self.template)

    def text(self, word: str, prompt: str | None) -> str:
        return self.template.format(word=word, prompt=prompt) if prompt else word

    def weights(self) -> WordWeights:
        """How the two terms make the score."""
        return {"sgp": sgp(), "srp": srp(), "cfg": guided(self.k), "upstream": upstream(self.k)}[self.form]


@dataclass(frozen=True)
class Request:
    """What to score pictures by.

    Attributes:
        rewards: names; none of them: the miniature's reward for pictures of the miniature, ``default`` for all others.
        default: name of a reward.
        wording: by the name of a reward, the texts; a preset has other words for the miniature.
        weights: by the name of a reward, where its weights are.
        preprocess: one of the rewards' preprocessings; None: each one's reference.
        dtype: what rewards compute in.
        batch_size: pictures judged at a time.
    """

    rewards: Sequence[str] = ()
    default: str = "hpsv2.1"
    wording: Callable[[str], Wording] = lambda _name: Wording()
    weights: Mapping[str, Path] = field(default_factory=dict)
    preprocess: str | None = None
    dtype: torch.dtype = torch.float32
    batch_size: int = 32


@dataclass(frozen=True)
class Judge:
    """A reward by the name it was asked for, and what to hold while it is called."""

    name: str
    reward: Reward
    turn: AbstractContextManager[Any]


class Judges:
    """The rewards of a request, each loaded when the first picture asks for it."""

    def __init__(self, request: Request, announce: Announce | None) -> None:
        self.request, self._announce = request, announce
        self._loaded: dict[str, Judge] = {}
        self._loading = Lock()
        self._one_thread = torch.get_num_threads() == 1  # asked here: a worker has its own number

    def named(self, name: str) -> Judge:
        with self._loading:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            return self._loaded[name]

    def _load(self, name: str) -> Judge:
        request = self.request
        reward = load_reward(name, request.weights.get(name), best_device(), request.dtype, self._announce)
        # Other people's code is not called twice at a time, an accelerator holds one batch at a time, and whoever gave
        # torch one thread gets one that computes.
        alone = not reward.thread_safe or reward.device.type != "cpu" or self._one_thread
        return Judge(name, reward.via(request.preprocess), Lock() if alone else nullcontext())

    def of(self, picture: Decoded) -> list[str]:
        """The names of the rewards that judge a picture."""
        if self.request.rewards:
            return list(self.request.rewards)
        return [_MINIATURE if picture.metadata.get("model") == _MINIATURE else self.request.default]

    def ask(self, batch: Sequence[Decoded]) -> list[tuple[Judge, list[int]]]:
        """Each reward with the numbers of the pictures that it judges."""
        asked: dict[str, list[int]] = {}
        for number, picture in enumerate(batch):
            for name in [] if picture.error else self.of(picture):
                asked.setdefault(name, []).append(number)
        return [(self.named(name), numbers) for name, numbers in asked.items()]


@dataclass(frozen=True)
class Decoded:
    """A picture ready to be judged: pixels (H, W, 3), 8 bits each, or what is wrong with the file."""

    source: Picture
    pixels: Tensor | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """The keys that the picture came with, but for those of an earlier score."""
        kept = {key: value for key, value in self.source.row.items() if key not in _RESULTS}
        return {**kept, "file": self.source.file, "prompt": self.prompt}


def to_images(pixels: Tensor) -> Tensor:
    """Pixels (..., H, W, 3) of 8 bits to images (..., 3, H, W) in [0, 1]."""
    return pixels.movedim(-1, -3).contiguous().float() / 255


def decode(source: Picture) -> Decoded | None:
    """Open a picture; None for a sheet of pictures that this program made and nobody named."""
    path = Path(source.file)
    try:
        image, metadata = open_with_metadata(path)
        prompt = source.prompt or prompt_of(path, metadata)
    except SrpoError as error:
        return Decoded(source, prompt=source.prompt, error=str(error))
    if source.found and is_sheet(metadata):
        return None
    return Decoded(source, torch.from_numpy(np.array(image)), metadata, prompt)


def decode_all(sources: Iterable[Picture]) -> Iterator[Decoded]:
    """The pictures one by one, those that cannot be read with their error, sheets left out."""
    return (decoded for decoded in map(decode, sources) if decoded is not None)


def chunks_of(sources: Iterable[Picture], size: int, as_they_come: bool = False) -> Iterator[list[Picture]]:
    """Pictures in their order, ``size`` at a time.

    ``as_they_come``: what is there is given at once, ``size`` at most. For rows that are piped in slowly; chunks then
    depend on time.
    """
    if not as_they_come:
        rest = iter(sources)
        while chunk := list(islice(rest, size)):
            yield chunk
        return
    queue: Queue[Picture | BaseException | None] = Queue(maxsize=2 * size)

    def feed() -> None:
        try:
            for source in sources:
                queue.put(source)
            queue.put(None)
        except BaseException as error:  # raised where the pictures are taken
            queue.put(error)

    Thread(target=feed, daemon=True).start()  # a daemon: standard input may keep it waiting for ever
    chunk: list[Picture] = []
    while isinstance(item := queue.get(), Picture):
        chunk.append(item)
        if len(chunk) == size or queue.empty():
            yield chunk
            chunk = []
    if chunk:
        yield chunk
    if item is not None:
        raise item


def score(
    sources: Iterable[Picture],
    request: Request,
    announce: Announce | None = None,
    as_they_come: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each picture and each of its rewards, in the order of ``sources``.

    Several ranks judge a batch each at a time, rank 0's ``sources``, and all yield all rows.

    A row has ``file``, ``prompt``, ``reward``, ``score`` and, for a pair of words, ``positive``, ``negative`` and
    ``gap``; then ``unit``, ``preprocess`` and ``reward_weights``, which say what made the numbers. A picture that
    cannot be judged has an ``error`` instead. Rows that were piped in keep their own keys.

    ``announce`` is told about downloads before they start; None: nothing is downloaded.
    """
    if ranks.size == 1:
        own = chunks_of(sources, request.batch_size, as_they_come)
        yield from chain.from_iterable(_judged(own, request, announce, as_they_come))
        return
    batches = list(chunks_of(ranks.from_rank_0(list(sources)), request.batch_size))
    judged = _judged(batches[ranks.rank :: ranks.size], request, announce)
    for _ in range(0, len(batches), ranks.size):
        with ranks.together():
            rows = next(judged, [])
        yield from chain.from_iterable(ranks.gather(rows))


def _judged(
    chunks: Iterable[list[Picture]], request: Request, announce: Announce | None, as_they_come: bool = False
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each chunk while the next ones are decoded; as they come, only when it is done."""
    quiet_libraries()
    judges = Judges(request, announce)
    threads = torch.get_num_threads()
    workers = min(_WORKERS, max(2, threads))
    waiting: deque[Future[list[dict[str, Any]]]] = deque()
    # The cores are shared out: a small model keeps one thread busier than it keeps two, and while one worker decodes
    # the others judge.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),))
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_rows, chunk, judges))
            while len(waiting) > (0 if as_they_come else workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _rows(sources: Sequence[Picture], judges: Judges) -> list[dict[str, Any]]:
    """The rows of some pictures, judged in batches of so many pixels that large photographs fit into memory."""
    rows: list[dict[str, Any]] = []
    batch: list[Decoded] = []
    pixels = 0
    for decoded in decode_all(sources):
        size = 0 if decoded.pixels is None else decoded.pixels.shape[0] * decoded.pixels.shape[1]
        if batch and pixels + size > _PIXELS:
            rows += _rows_of(batch, judges)
            batch, pixels = [], 0
        batch.append(decoded)
        pixels += size
    return rows + _rows_of(batch, judges)


def _rows_of(batch: Sequence[Decoded], judges: Judges) -> list[dict[str, Any]]:
    """The rows of a batch: picture by picture, and for each its rewards in the order they were asked for."""
    rows: list[list[dict[str, Any]]] = [
        [{**picture.row(), "error": picture.error}] if picture.error else [] for picture in batch
    ]
    for judge, numbers in judges.ask(batch):
        with judge.turn:
            judged = _judge(judge.reward, [batch[number] for number in numbers], judges.request.wording(judge.name))
        for number, row in zip(numbers, judged, strict=True):
            rows[number].append({**batch[number].row(), **row})
    return list(chain.from_iterable(rows))


@dataclass(frozen=True)
class Group:
    """Pictures that one reward judges, each (3, H, W) in [0, 1] with its prompt, empty where it has none."""

    reward: Reward
    images: list[Tensor]
    prompts: list[str]


def judged_together(
    sources: Iterable[Picture], request: Request, limit: int, announce: Announce
) -> tuple[list[Group], int]:
    """The first ``limit`` pictures by the reward that judges them, and how many of them cannot be read.

    SrpoError if none can. ``announce`` is told about downloads, pictures that cannot be read, and the limit.
    """
    quiet_libraries()
    judges = Judges(request, announce)
    sources = iter(sources)
    pictures = list(decode_all(islice(sources, limit)))
    if next(sources, None) is not None:
        announce(f"looking at the first {limit} pictures")
    unreadable = [picture for picture in pictures if picture.error]
    for picture in unreadable:
        announce(f"left out: {picture.error}")
    readable = [picture for picture in pictures if not picture.error]
    if not readable:
        raise SrpoError("no picture can be read")
    groups = []
    for name in dict.fromkeys(name for picture in readable for name in judges.of(picture)):
        own = [picture for picture in readable if name in judges.of(picture)]
        prompts = [picture.prompt or "" for picture in own]
        groups.append(Group(judges.named(name).reward, [to_images(picture.pixels) for picture in own], prompts))
    return groups, len(unreadable)


@torch.no_grad()
def _judge(reward: Reward, pictures: Sequence[Decoded], wording: Wording) -> list[dict[str, Any]]:
    """What one reward says of each picture."""
    made_by = {
        "unit": reward.unit,
        "preprocess": reward.preprocess.mode if reward.preprocess else None,
        "reward_weights": reward.weights,
    }
    plain = wording.form == "plain" or not reward.reads_text
    mute = [not picture.prompt for picture in pictures] if plain and reward.reads_text else [False] * len(pictures)
    able = [picture for picture, is_mute in zip(pictures, mute, strict=True) if not is_mute]
    values = iter(_values(reward, able, wording, plain) if able else [])
    rows = []
    for is_mute in mute:
        row: dict[str, Any] = {"reward": reward.name}
        numbers = {} if is_mute else next(values)
        if is_mute:
            row["error"] = f"no prompt, and {reward.name} needs one: --prompt, --prompts, or a .txt beside the picture"
        elif not all(map(math.isfinite, numbers.values())):
            row["error"] = f"{reward.name} gave no finite number"
        else:
            row |= numbers
        rows.append({**row, **made_by})
    return rows


def _values(reward: Reward, pictures: Sequence[Decoded], wording: Wording, plain: bool) -> list[dict[str, float]]:
    """The numbers of each picture's row."""
    pixels = [picture.pixels for picture in pictures]
    if len({image.shape for image in pixels}) == 1:
        images = to_images(torch.stack(pixels).to(reward.device))
    else:
        images = [to_images(image.to(reward.device)) for image in pixels]
    if plain:
        columns = {"score": reward(images, [picture.prompt or "" for picture in pictures])}
    else:
        texts = [[wording.text(word, picture.prompt) for picture in pictures] for word in wording.words]
        terms = torch.stack([term.double() for term in reward.scores(images, *texts)])
        positive = terms[: len(wording.positive)].mean(0)
        if wording.form == "sgp":
            columns = {"score": positive}
        else:
            negative = terms[len(wording.positive) :].mean(0)
            total = relative_reward(positive, negative, wording.weights())
            columns = {"score": total, "positive": positive, "negative": negative, "gap": positive - negative}
    table = torch.stack([column.double() for column in columns.values()], 1).tolist()
    return [dict(zip(columns, map(_rounded, values), strict=True)) for values in table]


def _rounded(value: float) -> float:
    """Seven significant digits: what float32 holds."""
    return float(f"{value:.7g}")


class Summary:
    """Mean scores and, for pairs of words, gaps and win rates with 95 % intervals, for each reward and folder.

    The bootstrap resamples prompts, because pictures of one prompt are not independent; where there are fewer than two
    prompts it resamples pictures.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], list[tuple[str | None, float, float | None]]] = {}
        self.failed = 0
        self.made_by: dict[str, tuple[str, ...]] = {}
        self._files: set[str] = set()

    @property
    def scored(self) -> int:
        """Rows with a score."""
        return sum(map(len, self._values.values()))

    @property
    def pictures(self) -> int:
        """Pictures that rows were about."""
        return len(self._files)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take one row of :func:`score` in."""
        self._files.add(row["file"])
        if row.get("error"):
            self.failed += 1
            return
        self.made_by[row["reward"]] = (row["unit"], row["preprocess"], row["reward_weights"])
        group = row["reward"], str(Path(row["file"]).parent)
        self._values.setdefault(group, []).append((row["prompt"], row["score"], row.get("gap")))

    def rows(self) -> list[dict[str, Any]]:
        """One row for each reward and, where there are several folders, one for each of those before it."""
        rewards = dict.fromkeys(reward for reward, _ in self._values)
        rows = []
        for reward in rewards:
            folders = [folder for name, folder in self._values if name == reward]
            if len(folders) > 1:
                rows += [_summarise(reward, folder, self._values[reward, folder]) for folder in folders]
            everything = [value for folder in folders for value in self._values[reward, folder]]
            rows.append(_summarise(reward, "all" if len(folders) > 1 else folders[0], everything))
        return rows


def _summarise(reward: str, folder: str, values: Sequence[tuple[str | None, float, float | None]]) -> dict[str, Any]:
    prompts = [prompt for prompt, _, _ in values]
    by_prompt = None not in prompts and len(set(prompts)) > 1
    units = prompts if by_prompt else list(range(len(values)))
    row: dict[str, Any] = {"reward": reward, "folder": folder, "pictures": len(values)}
    row["resampled"] = f"{len(set(units))} {'prompts' if by_prompt else 'pictures' if len(values) > 1 else 'picture'}"
    scores, gaps = [score for _, score, _ in values], [gap for _, _, gap in values]
    if scores != gaps:
        row["score"] = _clustered(scores, units)
    if gaps[0] is not None:
        row["gap"] = _clustered(gaps, units)
        row["gap_x100"] = _clustered([100 * gap for gap in gaps], units)
        row["win_rate"] = _clustered([1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps], units)
    return row


def _clustered(values: Sequence[float], units: Sequence[Any]) -> Interval | float:
    """Bootstrap interval of the mean, whole units resampled; the mean alone where there is one unit."""
    index = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    place = torch.tensor([index[unit] for unit in units])
    sums = torch.zeros(len(index), dtype=torch.float64).index_add_(0, place, torch.tensor(values, dtype=torch.float64))
    counts = torch.bincount(place).double()
    if len(index) == 1:
        return (sums / counts).item()
    return bootstrap(lambda chosen: sums[chosen].sum(1) / counts[chosen].sum(1), len(index))
