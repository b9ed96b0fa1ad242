"""The prompts of a benchmark: found, checked against what the benchmark says of them, and chosen from."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from srpo_cli.config.benchmark import Benchmark, PromptsSource
from srpo_cli.errors import MissingError, SrpoError, UsageError, one_line
from srpo_cli.registry import HubFiles
from srpo_cli.runtime.fetch import GithubFile, cached, download_command, fetch, fetch_file
from srpo_cli.runtime.prompts import read_prompts

Announce = Callable[[str], None]

_GROUPED_BY = ("group", "style", "category")
_FILES, _ARCHIVES = "https://raw.githubusercontent.com", "https://github.com"
Row = tuple[str, str, dict[str, Any]]
"""Group, prompt, and what else a file says of it."""


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark.

    Attributes:
        index: its place in the whole benchmark, which its seeds come from; a choice of prompts does not change it.
        group: style, category or task; empty where the benchmark has none.
        number: its place in its group.
        prompt: what the picture is drawn from.
        extra: what else the file says of it, such as the objects that GenEval asks for.
    """

    index: int
    group: str
    number: int
    prompt: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def id(self) -> str:
        """Its name in tables and paths, unique in the benchmark."""
        return f"{self.group}/{self.number:05d}" if self.group else f"{self.index:05d}"


@dataclass(frozen=True)
class PromptSet:
    """A benchmark's prompts, and which ones they are.

    Attributes:
        items: the prompts in their order.
        sha256: of the JSON of [[group, prompt], ...], which tells two sets of prompts apart.
        origin: where they were found, for people.
        files: by the path that the benchmark states, the sha256 of the bytes of what was read.
        unverified: those of a repository's files that the benchmark states no digest of.
    """

    items: tuple[Item, ...]
    sha256: str
    origin: str
    files: Mapping[str, str] = field(default_factory=dict)
    unverified: tuple[str, ...] = ()


def load_items(benchmark: Benchmark, given: Path | None = None, announce: Announce | None = None) -> PromptSet:
    """The prompts of a benchmark, checked against the digests and counts that it states.

    Args:
        benchmark: says where they are and how they are written.
        given: its file, or a folder that holds its files under their published names; None: a cache.
        announce: what to tell of a download before it starts; None: nothing is downloaded.

    Raises MissingError with the command that fetches what is not here, SrpoError for files that are not the stated
    ones, UsageError for files that cannot be read and for one's own where the benchmark states something else.
    """
    source = benchmark.prompts
    if source.layout == "world":
        files, origin, digests = {}, "the miniature's world", {}
        rows = _world(benchmark, given)
    else:
        files, origin = _find(benchmark, given, announce)
        digests = {name: _digest(name, path) for name, path in files.items()}
        _check_digests(benchmark, files, digests, given)
        rows = [row for name, path in files.items() for row in _READERS[source.layout](name, path)]
    items = _number(rows, origin)
    _check_counts(benchmark, items, origin, given)
    first = source.first_of_group
    items = [item for item in items if first is None or item.number < first]
    content = json.dumps([[item.group, item.prompt] for item in items])
    unverified = tuple(name for name in files if source.repo and name not in source.sha256)
    return PromptSet(tuple(items), hashlib.sha256(content.encode()).hexdigest(), origin, digests, unverified)


def select(items: Sequence[Item], limit: int | None = None, group: str | None = None) -> tuple[Item, ...]:
    """Some of the items, in their order: those of a group, and of these the first ones of every group alike.

    Args:
        limit: how many, at least 1, spread evenly over the groups; where they do not divide, or a group has fewer, the
            earlier groups and the longer ones give one more. None: all.
        group: the name of a group; None: all groups.

    Raises UsageError for a group that there is not.
    """
    groups = list(dict.fromkeys(item.group for item in items))
    if group is not None:
        if groups == [""]:
            raise UsageError(f"there is no group {group!r}: this benchmark has no groups")
        if group not in groups:
            raise UsageError.unknown("group", group, groups)
        items = [item for item in items if item.group == group]
    if limit is not None:
        items = sorted(items, key=lambda item: (item.number, groups.index(item.group)))[:limit]
    return tuple(sorted(items, key=lambda item: item.index))


