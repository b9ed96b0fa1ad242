"""``srpo score``: rewards of pictures, in a table, as CSV or as JSONL."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer
from rich.markup import escape

from srpo_cli.cli.launch import (
    GpusOption,
    NodeRankOption,
    NodesOption,
    RendezvousOption,
    plan_launch,
    refuse_company,
    refuse_standard_input,
    speaker,
    start,
    told_once,
)
from srpo_cli.cli.options import OptionalPresetOption, TrustOption, WeightsOption, parse_weights
from srpo_cli.cli.output import OutputFormat, RowFormat, RowWriter, print_rows
from srpo_cli.cli.plugins import admit_plugin
from srpo_cli.errors import UsageError
from srpo_cli.registry import MINIATURE_REWARDS, REWARDS

if TYPE_CHECKING:  # imports torch
    from srpo_cli.config.schema import TrainConfig
    from srpo_cli.recipes.score import Request, Summary, Wording
    from srpo_cli.runtime.inputs import Picture

_MINIATURE = "miniature"  # the model, and the reward that judges its pictures

EXAMPLES = """Examples:

srpo score images/ --pos "realistic photo" --neg "CG render"

srpo score images/ --preset realism --format csv -o scores.csv

srpo sample "a red sphere" "a blue cone on sand" -n 4 | srpo score - --reward miniature --format jsonl

srpo score images/ --reward miniature --prompt "a red sphere on grass"

srpo score images/ --check

