"""``srpo train``: check everything that can be checked without torch, then hand over to the recipe."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from srpo_cli.cli.options import (
    DownloadOption,
    DryRunOption,
    ModelOption,
    OptionalPresetOption,
    OverridesOption,
    SeedOption,
    TrustOption,
)
from srpo_cli.cli.output import OutputFormat
from srpo_cli.cli.plan import DryRunFormatOption, OnOption, find_machine, launch_line, print_dry_run
from srpo_cli.cli.plugins import admit_plugin, check_plugin
from srpo_cli.errors import UsageError
from srpo_cli.registry import check_parts

if TYPE_CHECKING:  # the commands import it when they are called: it takes longer than all of `srpo --help`
    from srpo_cli.config.load import Resolved

EXAMPLES = """Examples:

srpo train --preset realism

srpo train --preset lighting:dark --model miniature --output runs/dark

srpo train --preset realism --set optimizer.lr=1e-5 --steps 40 --dry-run

srpo train --resume runs/dark

srpo train --preset realism --gpus 8

srpo train --preset realism --gpus 8 --on h100 --dry-run

srpo train --preset realism --gpus 8 --nodes 2 --rdzv node1:29500"""

RewardOption = Annotated[str | None, typer.Option("--reward", metavar="NAME", help="Reward instead of the preset's.")]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Folder of the run; runs/PRESET-TIME if not given."),
]
StepsOption = Annotated[
    int | None,
    typer.Option("--steps", min=1, metavar="N", help="Length of the run in steps; with --resume its new length."),
]
ResumeOption = Annotated[
    Path | None,
    typer.Option("--resume", metavar="RUN", help="Go on with the run in this folder where it stopped."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]


def train(
    preset: OptionalPresetOption = None,
    overrides: OverridesOption = None,
    model: ModelOption = None,
    reward: RewardOption = None,
    output: OutputOption = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    resume: ResumeOption = None,
    gpus: GpusOption = 1,
    nodes: NodesOption = None,
    rdzv: RendezvousOption = None,
    node_rank: NodeRankOption = None,
    download: DownloadOption = False,
    trust: TrustOption = False,
    dry_run: DryRunOption = False,
    on: OnOption = None,
    output_format: DryRunFormatOption = OutputFormat.TABLE,
    quiet: QuietOption = False,
) -> None:
    """Align a model with a reward, and measure it before and after.

    Writes a folder with settings, metrics, pictures, checkpoints and a summary.

    A guard watches it for reward hacking by what is not trained: it warns, ends a run that collapses, links the best
    checkpoint, and writes report.html (guard.* in the preset).

    Ctrl-C finishes the step, saves, and prints how to go on.
    """
    launch, named_output = plan_launch(gpus, nodes, rdzv, node_rank), False
    say = speaker(None if dry_run else launch)
    agreed = trust or dry_run  # which runs nothing
    typed = [("--preset", preset), ("--resume", resume), ("--set", overrides), ("--model", model), ("--reward", reward)]
    typed += [("--output", output), ("--seed", seed), ("--steps", steps), ("--gpus", gpus if gpus > 1 else None)]
    typed += [("--nodes", nodes), ("--rdzv", rdzv), ("--node-rank", node_rank)]
    with told_once():
        if not dry_run and (on is not None or output_format is OutputFormat.JSON):
            raise UsageError("--on and --format are for a plan: add --dry-run")
        if resume:
            _refuse_beside_resume(preset=preset, set=overrides, model=model, reward=reward, output=output, seed=seed)
            output, resolved = resume, _load_run(resume, steps, agreed)
        elif preset is None:
            raise UsageError("srpo train needs --preset NAME|FILE or --resume RUN: see `srpo presets list`")
        else:
            flags = {"model.name": model, "reward.name": reward, "train.seed": seed, "train.steps": steps}
            resolved = _resolve(preset, overrides or [], flags, agreed, say, elsewhere=on is not None)
            name = Path(preset).stem.replace(":", "-")
            named_output = output is not None
            output = output or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        if not dry_run:
            for part in resolved.config.rewards:
                admit_plugin(part, trust, say)
    if dry_run:
        print_dry_run(resolved, find_machine(on, gpus, nodes or 1), launch_line(typed), output_format)
        return
    if launch:
        named = [] if resume or named_output else ["--output", str(output)]  # it has the time in it: once for all
        start(launch, named, lambda: _how_to_go_on(output))
    if resolved.config.model.name == "miniature" and not resume:
        say("model: the built-in miniature, which knows only its own rendered world; its figures are not FLUX's")
    say(f"run: {output}")

    from srpo_cli.cli.summary import print_summary
    from srpo_cli.pages.training import REPORT
    from srpo_cli.recipes.train import BEFORE_AFTER
    from srpo_cli.recipes.train import train as run

    outcome = run(resolved, output, resume=resume is not None, download=download, quiet=quiet, say=say)
    if outcome.summary:
        print_summary(outcome.summary)
        for what, name in (("pictures", BEFORE_AFTER), ("report", REPORT)):
            if (outcome.folder / name).exists():
                say(f"{what}: {outcome.folder / name}")
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def _how_to_go_on(output: Path) -> str:
    """The end of a line that tells of a lost process."""
    return f"; go on with: srpo train --resume {shlex.quote(str(output))}" if (output / "config.yaml").exists() else ""


def _resolve(
    preset: str,
    overrides: list[str],
    flags: dict[str, Any],
    agreed: bool,
    say: Callable[[str], None],
    elsewhere: bool = False,
) -> Resolved:
    """The configuration, in its miniature form where that is asked for or where no accelerator is present.

    Both forms are checked first, so that a mistake is refused before torch is imported to look for a device.
    ``agreed``: a reward that is a Python file may run. ``elsewhere``: what is asked about has an accelerator.
    """

    from srpo_cli.config.load import Resolved, load_train_config

    def load(miniature: bool) -> Resolved:
        resolved = load_train_config(preset, overrides=overrides, flags=flags, miniature=miniature)
        return _checked(resolved, agreed)

    if flags["model.name"] is not None:
        return load(flags["model.name"] == "miniature")
    forms: dict[bool, Resolved | UsageError] = {}
    for miniature in (False, True):
        try:
            forms[miniature] = load(miniature)
        except UsageError as error:
            forms[miniature] = error
    plain = forms[False]
    if isinstance(plain, Resolved):
        if plain.config.model.name == "miniature":
            return _resolved(forms[True])
        if plain.origins["model.name"] == "--set":
            return plain
    if all(isinstance(form, UsageError) for form in forms.values()):
        if str(plain) == str(forms[True]):
            raise plain
        raise UsageError(f"{plain} (On the miniature: {forms[True]})")

    from srpo_cli.runtime.devices import has_accelerator

    chosen = _resolved(forms[not (elsewhere or has_accelerator())])
    if chosen.config.model.name == "miniature":
        say("no accelerator here: the preset runs on the built-in miniature (--model decides otherwise)")
    return chosen


def _checked(resolved: Resolved, agreed: bool) -> Resolved:
    """The configuration itself; UsageError where it names a part that is unknown, or one that may not run."""
    config = resolved.config
    check_parts(config.model.name, config.rewards, config.algorithm.name)
    for reward in config.rewards:
        check_plugin(reward, agreed)
    return resolved


def _resolved(form: Resolved | UsageError) -> Resolved:
    if isinstance(form, UsageError):
        raise form
    return form


def _load_run(folder: Path, steps: int | None, agreed: bool) -> Resolved:
    """The configuration that a run folder was made with, its length apart; every value keeps its first origin."""
    from srpo_cli.config.load import Resolved, load_train_config

    path = folder / "config.yaml"
    if not path.is_file():
        raise UsageError(f"{folder} holds no run (no config.yaml): name the folder that `srpo train` made")
    resolved = _checked(load_train_config(path, flags={"train.steps": steps}), agreed)
    noted = _noted_origins(path.read_text(encoding="utf-8"))
    if steps is not None:
        noted["train.steps"] = resolved.origins["train.steps"]
    return Resolved(resolved.config, resolved.origins | noted)


def _noted_origins(text: str) -> dict[str, str]:
    """Origins by dotted key, from the comments that ``dump_yaml`` wrote."""
    origins: dict[str, str] = {}
    keys: list[str] = []
    for indent, name, origin in re.findall(r"^( *)(\w+):(?:.*?  # (.*))?", text, re.MULTILINE):
        keys[len(indent) // 2 :] = [name]
        if origin:
            origins[".".join(keys)] = origin
    return origins


def _refuse_beside_resume(**given: Any) -> None:
    for name, value in given.items():
        if value not in (None, []):
            raise UsageError(f"--{name} cannot be used with --resume: a run goes on as it was begun")