def picture_path(benchmark: Benchmark, item: Item, image: int = 0) -> str:
    """Where a folder of pictures made elsewhere keeps a picture of a prompt, without ending."""
    path = benchmark.picture_path or "{id}"
    if benchmark.images_per_prompt > 1 and "{image" not in path:
        path += "-{image}"
    name = item.extra.get("name", "")
    path = path.format(id=item.id, group=item.group, number=item.number, index=item.index, image=image, name=name)
    return path.lstrip("/")  # of a prompt without a group


# Finding


def _find(benchmark: Benchmark, given: Path | None, announce: Announce | None) -> tuple[dict[str, Path], str]:
    """Each of the benchmark's files by its stated path, and where they come from."""
    source = benchmark.prompts
    if given is not None:
        return _given(benchmark, given), str(given)
    if source.repo is None:
        folder = benchmark.folder or Path()
        return {name: _existing(folder / name, benchmark) for name in source.files}, str(folder)
    fetched = _from_hub if source.hub == "dataset" else _from_github
    files = fetched(benchmark, announce)
    return files, f"{source.repo}@{source.revision or 'newest'}"


def _existing(path: Path, benchmark: Benchmark) -> Path:
    if not path.exists():
        raise MissingError(f"{benchmark.name}: there are no prompts at {path}: give the file with --prompts")
    return path


def _given(benchmark: Benchmark, given: Path) -> dict[str, Path]:
    """What the user gave, by the stated paths: the one file itself, or a folder with the files at or below it."""
    source = benchmark.prompts
    _existing(given, benchmark)
    if given.is_file() or (source.layout == "folder" and any(given.glob("*.txt"))):
        if len(source.files) > 1:
            names = ", ".join(Path(name).name for name in source.files)
            raise UsageError(f"{benchmark.name} has {len(source.files)} files: give the folder with {names}")
        return {source.files[0]: given}
    found: dict[str, Path] = {}
    for name in source.files:
        places = (given / name, given / Path(name).name)
        place = next((place for place in places if place.exists()), None)
        if place is None:
            raise MissingError(f"{given} holds no {Path(name).name}, which {benchmark.name} needs")
        found[name] = place
    return found


def _from_hub(benchmark: Benchmark, announce: Announce | None) -> dict[str, Path]:
    files, revision = _hub_files(benchmark.prompts), benchmark.prompts.revision
    folder = cached(files, revision)
    if folder is None:
        if announce is None:
            raise _missing(benchmark)
        folder = fetch(files, announce, revision)
    return {name: folder / name for name in files.files}


def _from_github(benchmark: Benchmark, announce: Announce | None) -> dict[str, Path]:
    files = _github_files(benchmark.prompts)
    missing = [file for file in files.values() if not file.place.is_file()]
    if missing and announce is None:
        raise _missing(benchmark)
    for file in missing:
        fetch_file(file, announce)
    return {name: file.place for name, file in files.items()}


def _hub_files(source: PromptsSource) -> HubFiles:
    return HubFiles(source.repo, source.files, repo_type="dataset")


def _github_files(source: PromptsSource) -> dict[str, GithubFile]:
    """Files as GitHub serves them; for a folder the archive of the whole repository, since it serves no folders."""
    revision = source.revision or "HEAD"
    if source.layout == "folder":
        return {source.files[0]: GithubFile(f"{_ARCHIVES}/{source.repo}/archive/{revision}.zip", "")}
    site = f"{_FILES}/{source.repo}/{revision}"
    return {name: GithubFile(f"{site}/{quote(name)}", "") for name in source.files}


def _missing(benchmark: Benchmark) -> MissingError:
    given = "FILE" if len(benchmark.prompts.files) == 1 and benchmark.prompts.layout != "folder" else "FOLDER"
    return MissingError(
        f"the prompts of {benchmark.name} are not here: fetch them with {_commands(benchmark.prompts)}, add "
        f"--download, or give --prompts {given}"
    )


