"""A benchmark is data: which prompts, how pictures are drawn from them, what is measured, and how that is added up.

The built-in ones are files beside this module, in ``benchmarks/``; a user's own has the same keys, and may extend
another one by ``extends: NAME|FILE``: its own keys win, those of a section one by one. Figures that somebody
published for the other one are not taken over, and of its prompts nothing where the file names prompts of its own.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from srpo_cli.config import dialect
from srpo_cli.config.document import Keys, read_keys, short
from srpo_cli.config.load import MINIATURE
from srpo_cli.config.schema import ControlWords, Number, Section, Whole, Words
from srpo_cli.errors import UsageError

Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]

Layout = Literal["lists", "lines", "tsv", "geneval", "folder", "table", "world"]

PICTURE_FIELDS = ("id", "group", "number", "index", "image", "name")
"""What ``picture_path`` may hold."""


class PromptsSource(Section):
    """Where a benchmark's prompts are, and how to know that they are the right ones."""

    layout: Layout = Field(
        "table",
        description="lists: a JSON list of prompts in a file for each group, named by it; lines: one prompt a line, "
        "each taken once; tsv: columns Prompt and, for the group, Category; geneval: GenEval's "
        "evaluation_metadata.jsonl; folder: one .txt for each prompt, in the order of their names; table: anything "
        "that `srpo sample --prompts` reads, with a column group, style or category for the group; world: the "
        "miniature's evaluation captions",
    )
    repo: Words | None = Field(
        None, description="OWNER/NAME of a repository that holds the files; null: they are beside the benchmark's file"
    )
    hub: Literal["dataset", "github"] | None = Field(
        None, description="what kind of repository it is: a data set of the Hugging Face Hub, or one of GitHub"
    )
    revision: Words | None = Field(None, description="commit of the repository; null: the newest")
    files: tuple[Words, ...] = Field((), description="paths of its files, in order; of layout folder the one folder")
    sha256: dict[str, Digest] = Field(
        {},
        description="by the path of a file, the digest of its bytes; of a folder, that of the lines `DIGEST  NAME` "
        "that sha256sum prints of its .txt in the order of their names",
    )
    groups: dict[Words, Whole] = Field({}, description="prompts in each group, in order; empty: whatever is there")
    first_of_group: Whole | None = Field(None, ge=1, description="take only so many prompts of each group; null: all")
    count: Whole | None = Field(
        None, ge=1, description="prompts in all, before first_of_group; null: those of groups, or whatever is there"
    )
    licence: str = Field("", description="under which they are published")

    @model_validator(mode="after")
    def _files_can_be_found(self) -> PromptsSource:
        if (self.repo is None) != (self.hub is None):
            raise ValueError(
                f"prompts.repo is {dialect.inline(self.repo)} and prompts.hub is {dialect.inline(self.hub)}: "
                "give both, or set both to null"
            )
        if self.layout == "world":
            if self.files or self.repo or self.count is None:
                raise ValueError("prompts.layout is world: it takes no files and no repo, and needs prompts.count")
        elif not self.files or (self.layout == "folder" and len(self.files) > 1):
            needed = "one folder" if self.layout == "folder" else "at least one file"
            raise ValueError(
                f"prompts.files is {dialect.inline(list(self.files))}: layout {self.layout} needs {needed}"
            )
        for file in self.files:
            path = PurePosixPath(file)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"prompts.files holds {file!r}: should be paths inside the repository or folder")
        return self

    @model_validator(mode="after")
    def _counts_agree(self) -> PromptsSource:
        total = sum(self.groups.values())
        if self.groups and self.count not in (None, total):
            raise ValueError(f"prompts.count is {self.count} and prompts.groups add up to {total}: set count to null")
        strange = sorted(self.sha256.keys() - set(self.files))
        if strange:
            raise ValueError(f"prompts.sha256 names {strange[0]!r}, which is not in prompts.files")
        return self


class PublishedRow(Section):
    """A model's figures as somebody published them."""

    model: Words
    figures: dict[str, Number] = Field(description="by the name of a measure, or its heading in small letters")


class Published(Section):
    """Rows of somebody's table, to stand next to the measured ones."""

    source: Words
    note: str = Field("", description="in what they may differ from what is measured here")
    rows: tuple[PublishedRow, ...]


