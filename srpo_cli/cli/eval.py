"""``srpo eval``: models on a benchmark, results side by side, and the human study."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from srpo_cli.cli import compare, rate
from srpo_cli.cli.launch import (
    GpusOption,
    NodeRankOption,
    NodesOption,
    RendezvousOption,
    plan_launch,
    speaker,
    start,
    told_once,
)
from srpo_cli.cli.models import BaseOption, default_model, find_sources, label_models
from srpo_cli.cli.options import DownloadOption, FormatOption, parse_weights
from srpo_cli.cli.output import OutputFormat, note, print_rows
from srpo_cli.cli.plugins import admit_plugin
from srpo_cli.errors import UsageError
from srpo_cli.registry import metric_parts, rewards_of, weights_of

if TYPE_CHECKING:  # commands import it when they are called, like all of its room
    from srpo_cli.config.benchmark import Benchmark
    from srpo_cli.runtime.sources import Source

EXAMPLES = """Examples:

srpo eval miniature runs/realism --benchmark miniature

srpo eval base=flux.1-dev tuned=runs/realism --benchmark hpdv2 --gpus 8

srpo eval tuned=runs/realism --benchmark hpdv2 --limit 100 --metric hpsv2.1 --fail-under hps=0.28

srpo eval base=miniature runs/realism --benchmark prompts.txt

srpo eval theirs=pictures/ --benchmark hpdv2 --style photo