def _commands(source: PromptsSource) -> str:
    """What fetches the files, or fetches them anew."""
    if source.hub == "dataset":
        return f"`{download_command(_hub_files(source), source.revision)}`"
    return " and ".join(f"`{file.download}`" for file in _github_files(source).values())


# Reading


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"cannot read prompts from {path}: {reason}") from error


def _lists(name: str, path: Path) -> Iterator[Row]:
    try:
        prompts = json.loads(_text(path))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({one_line(error)}): it should be a list of prompts") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UsageError(f"{path} should be a JSON list of prompts, each a text")
    return ((Path(name).stem, prompt, {}) for prompt in prompts)


def _lines(_name: str, path: Path) -> Iterator[Row]:
    return (("", prompt, {}) for prompt in dict.fromkeys(read_prompts(str(path))))


def _tsv(_name: str, path: Path) -> Iterator[Row]:
    rows = csv.DictReader(_text(path).split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
    if not {"Prompt", "Category"} <= set(rows.fieldnames or ()):
        columns = ", ".join(rows.fieldnames or ["none"])
        raise UsageError(f"{path} should have columns Prompt and Category: its columns are {columns}")
    for row in rows:
        extra = {name.lower(): text for name, text in row.items() if name and name not in ("Prompt", "Category")}
        yield (row["Category"] or "").strip(), row["Prompt"] or "", extra


def _geneval(_name: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            wanted = [*row["include"], *row.get("exclude", [])]
            proper = all(isinstance(each["class"], str) and isinstance(each["count"], int) for each in wanted)
            proper = proper and isinstance(row["tag"], str) and isinstance(row["prompt"], str)
        except (ValueError, KeyError, TypeError, AttributeError):
            proper = False
        if not proper:
            raise UsageError(
                f"{path}, line {number}: not an object with tag, prompt and include, as GenEval's "
                "evaluation_metadata.jsonl has"
            )
        yield row["tag"], row["prompt"], {"exclude": [], **{k: v for k, v in row.items() if k != "prompt"}}


def _texts(name: str, path: Path) -> dict[str, bytes]:
    """The .txt of a folder by their names and in the order of these, or of that folder in the archive of a repository.

    Args:
        name: the folder's path in the repository.
        path: a folder, or an archive.
    """
    if path.is_dir():
        return {file.name: file.read_bytes() for file in sorted(path.glob("*.txt"))}
    folder = PurePosixPath(name).parts
    try:
        with zipfile.ZipFile(path) as archive:
            places = [PurePosixPath(place) for place in archive.namelist() if place.endswith(".txt")]
            inside = [place for place in places if place.parent.parts[-len(folder) :] == folder]
            return {place.name: archive.read(str(place)) for place in sorted(inside)}
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is neither a folder of .txt nor an archive with one ({one_line(error)})") from error


def _folder(name: str, path: Path) -> Iterator[Row]:
    for file, content in _texts(name, path).items():
        try:
            yield "", content.decode("utf-8-sig"), {"name": Path(file).stem}
        except UnicodeError as error:
            raise UsageError(f"cannot read the prompt {file} of {path}: not UTF-8 text") from error


def _table(_name: str, path: Path) -> Iterator[Row]:
    prompts = read_prompts(str(path))
    rows = [row for row in _columns(path) if (row["prompt"] or "").strip()]
    by = next((name for name in _GROUPED_BY if any(row.get(name) for row in rows)), None)
    groups = [str(row.get(by) or "").strip() for row in rows] if by else [""] * len(prompts)
    if by and "" in groups:
        raise UsageError(f"{path}: {prompts[groups.index('')]!r} has no {by}: give every prompt one, or none")
    return ((group, prompt, {}) for group, prompt in zip(groups, prompts, strict=True))


def _columns(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of prompts that has columns, of which ``read_prompts`` has found them readable."""
    kind = path.suffix.lower()
    if kind == ".csv":
        return list(csv.DictReader(io.StringIO(_text(path), newline="")))
    if kind == ".jsonl":
        return [json.loads(line) for line in _text(path).split("\n") if line.strip()]
    if kind != ".parquet":
        return []
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if name in ("prompt", *_GROUPED_BY)]
        return file.read(names).to_pylist()


_READERS: dict[str, Callable[[str, Path], Iterator[Row]]] = {
    "lists": _lists,
    "lines": _lines,
    "tsv": _tsv,
    "geneval": _geneval,
    "folder": _folder,
    "table": _table,
}


def _world(benchmark: Benchmark, given: Path | None) -> list[Row]:
    from srpo_cli.miniature.world import draw_prompts  # imports torch

    if given is not None:
        raise UsageError(
            f"{benchmark.name} draws its prompts from the miniature's world and takes no --prompts: for those of "
            f"{given} use --benchmark {given}"
        )
    return [("", prompt, {}) for prompt in draw_prompts(benchmark.prompts.count, 0, "evaluation")]


def _number(rows: Iterable[Row], origin: str) -> list[Item]:
    """Rows as items, each with its place among all and in its group."""
    numbers: Counter[str] = Counter()
    items = []
    for index, (group, prompt, extra) in enumerate(rows):
        if not prompt.strip():
            raise UsageError(f"prompt {index + 1} of {origin} is empty")
        if group.startswith(".") or not group.isprintable() or {"/", "\\"} & set(group):
            raise UsageError(f"group {group!r} of {origin} cannot be the name of a folder: give it another name")
        items.append(Item(index, group, numbers[group], prompt.strip(), extra))
        numbers[group] += 1
    if not items:
        raise UsageError(f"{origin} holds no prompt")
    return items


# Checking


def _digest(name: str, path: Path) -> str:
    """The sha256 of a file's bytes; of a folder, or of one in an archive, that of what ``sha256sum`` prints of it."""
    if path.is_dir() or zipfile.is_zipfile(path):
        lines = [f"{hashlib.sha256(content).hexdigest()}  {file}\n" for file, content in _texts(name, path).items()]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read prompts from {path}: {error.strerror}") from error


def _check_digests(
    benchmark: Benchmark, files: Mapping[str, Path], digests: Mapping[str, str], given: Path | None
) -> None:
    for name, expected in benchmark.prompts.sha256.items():
        if digests[name] != expected:
            raise _refusal(
                benchmark,
                f"{files[name]} is not the {name} of {benchmark.name}: its sha256 is {digests[name]}, expected is "
                f"{expected}",
                given,
                "sha256",
            )


def _check_counts(benchmark: Benchmark, items: Sequence[Item], origin: str, given: Path | None) -> None:
    source = benchmark.prompts
    problem = _wrong_groups(source, items) or _wrong_count(source, items)
    if problem:
        key = "groups" if source.groups else "count"
        raise _refusal(benchmark, f"{origin} holds {problem}", given, key)


def _wrong_groups(source: PromptsSource, items: Sequence[Item]) -> str:
    """What is first amiss with the groups, as the end of "holds ..."; empty where nothing is."""
    found = Counter(item.group for item in items)
    if not source.groups or list(found.items()) == list(source.groups.items()):
        return ""
    for group, count in source.groups.items():
        if found[group] != count:
            return f"{found[group]} prompts of {group}, expected are {count}"
    strange = [group for group in found if group not in source.groups]
    if strange:
        return f"a group {strange[0]!r}, expected are {', '.join(source.groups)}"
    return f"groups in the order {', '.join(found)}, expected is {', '.join(source.groups)}"


def _wrong_count(source: PromptsSource, items: Sequence[Item]) -> str:
    if source.count in (None, len(items)):
        return ""
    return f"{len(items)} prompts, expected are {source.count}"


def _refusal(benchmark: Benchmark, problem: str, given: Path | None, key: str) -> SrpoError:
    """The error of prompts that are not the stated ones, with what to do: of one's own, change what ``key`` states."""
    if benchmark.prompts.repo is None:
        return UsageError(f"{problem}: change prompts.{key} in {benchmark.name}'s .yaml, or take it out there")
    if given is None:
        again = f"fetch it anew with {_commands(benchmark.prompts)}, or give the right one with --prompts"
        return SrpoError(f"{problem}: {again}")
    return SrpoError(
        f"{problem}: give what {benchmark.name} states, or write a benchmark of your own that says "
        f"`extends: {benchmark.name}` and states what there is"
    )
