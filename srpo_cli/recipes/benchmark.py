"""A benchmark: draw every prompt from every model, let each judge look at all pictures, and add up what they say.

All of it goes on where it stopped: a picture that is there and matches is not drawn again, and what a judge said of the
same pictures is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from srpo_cli import __version__
from srpo_cli.config.benchmark import Benchmark, describe
from srpo_cli.errors import MissingError, SrpoError, UsageError
from srpo_cli.metrics.aggregate import ALL, Measure
from srpo_cli.pages.report import write_report
from srpo_cli.recipes import sample as drawing
from srpo_cli.recipes.judges import Judge, JudgePlan, Picture, SetJudge, Skipped, plan_judges
from srpo_cli.recipes.parts import check_miniature_prompts, chunks
from srpo_cli.recipes.results import RESULTS, Result, merge, read_result, summarise, write_result, write_tables
from srpo_cli.runtime.benchmarks import Item, PromptSet, load_items, picture_path, select
from srpo_cli.runtime.devices import best_device
from srpo_cli.runtime.distributed import Ranks
from srpo_cli.runtime.folder import disk_errors, write_atomically
from srpo_cli.runtime.inputs import ENDINGS
from srpo_cli.runtime.pictures import open_picture
from srpo_cli.runtime.progress import CountProgress
from srpo_cli.runtime.sources import Source

_PICTURES, _SCORES = "pictures", "scores"
_AHEAD = 2  # batches that are decoded while another one is judged
_MADE_BY = "made by"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
        benchmark: the protocol.
        models: by label, a model to draw from or a folder of pictures that were made elsewhere; the first one is what
            the others are compared with.
        prompts: the benchmark's own files, where the user has them.
        limit, group: a part of the prompts.
        weights: by the name of a reward, where its weights are.
        reference: folder of real pictures, for fid and kid.
        batch_size: pictures judged at a time.
        bounded: names or headings, in any case, of measures that somebody waits for.
    """

    benchmark: Benchmark
    models: Mapping[str, Source | Path]
    prompts: Path | None = None
    limit: int | None = None
    group: str | None = None
    weights: Mapping[str, Path] = field(default_factory=dict)
    reference: Path | None = None
    batch_size: int = 32
    bounded: Sequence[str] = ()


@dataclass(frozen=True)
class _Job:
    """What is asked for, of which prompts, where to, by whom, and who is told."""

    request: Request
    prompts: PromptSet
    items: Sequence[Item]
    output: Path
    ranks: Ranks
    announce: Say | None
    say: Say

    @property
    def benchmark(self) -> Benchmark:
        return self.request.benchmark

    def pictures(self) -> list[tuple[Item, int]]:
        """What each picture of a model is of, and its number among those of its prompt."""
        return [(item, image) for item in self.items for image in range(self.benchmark.images_per_prompt)]


@dataclass(frozen=True)
class Drawn:
    """One model's pictures, those of a prompt together in the order of the prompts, and what is known of them.

    Attributes:
        facts: as results tell them.
        content: digest of the files' bytes; rank 0 alone knows it.
        cost: seconds and pictures drawn; empty for pictures that were made elsewhere.
    """

    label: str
    files: Sequence[Path]
    facts: Mapping[str, Any]
    content: str
    cost: Mapping[str, float]


@dataclass
class Judged:
    """What the judges said: their numbers by model and column, and by model and measure the figures of whole sets."""

    measures: list[Measure] = field(default_factory=list)
    columns: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    sets: dict[str, dict[str, float]] = field(default_factory=dict)
    records: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


