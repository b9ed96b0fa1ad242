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
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from srpo_cli import __version__
from srpo_cli.config.benchmark import Benchmark, describe
from srpo_cli.errors import MissingError, SrpoError, UsageError, one_line
from srpo_cli.metrics.aggregate import ALL, Measure
from srpo_cli.pages.report import ANALYSIS, write_report
from srpo_cli.recipes import sample as drawing
from srpo_cli.recipes.judges import Judge, JudgePlan, Picture, SetJudge, Skipped, plan_judges
from srpo_cli.recipes.parts import check_miniature_prompts, chunks
from srpo_cli.recipes.results import RESULTS, Result, merge, read_result, summarise, write_result, write_tables
from srpo_cli.runtime.benchmarks import Item, PromptSet, load_items, picture_path, select
from srpo_cli.runtime.devices import best_device
from srpo_cli.runtime.distributed import Ranks
from srpo_cli.runtime.folder import disk_errors, write_atomically
from srpo_cli.runtime.inputs import ENDINGS
from srpo_cli.runtime.pictures import METADATA_KEY, open_picture
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
        _check_measures(request, plans)
        found = {label: _find(path, job) for label, path in request.models.items() if isinstance(path, Path)}
        size = _common_size(found, job)
        if not _is_cut_off(output):
            _check_folder(output, _protocol(job))
        else:
            say(f"{output / RESULTS} cannot be read: it is written anew")
        earlier = _costs(output)
        with disk_errors(output):
            is_new = not output.exists()
            output.mkdir(parents=True, exist_ok=True)
    with _no_empty_folder(output, is_new):
        by_label = {label: _take(label, files, size, job) for label, files in found.items()}
        for label, model in request.models.items():
            if label not in found:
                drawn_now = _draw(label, model, list(by_label.values()), job)
                by_label[label] = replace(drawn_now, cost=_with_earlier(drawn_now, earlier))
    drawn = [by_label[label] for label in request.models]
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
    if len(results) > 1:
        data["commands"] = list(chain.from_iterable(_commands(result.data) for result in results))
    if output is not None:
        _publish(Result(data, table, output))
    return data


def _commands(result: Mapping[str, Any]) -> list[list[str]]:
    """What was typed for a result, or for each of those that it was put together from."""
    return result.get("commands") or [result["environment"].get("command", [])]


def _publish(result: Result) -> None:
    """All files that are made of a result."""
    write_result(result)
    write_tables(result.data, result.folder)
    pictures = 0 if result.table is None else len(result.table)
    with disk_errors(result.folder), CountProgress(pictures, "thumbnails") as progress:
        study = _study(result)
        write_report(result.folder, result.data, result.table, study, lambda made, _of_all: progress.update(made))