class Benchmark(Section):
    """The protocol of a benchmark: all that has to be equal where two results are compared."""

    name: Words
    description: Words = Field(description="one line")
    prompts: PromptsSource
    images_per_prompt: Whole = Field(1, ge=1, le=64, description="pictures of each prompt")
    seed: Whole = Field(0, ge=0, description="seed of the first prompt's first picture; the next pictures count up")
    seed_step: Whole = Field(1000, ge=0, description="how much further each prompt's first seed is than the last one's")
    steps: Whole | None = Field(None, ge=1, description="sampling steps; null: the model's own")
    guidance: Number = Field(3.5, ge=0, description="distilled guidance scale")
    size: tuple[Whole, Whole] | None = Field(None, description="[height, width] in pixels; null: the model's own")
    metrics: tuple[Words, ...] = Field(
        min_length=1,
        description="rewards by name, `sgp:REWARD` for the gap between the control words, and `statistics`, "
        "`diversity:REWARD`, `geneval`, `oracle`, `fid`, `kid`",
    )
    control_words: ControlWords = Field(
        ControlWords(positive=("Realistic photo",), negative=("CG Render",)), description="of `sgp:REWARD`"
    )
    overall: Literal["pictures", "groups"] = Field(
        "pictures", description="what the overall figure is a mean of: all pictures, or the means of the groups"
    )
    batches: Whole | None = Field(
        None, ge=2, description="also give mean and standard deviation over so many batches of consecutive prompts"
    )
    picture_path: str | None = Field(
        None,
        description="where a folder of pictures made elsewhere keeps them, without ending; fields: id (group/number, "
        "or index), group, number (in its group), index (over all), image, name (of the .txt, in layout folder); null: "
        "{id}. Where a prompt has several pictures, -{image} comes behind a path without {image}",
    )
    published: Published | None = Field(None, description="figures of others, shown beside what is measured")

    _folder: Path | None = PrivateAttr(None)

    @property
    def folder(self) -> Path | None:
        """Where the files of prompts without a repository are; no part of the protocol."""
        return self._folder

    def first_seed(self, index: int) -> int:
        """Seed of the first picture of the prompt with this index over the whole benchmark."""
        return self.seed + self.seed_step * index

    @field_validator("picture_path")
    @classmethod
    def _known_fields(cls, path: str | None) -> str | None:
        if path is not None:
            try:
                path.format(id="", group="", number=0, index=0, image=0, name="")
                fields = {name for _, name, _, _ in Formatter().parse(path) if name is not None}
            except (ValueError, KeyError, IndexError, AttributeError, TypeError):
                fields = {""}
            if not fields <= set(PICTURE_FIELDS):
                raise ValueError(f"should hold no other fields than {', '.join(f'{{{f}}}' for f in PICTURE_FIELDS)}")
        return path

    @model_validator(mode="after")
    def _only_files_have_names(self) -> Benchmark:
        if "{name" in (self.picture_path or "") and self.prompts.layout != "folder":
            raise ValueError(f"picture_path is {self.picture_path}: only prompts.layout folder has a {{name}}")
        return self

    @model_validator(mode="after")
    def _published_figures_are_measured(self) -> Benchmark:
        unknown = {name for row in (self.published.rows if self.published else ()) for name in row.figures}
        gaps = [name.partition(":")[2] for name in self.metrics if name.startswith("sgp:")]
        unknown -= {*self.metrics, *(f"sgp_x100:{reward}" for reward in gaps), "deqa"}  # a plug-in of anybody's
        if unknown:
            raise ValueError(f"published has figures of no metric: {', '.join(sorted(unknown))}")
        return self


BENCHMARKS_FOLDER = Path(__file__).with_name("benchmarks")
_EXTENDS = "extends"
_KEYS = Keys(Benchmark, also=(_EXTENDS,))
_ENDINGS = (".yaml", ".yml")


def benchmark_names() -> list[str]:
    """The built-in benchmarks."""
    return sorted(path.stem for path in BENCHMARKS_FOLDER.glob("*.yaml"))


def load_benchmark(name: str) -> Benchmark:
    """A built-in benchmark by name, that of a ``.yaml`` file, or one made for any other file of prompts.

    UsageError for what is none of these or has a mistake.
    """
    path = Path(name)
    if name in benchmark_names() or path.suffix.lower() in _ENDINGS:
        return _read(name)
    if path.is_file():
        return _of_prompts(path)
    if path.is_dir():
        raise UsageError(f"Benchmark {name} is a folder: name a benchmark, its .yaml or a file of prompts.")
    if path.suffix or len(path.parts) > 1:
        raise UsageError(f"Benchmark file {name!r} does not exist.")
    raise UsageError.unknown("benchmark", name, [*benchmark_names(), "a .yaml or a file of prompts"])