def evaluate(request: Request, output: Path, ranks: Ranks, announce: Say | None, say: Say) -> dict[str, Any]:
    """Draw, judge and sum up into the folder ``output``; returns what ``results.json`` holds, on every rank.

    Several ranks share the drawing and the judging. ``announce`` is told about downloads before they start; None:
    nothing is downloaded. What cannot be judged for want of weights is left out by name, see ``skipped``.

    Raises UsageError, before anything is drawn, for what cannot be evaluated as it was asked for, and for a folder that
    holds the result of another protocol; SrpoError for a picture that cannot be read.
    """
    with ranks.together():
        plans = plan_judges(request.benchmark, request.weights, request.reference)
        prompts = load_items(request.benchmark, request.prompts, announce)
        items = select(prompts.items, request.limit, request.group)
        job = _Job(request, prompts, items, output, ranks, announce, say)
        _check_items(job, plans)
        _check_measures(request.bounded, plans)
        found = {label: _find(path, job) for label, path in request.models.items() if isinstance(path, Path)}
        _check_folder(output, _protocol(job))
        with disk_errors(output):
            is_new = not output.exists()
            output.mkdir(parents=True, exist_ok=True)
    drawn: list[Drawn] = []
    with _no_empty_folder(output, is_new):
        for label, model in request.models.items():
            drawn.append(_take(label, model, found[label], job) if label in found else _draw(label, model, drawn, job))
    judged = Judged()
    for plan in plans:
        _judge_all(plan, judged, drawn, job)
    result: dict[str, Any] = {}
    with ranks.together():
        if ranks.leads:
            table = _table(drawn, judged, job)
            result = _summary(table, drawn, judged, job)
            _publish(Result(result, table, output))
    return ranks.from_rank_0(result)


@contextmanager
def _no_empty_folder(output: Path, is_new: bool) -> Iterator[None]:
    """What fails leaves no new folder behind that holds nothing."""
    try:
        yield
    except SrpoError:
        for folder in (output / _PICTURES, output) if is_new else ():
            with suppress(OSError):  # it is not there, or holds something
                folder.rmdir()
        raise


def show(paths: Sequence[Path], output: Path | None, allow_different: bool) -> dict[str, Any]:
    """Results side by side, compared anew; written with their report to ``output`` where one is given.

    UsageError for results that cannot be put together, and for an ``output`` that holds another one.
    """
    results = [read_result(path) for path in paths]
    if output is not None:
        if len(results) > 1 and output.resolve() in [result.folder.resolve() for result in results]:
            raise UsageError(f"{output} is one of the results, which would be lost: choose another --output")
        _check_folder(output, results[0].data["protocol"])
    data, table = merge(results, output, allow_different)
    if output is not None:
        _publish(Result(data, table, output))
    return data


def _publish(result: Result) -> None:
    """All files that are made of a result."""
    write_result(result)
    write_tables(result.data, result.folder)
    pictures = 0 if result.table is None else len(result.table)
    with disk_errors(result.folder), CountProgress(pictures, "thumbnails") as progress:
        write_report(result.folder, result.data, result.table, progress=lambda made, _of_all: progress.update(made))


# --- before -------------------------------------------------------------------------------------------------------


def _protocol(job: _Job) -> dict[str, Any]:
    """What is known of the protocol before anything is drawn."""
    return {
        "benchmark": describe(job.benchmark),
        "limit": job.request.limit,
        "group": job.request.group,
        "prompts_sha256": job.prompts.sha256,
        "items": len(job.items),
    }