def _study(result: Result) -> dict[str, Any] | None:
    """What people said of the result's models, where `srpo eval rate analyze --with` has put it into its folder."""
    file = result.folder / ANALYSIS
    if not file.exists():
        return None
    try:
        analysis = json.loads(file.read_text(encoding="utf-8"))
        known = {model["label"] for model in result.data["models"]}.intersection(analysis["arms"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no analysis of srpo eval rate: take it out of the folder") from error
    return analysis if known else None


# --- before -------------------------------------------------------------------------------------------------------


def _protocol(job: _Job) -> dict[str, Any]:
    """What is known of the protocol before anything is drawn; which prompts, and not by which options."""
    return {
        "benchmark": describe(job.benchmark),
        "prompts_sha256": job.prompts.sha256,
        "prompt_count": len(job.items),
        "items": _digest([item.id for item in job.items]),
    }


def _is_cut_off(output: Path) -> bool:
    """Whether a folder's own result is not to be read; it is made again of the pictures and scores beside it."""
    try:
        json.loads((output / RESULTS).read_text(encoding="utf-8"))
    except OSError:
        return False
    except ValueError:
        return (output / _SCORES).is_dir() or (output / _PICTURES).is_dir()
    return False


def _costs(output: Path) -> dict[tuple[str, str], dict[str, float]]:
    """What the folder's result says of what was spent, by label and fingerprint of a model."""
    try:
        there = json.loads((output / RESULTS).read_text(encoding="utf-8"))
        prints = {model["label"]: model["fingerprint"] for model in there["models"]}
        return {(label, prints[label]): dict(spent) for label, spent in there["cost"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _with_earlier(drawn: Drawn, earlier: Mapping[tuple[str, str], Mapping[str, float]]) -> dict[str, float]:
    before = earlier.get((drawn.label, drawn.facts["fingerprint"]), {})
    return {key: round(spent + before.get(key, 0), 1) for key, spent in drawn.cost.items()}


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
            is_short = not isinstance(value, dict | list) and key not in ("prompts_sha256", "items")
            what = f"{key} {json.dumps(there.get(key))}, not {json.dumps(value)}" if is_short else f"another {key}"
            raise UsageError(f"{output} holds a result of {there['name']} with {what}: choose another --output")


def _terms(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a protocol that decide which pictures are drawn and how they are added up."""
    own = {key: protocol[key] for key in ("prompts_sha256", "prompt_count", "items")}
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


def _check_measures(request: Request, plans: Sequence[JudgePlan]) -> None:
    """UsageError for a measure that no metric gives, and for one of a model that is not there."""
    known = dict.fromkeys(text for plan in plans for pair in plan.headings.items() for text in pair)
    small = {text.lower() for text in known}
    for name in request.bounded:
        label, _, measure = name.partition(":")
        if name.lower() not in small and measure.lower() in small:
            raise UsageError(
                f"{name}: no model is called {label!r} (there are {', '.join(request.models)}), and no measure {name!r}"
            )
        if name.lower() not in small:
            raise UsageError.unknown("measure", name, known)


# --- pictures -----------------------------------------------------------------------------------------------------


def _draw(label: str, model: Source, before: Sequence[Drawn], job: _Job) -> Drawn:
    """One model's pictures, drawn where they are missing.

    UsageError, after its first pictures, where steps or size are its own and not those of the models ``before``.
    """
    benchmark, folder = job.benchmark, job.output / _PICTURES / label
    started, there = time.perf_counter(), _times(folder.glob("*-seed*.png"))
    kept = f"; of the {len(there)} there what matches is kept" if there else ""
    job.say(f"{label}: drawing {len(job.pictures())} pictures of {len(job.items)} prompts{kept}")
    wanted = drawing.Request(
        prompts=[item.prompt for item in job.items],
        num_images=benchmark.images_per_prompt,
        steps=benchmark.steps,
        guidance=benchmark.guidance,
        size=benchmark.size,
        seeds=[benchmark.first_seed(item.index) for item in job.items],
    )
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
    with job.ranks.together():
        times = _times(dict.fromkeys(files))
    cost = {
        "seconds": round(time.perf_counter() - started, 1),
        "pictures_drawn": sum(there.get(name) != changed for name, changed in times.items()),
    }
    settings = {key: row[key] for key in ("model", "weights", "fingerprint", "steps", "size")}
    facts = {"label": label, **settings, "pictures": len(files), "folder": f"{_PICTURES}/{label}"}
    return Drawn(label, files, facts, _content(files, job.ranks), cost)


def _times(files: Iterable[Path]) -> dict[str, int]:
    """When each file was last written, by its name; SrpoError for one that another machine has drawn out of sight."""
    try:
        return {file.name: file.stat().st_mtime_ns for file in files}
    except FileNotFoundError as error:
        raise SrpoError(
            f"{error.filename} was drawn and is not here: with --nodes all machines have to share --output"
        ) from error


def _check_settings(label: str, row: Mapping[str, Any], before: Sequence[Drawn]) -> None:
    for other in before:
        for key in ("steps", "size"):
            if other.facts[key] not in (None, row[key]):
                raise UsageError(
                    f"{label} has {key} {row[key]} of its own, and {other.label} {other.facts[key]}: say in a "
                    f"benchmark's .yaml which {key} both are to have"
                )


def _find(folder: Path, job: _Job) -> list[Path]:
    """The pictures of a folder, one for each prompt and number; UsageError where any is missing or there twice.

    A folder that this program drew into lists its pictures, which are found by prompt and seed; in any other they have
    the names that the benchmark gives them.
    """
    if (folder / drawing.SAMPLES).is_file():
        return _find_drawn(folder, job)
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
            f"{folder} is taken for pictures made elsewhere, and has no {missing[0]}.png or the like{more}: name them "
            f"so, or give a folder with a {drawing.SAMPLES}"
        )
    return files


def _find_drawn(folder: Path, job: _Job) -> list[Path]:
    """The pictures of a folder that ``srpo sample`` or ``srpo eval`` drew into, by prompt and seed."""
    there: dict[tuple[str, int], list[Path]] = {}
    try:
        for line in (folder / drawing.SAMPLES).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            there.setdefault((row["prompt"], row["seed"]), []).append(folder / row["file"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / drawing.SAMPLES} does not list pictures with prompt, seed and file") from error
    files: list[Path] = []
    for item, image in job.pictures():
        seed = job.benchmark.first_seed(item.index) + image
        own = [file for file in there.get((item.prompt, seed), []) if file.is_file()]
        if not own:
            raise UsageError(
                f"{folder} has no picture of {item.prompt!r} with seed {seed} in its {drawing.SAMPLES}: draw it, or "
                "say in a benchmark's .yaml which seed and seed_step its pictures have"
            )
        if len(own) > 1:
            raise UsageError(
                f"{folder} has {own[0].name} and {own[1].name} of {item.prompt!r} with seed {seed}, by different "
                "models or settings: take those of one of them out"
            )
        files += own
    return files


def _common_size(found: Mapping[str, Sequence[Path]], job: _Job) -> list[int] | None:
    """[height, width] of the pictures that were made elsewhere; None where there are none.

    UsageError for one that differs from the others, or from what the benchmark states, and for one of another prompt.
    """
    size, whose = list(job.benchmark.size or ()), f"{job.benchmark.name} asks for"
    files = list(chain.from_iterable(found.values()))
    items = [item for _ in found for item, _ in job.pictures()]
    with ThreadPoolExecutor() as pool:
        for file, item, (own, prompt) in zip(files, items, pool.map(_head_of, files), strict=True):
            if prompt not in (None, item.prompt):
                raise UsageError(
                    f"{file} was drawn from {prompt!r}, and should be of {item.prompt!r}: put it in its place"
                )
            if not size:
                size, whose = own, f"{file} has"
            if own != size:
                told, other = (" by ".join(map(str, each)) for each in (own, size))
                raise UsageError(
                    f"{file} has {told} pixels (height by width) and {whose} {other}: give pictures of one size, and "
                    "say in a benchmark's .yaml which"
                )
    return size if files else None


def _head_of(path: Path) -> tuple[list[int], str | None]:
    """[height, width] of a picture and, where this program drew it, its prompt, by what stands at the file's head."""
    try:
        with Image.open(path) as image:
            prompt = None
            with suppress(KeyError, ValueError, TypeError, AttributeError):
                prompt = json.loads(image.info[METADATA_KEY]).get("prompt")
            return [image.height, image.width], prompt
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SrpoError(f"cannot read {path}: {one_line(error)}") from error


def _take(label: str, files: Sequence[Path], size: Sequence[int], job: _Job) -> Drawn:
    """Pictures that were made elsewhere, nobody knows how."""
    folder = job.request.models[label]
    job.say(f"{label}: {len(files)} pictures in {folder}")
    content = _content(files, job.ranks)
    facts = {"label": label, "model": "pictures made elsewhere", "weights": None, "fingerprint": content}
    facts |= {"steps": None, "size": size, "sampling": "unknown", "pictures": len(files)}
    return Drawn(label, files, {**facts, "folder": os.path.relpath(folder, job.output)}, content, {})


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
    steps = next((each.facts["steps"] for each in drawn if each.facts["steps"] is not None), None)
    protocol = {**_protocol(job), "steps": steps, "size": drawn[0].facts["size"], "judges": judged.records}
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
    is_part = len(job.items) < len(job.prompts.items)
    prompts = job.prompts
    return {
        **result,
        "selection": {key: getattr(job.request, key) if is_part else None for key in ("limit", "group")},
        "prompts": {"origin": prompts.origin, "files": dict(prompts.files), "unverified": list(prompts.unverified)},
    }