srpo score images/ --calibrate --preset realism"""

DEFAULT_REWARD = "hpsv2.1"
_DONE_IN_PART = 3
_HEADINGS = {"gap_x100": "100 x gap", "win_rate": "win rate"}
_WIDTH = 9  # of a number in the table

PicturesArgument = Annotated[
    list[str], typer.Argument(metavar="PICTURE...", help="Pictures, folders or runs; - reads JSONL rows from stdin.")
]
RewardsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        "-r",
        metavar="NAME",
        help=f"May be repeated: {escape(', '.join(REWARDS.names))}. Without it the miniature's pictures are judged by "
        "miniature, all others by hpsv2.1.",
    ),
]
PromptOption = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="The prompt of every picture.")]
PromptsOption = Annotated[
    str | None,
    typer.Option("--prompts", metavar="FILE", help="Prompts in order, or a .jsonl or .csv with file and prompt."),
]
PositiveOption = Annotated[
    list[str] | None, typer.Option("--pos", metavar="WORDS", help="Control words to score for; may be repeated.")
]
NegativeOption = Annotated[
    list[str] | None, typer.Option("--neg", metavar="WORDS", help="Control words to score against; may be repeated.")
]
GuidedOption = Annotated[
    float | None, typer.Option("--cfg-k", metavar="K", help="Score k C_pos + (1 - k) C_neg instead of the gap.")
]
UpstreamOption = Annotated[
    float | None,
    typer.Option("--upstream-k", metavar="K", help="Score (1 + k) C_pos - C_neg, the reference code's form."),
]
PreprocessOption = Annotated[
    str | None,
    typer.Option("--preprocess", metavar="MODE", help="A reward's preprocessing, reference or training."),
]
DtypeOption = Annotated[Literal["float32", "bfloat16"], typer.Option("--dtype", help="Arithmetic of the rewards.")]
BatchOption = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Pictures judged at a time.")]
RowFormatOption = Annotated[
    RowFormat | None, typer.Option("--format", help="How rows are written; by the ending of --output, else a table.")
]
FileOption = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write to.")]
CheckOption = Annotated[
    bool, typer.Option("--check", help="Compare a reward's training path with its reference path on these pictures.")
]
CalibrateOption = Annotated[
    bool, typer.Option("--calibrate", help="Measure how each control word moves the reward on these pictures.")
]


def score(
    pictures: PicturesArgument,
    reward: RewardsOption = None,
    weights: WeightsOption = None,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    pos: PositiveOption = None,
    neg: NegativeOption = None,
    preset: OptionalPresetOption = None,
    cfg_k: GuidedOption = None,
    upstream_k: UpstreamOption = None,
    preprocess: PreprocessOption = None,
    dtype: DtypeOption = "float32",
    batch_size: BatchOption = 32,
    check: CheckOption = False,
    calibrate: CalibrateOption = False,
    row_format: RowFormatOption = None,
    output: FileOption = None,
    gpus: GpusOption = 1,
    nodes: NodesOption = None,
    rdzv: RendezvousOption = None,
    node_rank: NodeRankOption = None,
    trust: TrustOption = False,
) -> None:
    """Score pictures with a reward: plain, for control words (--pos), or for some against others (--pos --neg).

    A picture's prompt is that of --prompt or --prompts, of its row on stdin, of the .txt beside it, or of its metadata.

    An unreadable picture is a row with an error; the rest are scored, and the exit code is 3.
    """
    launch = plan_launch(gpus, nodes, rdzv, node_rank)
    say = speaker(launch)
    with told_once():
        if "-" in pictures:
            refuse_standard_input(launch, "-")
        if check or calibrate:
            refuse_company(launch, "--check" if check else "--calibrate")
        wording = _Wording(preset, pos or [], neg or [], cfg_k, upstream_k)
        names = list(dict.fromkeys(reward or []))
        for name in names or [wording.default_reward]:
            REWARDS.find(name)
            admit_plugin(name, trust, say)
        places = parse_weights(weights or [], names or [wording.default_reward, _MINIATURE])
        if not names:
            places = wording.default_weights | places
        if check and calibrate:
            raise UsageError("--check and --calibrate cannot be used together: run one after the other")
        if prompt is not None and prompts:
            raise UsageError("--prompt and --prompts cannot be used together: give one text for all, or a file")
        if prompt is not None and not prompt.strip():
            raise UsageError("--prompt is empty: give a text, or leave it out")
        if calibrate and wording.form in ("plain", "sgp"):
            raise UsageError("--calibrate needs control words on both sides: give --pos and --neg, or --preset")
        written = None if check or calibrate else RowFormat.of(row_format, output)
        sources, piped = _sources(pictures, prompt, prompts, say)
    if launch:
        start(launch)

    import torch

    from srpo_cli.recipes.score import Request

    request = Request(
        rewards=names,
        default=wording.default_reward,
        wording=wording.for_reward,
        weights=places,
        preprocess=preprocess,
        dtype=getattr(torch, dtype),
        batch_size=batch_size,
    )
    if written is None:
        failed = _study(sources, request, row_format, output, check)
    else:
        failed = _score(sources, request, wording.columns, written, output, piped, say)
    if failed:
        raise typer.Exit(_DONE_IN_PART)


def _score(
    sources: Iterable[Picture],
    request: Request,
    columns: Callable[[RowFormat], dict[str, int | None]],
    written: RowFormat,
    output: Path | None,
    piped: bool,
    say: Callable[[str], None],
) -> int:
    """Write a row for each picture and reward, and sum them up; the number of rows without a score.

    Of several ranks the first one writes; all return the same.
    """
    from srpo_cli.recipes.score import Summary, score
    from srpo_cli.runtime.devices import best_device
    from srpo_cli.runtime.distributed import join_ranks
    from srpo_cli.runtime.progress import CountProgress

    summary = Summary()
    with join_ranks(best_device(), exchange="cpu") as ranks:
        rows = score(sources, request, say, piped, ranks)
        if not ranks.leads:
            for row in rows:
                summary.add(row)
            return summary.failed
        with _opened(output) as file, CountProgress(None if piped else len(sources), "pictures") as progress:
            writer = RowWriter(columns(written), written, file)
            try:
                for row in rows:
                    writer.write(row)
                    summary.add(row)
                    progress.update(summary.pictures)
            except KeyboardInterrupt:
                said = f"stopped after {summary.pictures} pictures"
                say(said + (f", whose rows are in {output}" if output else ""))
                raise
    if not summary.pictures:
        raise UsageError("nothing to score: standard input held no row, or the folder nothing but sheets of pictures")
    _sum_up(summary, request, sys.stderr if written is not RowFormat.TABLE and output is None else sys.stdout)
    if summary.failed:
        say(f"{summary.failed} of {summary.failed + summary.scored} rows have an error instead of a score")
    return summary.failed


def _study(
    sources: Iterable[Picture], request: Request, row_format: RowFormat | None, output: Path | None, check: bool
) -> int:
    """Check or calibrate the rewards; the number of pictures that could not be read."""
    from srpo_cli.cli.reward_studies import PICTURE, calibrate_words, check_rewards

    if check:
        with _opened(output) as file:
            return check_rewards(sources, request, RowFormat.of(row_format, output), file)
    picture = output.with_suffix(PICTURE.suffix) if output else PICTURE
    rows = None if output == picture else output
    with _opened(rows) as file:
        return calibrate_words(sources, request, RowFormat.of(row_format, rows), file, picture)


class _Wording:
    """The control words of the command line over those of a preset, which has words of its own for the miniature."""

    def __init__(
        self,
        preset: str | None,
        positive: list[str],
        negative: list[str],
        cfg_k: float | None,
        upstream_k: float | None,
    ) -> None:
        self._words = {"positive": positive, "negative": negative}
        for flag, words in (("--pos", positive), ("--neg", negative)):
            if not all(word.strip() for word in words):
                raise UsageError(f"{flag} is empty: give the control words, or leave it out")
        if cfg_k is not None and upstream_k is not None:
            raise UsageError("--cfg-k and --upstream-k are two forms of one score: give one of them")
        self._k = cfg_k if cfg_k is not None else upstream_k
        given = "--cfg-k" if cfg_k is not None else "--upstream-k" if upstream_k is not None else "--neg"
        if not preset and not positive and (negative or self._k is not None):
            raise UsageError(f"{given} needs --pos: give the words to score for")
        if not preset and not negative and self._k is not None:
            raise UsageError(f"{given} weighs --pos against --neg: give both")
        if self._k is not None:
            self.form = given.removeprefix("--").removesuffix("-k")
        else:
            self.form = "srp" if preset or negative else "sgp" if positive else "plain"
        self._preset = preset
        self._plain: TrainConfig | None = None
        self._miniature: TrainConfig | UsageError | None = None
        if preset:
            from srpo_cli.config.load import load_train_config

            self._plain = load_train_config(preset).config
            try:
                self._miniature = load_train_config(preset, miniature=True).config
            except UsageError as error:
                self._miniature = error  # of interest only if a picture of the miniature is met

    @property
    def default_reward(self) -> str:
        """What judges pictures that are not the miniature's when no reward is named."""
        return self._plain.reward.name if self._plain else DEFAULT_REWARD

    @property
    def default_weights(self) -> dict[str, Path]:
        """Where the preset says that its reward's weights are."""
        reward = self._plain.reward if self._plain else None
        return {reward.name: reward.weights} if reward and reward.weights else {}

    def columns(self, row_format: RowFormat) -> dict[str, int | None]:
        """The columns of a table or of CSV."""
        terms = () if self.form in ("plain", "sgp") else ("positive", "negative", "gap")
        if row_format is RowFormat.TABLE:
            return {**dict.fromkeys(("score", *terms), _WIDTH), "reward": None, "file": None}
        columns = ("file", "prompt", "reward", "score", *terms, "unit", "preprocess", "reward_weights", "error")
        return dict.fromkeys(columns)

    def for_reward(self, name: str) -> Wording:
        """The words for one reward's pictures."""
        from srpo_cli.recipes.score import Wording

        words, template = self._words, {}
        if self._preset:
            config = self._miniature if name in MINIATURE_REWARDS else self._plain
            if isinstance(config, UsageError):
                raise config
            known = config.control_words
            words = {"positive": words["positive"] or known.positive, "negative": words["negative"] or known.negative}
            template = {"template": known.template}
        return Wording(self.form, k=self._k or 0.0, **words, **template)