def _check_folder(output: Path, protocol: Mapping[str, Any]) -> None:
    """UsageError where the folder holds the result of another protocol: nothing of it is written over.

    Other metrics of the same pictures are welcome.
    """
    file = output / RESULTS
    if not file.exists():
        return
    try:  # without the table beside it, which may be what is being mended
        there = _terms(json.loads(file.read_text(encoding="utf-8"))["protocol"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no result of srpo eval: choose another --output") from error
    for key, value in _terms(protocol).items():
        if there.get(key) != value:
            is_short = not isinstance(value, dict | list) and key != "prompts_sha256"
            what = f"{key} {json.dumps(there.get(key))}, not {json.dumps(value)}" if is_short else f"another {key}"
            raise UsageError(f"{output} holds a result of {there['name']} with {what}: choose another --output")


def _terms(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a protocol that decide which pictures are drawn and how they are added up."""
    own = {key: protocol[key] for key in ("limit", "group", "prompts_sha256", "items")}
    return {**{key: value for key, value in protocol["benchmark"].items() if key != "metrics"}, **own}


def _check_items(job: _Job, plans: Sequence[JudgePlan]) -> None:
    """UsageError for prompts that a judge, a model or the figures cannot deal with."""
    groups = {item.group for item in job.items}
    if len(groups) > 1 and ALL in groups:
        raise UsageError(f"a group of prompts is called {ALL!r}, like the figures over all of them: rename it")
    if any(isinstance(model, Source) and model.base == "miniature" for model in job.request.models.values()):
        check_miniature_prompts([item.prompt for item in job.items])
    for plan in plans:
        plan.check(job.items)


def _check_measures(names: Sequence[str], plans: Sequence[JudgePlan]) -> None:
    """UsageError for a measure that no metric gives."""
    known = dict.fromkeys(text for plan in plans for pair in plan.headings.items() for text in pair)
    for name in names:
        if name.lower() not in map(str.lower, known):
            raise UsageError.unknown("measure", name, known)


# --- pictures -----------------------------------------------------------------------------------------------------


def _draw(label: str, model: Source, before: Sequence[Drawn], job: _Job) -> Drawn:
    """One model's pictures, drawn where they are missing.

    UsageError, after its first pictures, where steps or size are its own and not those of the models ``before``.
    """
    benchmark, folder = job.benchmark, job.output / _PICTURES / label
    job.say(f"{label}: {len(job.pictures())} pictures of {len(job.items)} prompts")
    wanted = drawing.Request(
        prompts=[item.prompt for item in job.items],
        num_images=benchmark.images_per_prompt,
        steps=benchmark.steps,
        guidance=benchmark.guidance,
        size=benchmark.size,
        seeds=[benchmark.first_seed(item.index) for item in job.items],
    )
    started, there = time.perf_counter(), _times(folder.glob("*.png"))
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    with CountProgress(len(wanted.pictures()), f"pictures of {label}") as progress:
        for row in drawing.sample(model, wanted, folder, job.ranks, job.announce):
            if not rows:
                with job.ranks.together():
                    _check_settings(label, row, before)
            rows[row["prompt"], row["seed"]] = row
            progress.update(len(rows))
    files = [
        Path(rows[item.prompt, benchmark.first_seed(item.index) + image]["file"]) for item, image in job.pictures()
    ]
    times = _times(dict.fromkeys(files))
    cost = {
        "seconds": round(time.perf_counter() - started, 1),
        "pictures_drawn": sum(there.get(name) != changed for name, changed in times.items()),
    }
    settings = {key: row[key] for key in ("model", "weights", "fingerprint", "steps", "size")}
    facts = {"label": label, **settings, "pictures": len(files), "folder": f"{_PICTURES}/{label}"}
    return Drawn(label, files, facts, _content(files, job.ranks), cost)


def _times(files: Iterable[Path]) -> dict[str, int]:
    """When each file was last written, by its name."""
    return {file.name: file.stat().st_mtime_ns for file in files}


def _check_settings(label: str, row: Mapping[str, Any], before: Sequence[Drawn]) -> None:
    for other in before:
        for key in ("steps", "size"):
            if other.facts[key] not in (None, row[key]):
                raise UsageError(
                    f"{label} has {key} {row[key]} of its own, and {other.label} {other.facts[key]}: say in a "
                    f"benchmark's .yaml which {key} both are to have"
                )


def _find(folder: Path, job: _Job) -> list[Path]:
    """The pictures of a folder, one for each prompt and number; UsageError where any is missing or there twice."""
    files: list[Path] = []
    missing: list[str] = []
    for item, image in job.pictures():
        stem = picture_path(job.benchmark, item, image)
        there = [path for path in (folder / f"{stem}{ending}" for ending in sorted(ENDINGS)) if path.is_file()]
        if len(there) > 1:
            raise UsageError(f"{folder} has {there[0].name} and {there[1].name} of one prompt: take one of them out")
        files += there
        missing += [] if there else [stem]
    if missing:
        more = f", nor of {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(
            f"{folder} is taken for pictures made elsewhere, and has no {missing[0]}.png or the like{more}"
        )
    return files


def _take(label: str, folder: Path, files: Sequence[Path], job: _Job) -> Drawn:
    """Pictures that were made elsewhere."""
    job.say(f"{label}: {len(files)} pictures in {folder}")
    content = _content(files, job.ranks)
    facts = {"label": label, "model": "pictures made elsewhere", "weights": None, "fingerprint": content}
    facts |= {"steps": None, "size": None, "pictures": len(files), "folder": os.path.relpath(folder, job.output)}
    return Drawn(label, files, facts, content, {})


def _content(files: Sequence[Path], ranks: Ranks) -> str:
    """Digest of the files' bytes, on rank 0, which alone uses it."""
    with ranks.together():
        if not ranks.leads:
            return ""
        with ThreadPoolExecutor() as pool:
            return _digest(list(pool.map(_file_digest, files)))


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SrpoError(f"cannot read {path}: {error.strerror}") from error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# --- judging ------------------------------------------------------------------------------------------------------


def _judge_all(plan: JudgePlan, judged: Judged, drawn: Sequence[Drawn], job: _Job) -> None:
    """Let one judge look at all models' pictures, and add to ``judged`` what it says; or say why it cannot."""
    judge = _load(plan, judged, job)
    if judge is None:
        return
    judged.records[plan.name] = judge.record
    judged.measures += judge.measures
    for each in drawn:
        numbers = _numbers_of(judge, plan.of_set, each, job)
        if plan.of_set:
            judged.sets.setdefault(each.label, {}).update({name: values[0] for name, values in numbers.items()})
        else:
            judged.columns.setdefault(each.label, {}).update(numbers)


def _load(plan: JudgePlan, judged: Judged, job: _Job) -> Judge | SetJudge | None:
    """The judge; None, and its metrics are left out, where any rank lacks what it needs."""
    judge, lacking = None, ""
    with job.ranks.together():
        try:
            judge = plan.load(best_device(), job.announce)
        except MissingError as error:
            lacking = str(error)
    lacking = next(filter(None, job.ranks.gather(lacking)), "")
    if not lacking:
        return judge
    for skipped in plan.skipped(MissingError(lacking)):
        job.say(f"left out: {skipped.metric}: {skipped.reason}")
        judged.skipped.append(skipped)
    return None


def _numbers_of(judge: Judge | SetJudge, of_set: bool, drawn: Drawn, job: _Job) -> dict[str, list[float]]:
    """The judge's numbers of one model's pictures by column, kept from an earlier call where nothing has changed."""
    ranks = job.ranks
    names = [measure.name for measure in judge.measures] if of_set else list(judge.columns)
    slug = re.sub(r"[^\w.-]+", "-", judge.name)
    place = job.output / _SCORES / drawn.label / f"{slug}-{_digest(judge.name)[:6]}.parquet"
    of_what = [[item.index, item.prompt, dict(item.extra)] for item in job.items]
    made_by = _digest([__version__, judge.record, names, of_what, drawn.content])
    kept = ranks.from_rank_0(_kept(place, made_by, names) if ranks.leads else None)
    if kept is not None:
        return kept
    batches = _batches(drawn, job)
    share = [batches[number] for number in ranks.share(len(batches))]
    own: list[dict[str, list[float]]] = []
    with ranks.together(), CountProgress(len(share), f"{judge.name} on {drawn.label}") as progress:
        for done, pictures in enumerate(_ahead(_decode, share), 1):
            if of_set:
                judge.update(pictures)
            else:
                own.append({name: values.tolist() for name, values in judge(pictures).items()})
            progress.update(done)
    with ranks.together():
        if of_set:
            numbers = {name: [value] for name, value in judge.compute(ranks).items()}
        else:
            in_order = [batch for each in ranks.gather(own) for batch in each]
            numbers = {name: [value for batch in in_order for value in batch[name]] for name in names}
    with ranks.together():
        if ranks.leads:
            _keep(place, made_by, numbers)
    return numbers


def _batches(drawn: Drawn, job: _Job) -> list[list[tuple[Item, Path]]]:
    """Pictures with what they are of, ``batch_size`` at a time, those of a prompt never apart."""
    images = job.benchmark.images_per_prompt
    pictures = [(item, file) for (item, _), file in zip(job.pictures(), drawn.files, strict=True)]
    size = max(1, job.request.batch_size // images) * images
    return [pictures[part] for part in chunks(len(pictures), size)]


def _ahead(work: Callable[[Any], Any], inputs: Sequence[Any]) -> Iterator[Any]:
    """What ``work`` makes of each input, in order, done while the one before is used."""
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(_AHEAD) as pool:
        for each in inputs:
            waiting.append(pool.submit(work, each))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _decode(batch: Sequence[tuple[Item, Path]]) -> list[Picture]:
    """Pictures of a batch; SrpoError for one that cannot be read, because none is ever left out."""
    return [Picture(item, torch.from_numpy(np.array(open_picture(file)))) for item, file in batch]


def _kept(place: Path, made_by: str, names: Sequence[str]) -> dict[str, list[float]] | None:
    """What an earlier call wrote to ``place`` of the same pictures; None where there is no such thing."""
    if not place.is_file():
        return None
    try:
        table = pd.read_parquet(place)
    except (OSError, ValueError):  # cut off, or not ours: judged again
        return None
    if table.attrs.get(_MADE_BY) != made_by:
        return None
    return {name: table[name].tolist() for name in names}


def _keep(place: Path, made_by: str, numbers: Mapping[str, Sequence[float]]) -> None:
    table = pd.DataFrame(numbers)
    table.attrs[_MADE_BY] = made_by
    with disk_errors(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, table.to_parquet(index=False))


# --- adding up ----------------------------------------------------------------------------------------------------


def _table(drawn: Sequence[Drawn], judged: Judged, job: _Job) -> pd.DataFrame:
    """A row a picture: what it is of, where it is, and what the judges said."""
    pictures = job.pictures()
    about = {
        "item": [item.id for item, _ in pictures],
        "group": [item.group for item, _ in pictures],
        "prompt": [item.prompt for item, _ in pictures],
        "image": [image for _, image in pictures],
        "seed": [job.benchmark.first_seed(item.index) + image for item, image in pictures],
    }
    parts = []
    for each in drawn:
        files = [os.path.relpath(file, job.output) for file in each.files]
        numbers = judged.columns.get(each.label, {})
        parts.append(pd.DataFrame({"model": each.label, **about, "file": files, **numbers}))
    return pd.concat(parts, ignore_index=True)


def _summary(table: pd.DataFrame, drawn: Sequence[Drawn], judged: Judged, job: _Job) -> dict[str, Any]:
    """What ``results.json`` holds."""
    own = next((each.facts for each in drawn if each.facts["steps"] is not None), {})
    protocol = {
        **_protocol(job),
        "steps": own.get("steps"),
        "size": own.get("size"),
        "judges": judged.records,
    }
    result = summarise(
        table,
        judged.measures,
        job.benchmark,
        protocol,
        [each.facts for each in drawn],
        judged.skipped,
        judged.sets,
        {each.label: each.cost for each in drawn if each.cost},
    )
    return {**result, "prompts": {"origin": job.prompts.origin, "files": dict(job.prompts.files)}}