def describe(benchmark: Benchmark) -> dict[str, Any]:
    """The benchmark as plain data, but for what others published, which does not decide a result."""
    return benchmark.model_dump(mode="json", exclude={"published"})


def for_miniature(benchmark: Benchmark) -> Benchmark:
    """The same prompts and seeds as the miniature is measured on them: its rewards, control words, steps and size.

    A benchmark that asks for the oracle or a reward of the miniature was made for it and is left as it is. Of any
    other the plug-ins stay.
    """
    if any(name == "oracle" or MINIATURE in name.split(":") for name in benchmark.metrics):
        return benchmark
    own = load_benchmark(MINIATURE)
    diversity = [f"diversity:{MINIATURE}"] if any(n.startswith("diversity:") for n in benchmark.metrics) else []
    plugins = [name for name in benchmark.metrics if name.endswith(".py") or ".py:" in name]
    taken = ("control_words", "steps", "guidance", "size")
    return benchmark.model_copy(
        update={
            "metrics": (*own.metrics, *diversity, *plugins),
            "published": None,
            **{key: getattr(own, key) for key in taken},
        }
    )


def _of_prompts(path: Path) -> Benchmark:
    """A benchmark of somebody's prompts: a picture each, measured by what HPDv2 is measured by."""
    benchmark = Benchmark(
        name=path.stem,
        description=f"the prompts of {path.name}",
        prompts=PromptsSource(files=(path.name,)),
        metrics=load_benchmark("hpdv2").metrics,
    )
    benchmark._folder = path.parent
    return benchmark


# Reading


def _read(name: str) -> Benchmark:
    path = _path_of(name)
    content, folder = _content(path, ())
    try:
        benchmark = Benchmark.model_validate(content)
    except ValidationError as error:
        raise UsageError(_KEYS.first_problem(error, content, _origin(path))) from error
    benchmark._folder = folder
    return benchmark


def _path_of(name: str) -> Path:
    return BENCHMARKS_FOLDER / f"{name}.yaml" if name in benchmark_names() else Path(name)


def _origin(path: Path) -> str:
    return f"benchmark {path.stem if path.parent == BENCHMARKS_FOLDER else path}"


def _content(path: Path, extending: tuple[Path, ...]) -> tuple[dict[str, Any], Path]:
    """The keys of a benchmark's file, over those of the one that it extends, and where the files that they name are.

    Every key is known, no value checked.
    """
    origin = _origin(path)
    if path.resolve() in extending:
        raise UsageError(f"extends from {origin} leads back to itself.")
    own = read_keys(path, "benchmark", origin, example="extends: hpdv2")
    _KEYS.refuse_unknown(own, origin)
    base = own.pop(_EXTENDS, None)
    if base is None:
        return own, path.parent
    if not isinstance(base, str):
        raise UsageError(f"extends from {origin} should be the name of a benchmark or its .yaml, not {short(base)}.")
    if base not in benchmark_names() and Path(base).suffix.lower() not in _ENDINGS:
        raise UsageError.unknown(f"benchmark that {origin} extends:", base, [*benchmark_names(), "a .yaml"])
    place = _path_of(base) if base in benchmark_names() else path.parent / base
    below, folder = _content(place, (*extending, path.resolve()))
    below.pop("published", None)
    about = {"name": path.stem, "description": f"{path.stem}, which extends {base}"}
    prompts = own.get("prompts")
    if isinstance(prompts, dict) and {"files", "layout"} & prompts.keys():
        folder = path.parent
        if prompts.get("repo") is None:  # one's own: what is said of the other one's files is not true of them
            below = {key: value for key, value in below.items() if key not in ("prompts", "picture_path")}
    return _merged({**below, **about}, own), folder


def _merged(below: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """``own`` over ``below``, sections key by key."""
    merged = {**below, **own}
    for key in below.keys() & own.keys():
        if isinstance(below[key], dict) and isinstance(own[key], dict):
            merged[key] = {**below[key], **own[key]}
    return merged