def _sources(
    named: list[str], prompt: str | None, prompts: str | None, say: Callable[[str], None]
) -> tuple[Iterable[Picture], bool]:
    """The pictures to score, and whether they are piped in."""
    from srpo_cli.runtime.inputs import list_pictures, read_rows, standard_input, with_prompts

    if "-" in named:
        if len(named) > 1:
            raise UsageError(
                f"- reads all pictures from standard input: leave out {' '.join(p for p in named if p != '-')}"
            )
        if prompts:
            raise UsageError("--prompts cannot be used with -: rows on standard input bring their own prompt")
        rows = read_rows(standard_input())
        return (row if prompt is None else replace(row, prompt=prompt) for row in rows), True
    pictures = list_pictures(named)
    if prompts:
        named = with_prompts(pictures, prompts)
        if left := sum(picture.prompt is None for picture in named):
            say(f"{prompts} does not name {left} of {len(named)} pictures: theirs are their own prompts")
        return named, False
    return [replace(picture, prompt=prompt) for picture in pictures], False


class _Late(io.TextIOBase):
    """A file that is made when its first row is there: what it held before outlives a mistake."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, None

    def write(self, text: str) -> int:
        from srpo_cli.runtime.folder import disk_errors

        with disk_errors(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("w", encoding="utf-8", newline="")
            return self._file.write(text)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@contextmanager
def _opened(path: Path | None) -> Iterator[TextIO | None]:
    """The file that rows go to; None for stdout."""
    if path is None:
        yield None
        return
    with _Late(path) as file:
        yield file


def _sum_up(summary: Summary, request: Request, file: TextIO) -> None:
    if not summary.scored:
        return
    rows = [{_HEADINGS.get(key, key): _shown(value) for key, value in row.items()} for row in summary.rows()]
    typer.echo("", file)
    print_rows(rows, OutputFormat.TABLE, file)
    for name, (unit, mode, weights) in summary.made_by.items():
        wording = request.wording(name)
        sides = (", ".join(words) for words in (wording.positive, wording.negative) if words)
        parts = [
            " against ".join(sides),
            f"in {unit}" if unit else "",
            f"preprocess {mode}" if mode else "",
            f"weights {weights}" if weights else "",
        ]
        typer.echo(f"{name}: {', '.join(filter(None, parts))}", file)


def _shown(value: Any) -> Any:
    """An interval with as many digits as its size calls for."""
    if not isinstance(value, tuple):
        return value
    digits = 2 if max(map(abs, value)) >= 10 else 4
    return "{:.{n}f} [{:.{n}f}, {:.{n}f}]".format(*value, n=digits)