srpo eval show evals/miniature other/results.json --output evals/both"""

RUN = "run"
_FAIL_UNDER, _FAIL_OVER = "--fail-under", "--fail-over"
_GATE_MISSED, _DONE_IN_PART = 5, 3
_MINIATURE = "miniature"
_MOST_IMAGES = 64  # of a prompt, as in a benchmark's file

app = typer.Typer(
    no_args_is_help=True,
    help="Measure models on a benchmark, with intervals and a report; compare methods; run a human study.\n\n"
    "srpo eval MODEL... --benchmark NAME is short for srpo eval run MODEL... --benchmark NAME; "
    "srpo eval run --help lists its options.",
    epilog=EXAMPLES,
)
app.add_typer(rate.app, name="rate")
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)

_COMMANDS = (RUN, "show", "compare", "rate")


def with_run(arguments: Sequence[str]) -> list[str]:
    """The arguments of ``srpo`` with the ``run`` put in that ``srpo eval MODEL...`` leaves out."""
    name, *rest = arguments or [""]
    if name != "eval" or not rest or rest[0] in (*_COMMANDS, "-h", "--help"):
        return list(arguments)
    return [name, RUN, *rest]


ModelsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[LABEL=]MODEL",
        help="Base models, runs, checkpoints, tuned weights, LoRAs, or folders of pictures made elsewhere, named "
        "00000.png and so on (for hpdv2 photo/00000.png) or listed in a samples.jsonl. The first one is what the "
        "others are compared with.",
    ),
]


def _benchmark_names() -> list[str]:
    from srpo_cli.config.benchmark import benchmark_names

    return benchmark_names()


BenchmarkOption = Annotated[
    str,
    typer.Option(
        "--benchmark",
        "-b",
        metavar="NAME|FILE",
        help="dpg, drawbench, geneval, hpdv2, hpdv2-500, miniature or parti; a .yaml like theirs; or a .txt, .jsonl or "
        ".csv of prompts.",
        autocompletion=_benchmark_names,
    ),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts", metavar="FILE|DIR", help="Where the named benchmark's prompts are; if not given the cache."
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Only N prompts: the first ones of every style alike."),
]
StyleOption = Annotated[
    str | None, typer.Option("--style", "--group", metavar="NAME", help="Only one style, task or category of prompts.")
]
ImagesOption = Annotated[
    int | None,
    typer.Option(
        "--num-images",
        "-n",
        metavar="N",
        min=1,
        max=_MOST_IMAGES,
        help="Pictures of each prompt; if not given as many as the benchmark says.",
    ),
]
MetricsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="Measure this in place of the benchmark's metrics; may be repeated: a reward (see srpo score --help), "
        "sgp:REWARD, statistics, diversity:REWARD, geneval, oracle, fid, kid.",
    ),
]
WeightsOption = Annotated[
    list[str] | None,
    typer.Option("--weights", metavar="NAME=PATH", help="Where a metric's weights are; may be repeated."),
]
ReferenceOption = Annotated[
    Path | None, typer.Option("--reference", metavar="DIR", help="Folder of real pictures, for fid and kid.")
]
FailUnderOption = Annotated[
    list[str] | None,
    typer.Option(
        _FAIL_UNDER,
        metavar="[LABEL:]MEASURE=VALUE",
        help="Exit with 5 if a figure is lower, of one model or of any, as in tuned:hps=0.28; may be repeated.",
    ),
]
FailOverOption = Annotated[
    list[str] | None,
    typer.Option(_FAIL_OVER, metavar="[LABEL:]MEASURE=VALUE", help="Exit with 5 if a figure is higher."),
]
BatchOption = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Pictures judged at a time.")]
FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Folder to write to, on a disk that all --nodes share; if not given evals/BENCHMARK.",
    ),
]
TrustOption = Annotated[
    bool, typer.Option("--trust", help="Let Python files that are metrics run; needed once for each content.")
]
ResultsArgument = Annotated[
    list[Path], typer.Argument(metavar="RESULT", help="results.json files, or the folders that they are in.")
]
ShownOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Write result, tables and report.html there, too."),
]
DifferentOption = Annotated[
    bool, typer.Option("--allow-different", help="Put results of different protocols side by side all the same.")
]


@app.command(RUN, epilog=EXAMPLES)
def run(
    models: ModelsArgument = None,
    benchmark: BenchmarkOption = "",
    base: BaseOption = None,
    prompts: PromptsOption = None,
    limit: LimitOption = None,
    style: StyleOption = None,
    num_images: ImagesOption = None,
    metric: MetricsOption = None,
    weights: WeightsOption = None,
    reference: ReferenceOption = None,
    trust: TrustOption = False,
    batch_size: BatchOption = 32,
    fail_under: FailUnderOption = None,
    fail_over: FailOverOption = None,
    output: FolderOption = None,
    output_format: FormatOption = OutputFormat.TABLE,
    download: DownloadOption = False,
    gpus: GpusOption = 1,
    nodes: NodesOption = None,
    rdzv: RendezvousOption = None,
    node_rank: NodeRankOption = None,
) -> None:
    """Draw a benchmark's prompts from one or more models, score the pictures, and say what differs and how surely.

    Writes pictures, results.json, images.parquet, table.md, table.tex and report.html.

    The same command goes on where it stopped: what is there already and matches is kept.

    A metric whose weights are missing is left out by name, and the exit code is then 3.
    """
    launch = plan_launch(gpus, nodes, rdzv, node_rank)
    say = speaker(launch)
    with told_once(), _told_to_go_on(say):
        from srpo_cli.config.benchmark import benchmark_names

        if not benchmark:
            raise UsageError(f"--benchmark is missing: name {', '.join(benchmark_names())}, or a file")
        sources = _sources(label_models(models or [default_model("evaluating", say)]), base)
        chosen = _protocol(benchmark, sources, metric, num_images)
        if prompts and _is_prompts(benchmark):
            raise UsageError(f"--benchmark {benchmark} is a file of prompts already: leave out --prompts {prompts}")
        gates = [
            _Gate.read(flag, text, list(sources), chosen.metrics)
            for flag, texts in ((_FAIL_UNDER, fail_under), (_FAIL_OVER, fail_over))
            for text in texts or []
        ]
        places = _places(weights or [], chosen.metrics)
        if reference and not {"fid", "kid"} & {metric_parts(metric)[0] for metric in chosen.metrics}:
            raise UsageError(f"--reference {reference} is of no use without --metric fid or kid")
        for reward in rewards_of(chosen.metrics):
            admit_plugin(reward, trust, say)
    if launch:
        start(launch)

    with _told_to_go_on(say):
        from srpo_cli.pages.report import REPORT
        from srpo_cli.recipes import benchmark as recipe
        from srpo_cli.runtime.devices import best_device
        from srpo_cli.runtime.distributed import join_ranks

        bounded = [gate.measure for gate in gates]
        request = recipe.Request(chosen, sources, prompts, limit, style, places, reference, batch_size, bounded)
        folder = output or Path("evals") / chosen.name
        with join_ranks(best_device(), exchange="cpu") as ranks:
            result = recipe.evaluate(request, folder, ranks, say if download else None, say)
            ranks.wait()
    if ranks.leads:
        _print(result, output_format)
        say(f"report: {folder / REPORT}")
    raise typer.Exit(_exit_code(result, gates, say))


@app.command()
def show(
    results: ResultsArgument,
    output: ShownOption = None,
    output_format: FormatOption = OutputFormat.TABLE,
    allow_different: DifferentOption = False,
) -> None:
    """Show a result again, or several side by side, compared anew over the prompts that they share.

    What is compared has to be of one protocol, and the first model is what the others are compared with.
    """
    from srpo_cli.pages.report import REPORT
    from srpo_cli.recipes.benchmark import show as put_together

    merged = put_together(results, output, allow_different)
    _print(merged, output_format)
    if output:
        note(f"report: {output / REPORT}")


@contextmanager
def _told_to_go_on(say: Callable[[str], None]) -> Iterator[None]:
    """Who interrupts is told how to go on, from the first moment."""
    try:
        yield
    except KeyboardInterrupt:
        say("stopped: the same command goes on with what is missing")
        raise


# --- what is asked for --------------------------------------------------------------------------------------------


def _sources(named: Mapping[str, str], base: str | None) -> dict[str, Source | Path]:
    """What to draw from, or the folder of pictures that were made elsewhere, by label."""
    from srpo_cli.runtime.sources import is_model

    folders = {label: Path(name) for label, name in named.items() if Path(name).is_dir() and not is_model(Path(name))}
    models = {label: name for label, name in named.items() if label not in folders}
    if base and not models:
        raise UsageError(f"--base {base} is of no use here: {', '.join(named.values())} is pictures, not a model")
    sources = find_sources(models, base)
    return {label: folders.get(label) or sources[label] for label in named}


def _protocol(
    name: str, models: Mapping[str, Source | Path], metrics: Sequence[str] | None, num_images: int | None
) -> Benchmark:
    """The named benchmark as these models can be measured by it, with what the command line changes."""
    from srpo_cli.config.benchmark import load_benchmark

    benchmark = _fitting(load_benchmark(name), models, _is_prompts(name))
    changes: dict[str, Any] = {}
    if metrics:
        changes["metrics"] = tuple(dict.fromkeys(metrics))
    if num_images:
        changes["images_per_prompt"] = num_images
    return benchmark.model_copy(update=changes)


def _is_prompts(benchmark: str) -> bool:
    """Whether what ``--benchmark`` names is a file of prompts."""
    from srpo_cli.config.benchmark import benchmark_names

    return benchmark not in benchmark_names() and Path(benchmark).suffix.lower() not in (".yaml", ".yml")


def _fitting(benchmark: Benchmark, models: Mapping[str, Source | Path], is_prompts: bool) -> Benchmark:
    """The benchmark as these models can be measured by it.

    Somebody's own prompts (``is_prompts``) on the miniature are measured as the miniature is. UsageError for the
    miniature on any other benchmark that was not made for it.
    """
    from srpo_cli.config.benchmark import for_miniature

    small = [label for label, model in models.items() if getattr(model, "base", "") == _MINIATURE]
    fitting = for_miniature(benchmark) if small else benchmark
    if fitting is benchmark:
        return benchmark
    if not is_prompts:
        raise UsageError(
            f"{small[0]} cannot be measured by {benchmark.name}: the miniature knows only its own world. Take "
            f"--benchmark {_MINIATURE}, a file of prompts of that world, or a .yaml with the miniature's metrics"
        )
    others = [label for label, model in models.items() if getattr(model, "base", _MINIATURE) != _MINIATURE]
    if others:
        raise UsageError(f"{small[0]} is a miniature and {others[0]} is none: evaluate them apart")
    return fitting


def _places(given: Sequence[str], metrics: Sequence[str]) -> dict[str, Path]:
    """Where weights are, from ``--weights``; UsageError for a name that no metric asks for and for no file."""
    known = weights_of(metrics)
    for item in given:
        name, _, path = item.partition("=")
        if name and path and name not in known:
            raise UsageError(f"--weights {item} is of no use: the metrics read {', '.join(known) or 'no weights'}")
    places = parse_weights(given, known)
    for name, path in places.items():
        if not path.exists():
            raise UsageError(f"--weights {name}={path}: there is no such file or folder")
    return places


# --- what came out ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gate:
    """A bound that a figure of some models has to keep."""

    text: str
    labels: Sequence[str]
    measure: str
    bound: float
    is_least: bool

    @classmethod
    def read(cls, flag: str, text: str, labels: Sequence[str], metrics: Sequence[str]) -> _Gate:
        """``[LABEL:]MEASURE=VALUE``; without a label it is for all models. A metric is one, whatever models are called.

        So ``sgp:hpsv2.1=0`` is a bound of ``sgp:hpsv2.1``, though a model be called ``sgp``.
        """
        name, _, value = text.rpartition("=")
        try:
            bound = float(value)
        except ValueError:
            bound = nan
        if not name or isnan(bound):
            raise UsageError(f"{flag} {text}: give MEASURE=VALUE, as in {flag} hps=0.28")
        label, _, measure = name.partition(":")
        if label in labels and measure and name not in metrics:
            return cls(f"{flag} {text}", [label], measure, bound, flag == _FAIL_UNDER)
        return cls(f"{flag} {text}", labels, name, bound, flag == _FAIL_UNDER)

    def misses(self, result: Mapping[str, Any]) -> list[str]:
        """What keeps it from being met, a line each; what was not measured has not been met."""
        named = {each[key].lower(): each["name"] for key in ("title", "name") for each in result["measures"]}
        measure = named.get(self.measure.lower(), self.measure)
        missed = []
        for label in self.labels:
            value = result["figures"][label]["all"].get(measure, {}).get("mean")
            if value is None:
                missed.append(f"{self.text}: not measured of {label}")
            elif (value < self.bound) if self.is_least else (value > self.bound):
                missed.append(f"{self.text}: {label} has {value:.4g}")
        return missed


def _print(result: Mapping[str, Any], output_format: OutputFormat) -> None:
    """The result as the paper's table and one with intervals, or as it is."""
    from srpo_cli.recipes.results import interval_rows, mean_rows

    if output_format is OutputFormat.JSON:
        import json

        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
        return
    tables = [rows for rows in (mean_rows(result), interval_rows(result)) if rows and len(rows[0]) > 1]
    for number, rows in enumerate(tables):
        if number:
            typer.echo("")
        print_rows(rows, output_format)
    if len(result["models"]) > 2:
        first = result["models"][0]["label"]
        typer.echo(
            f"\n* differs from {first}, Holm-corrected p below 0.05; report.html and results.json have all p values"
        )
    for line in result["notes"]:
        note(f"note: {line}")


def _exit_code(result: Mapping[str, Any], gates: Sequence[_Gate], say: Callable[[str], None]) -> int:
    """5 where a gate is missed, 3 where a metric was left out."""
    missed = [line for gate in gates for line in gate.misses(result)]
    for line in missed:
        say(line)
    if missed:
        return _GATE_MISSED
    return _DONE_IN_PART if result["skipped"] else 0
