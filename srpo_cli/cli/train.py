"""``srpo train``: check everything that can be checked without torch, then hand over to the recipe."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from srpo_cli.cli.options import (
    DryRunOption,
    ModelOption,
    OptionalPresetOption,
    OutputOption,
    OverridesOption,
    SeedOption,
)
from srpo_cli.cli.output import note
from srpo_cli.config.load import Resolved, dump_yaml, load_train_config
from srpo_cli.errors import UsageError
from srpo_cli.registry import check_parts

EXAMPLES = """Examples:

srpo train --preset realism

srpo train --preset lighting:dark --model miniature --output runs/dark

srpo train --preset realism --set optimizer.lr=1e-5 --steps 40 --dry-run

srpo train --resume runs/dark"""

RewardOption = Annotated[str | None, typer.Option("--reward", help="Reward instead of the preset's.")]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="Rollout batches in the run.")]
ResumeOption = Annotated[
    Path | None, typer.Option("--resume", metavar="RUN", help="Go on with the run in this folder.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; the result only.")]


def train(
    preset: OptionalPresetOption = None,
    overrides: OverridesOption = None,
    model: ModelOption = None,
    reward: RewardOption = None,
    output: OutputOption = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    resume: ResumeOption = None,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
) -> None:
    """Align a model with a reward, and measure it before and after."""
    flags = {"model.name": model, "reward.name": reward, "train.seed": seed, "train.steps": steps}
    if resume:
        _refuse_beside_resume(preset=preset, set=overrides, model=model, reward=reward, output=output, seed=seed)
        output, resolved = resume, _load_run(resume, steps)
    else:
        if preset is None:
            raise UsageError("srpo train needs --preset NAME|FILE or --resume RUN: see `srpo presets list`")
        resolved = _resolve(preset, overrides or [], flags)
    if dry_run:
        typer.echo(dump_yaml(resolved), nl=False)
        return
    if not resume:
        output = output or Path("runs") / f"{Path(preset).stem.replace(':', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
        if resolved.config.model.name == "miniature":
            note("model: the built-in miniature, which knows only its own rendered world; its figures are not FLUX's")
    note(f"run: {output}")

    from srpo_cli.cli.summary import print_summary
    from srpo_cli.recipes.train import BEFORE_AFTER
    from srpo_cli.recipes.train import train as run

    outcome = run(resolved, output, resume=resume is not None, quiet=quiet, say=note)
    if outcome.summary:
        print_summary(outcome.summary)
        note(f"pictures: {output / BEFORE_AFTER}")
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def _resolve(preset: str, overrides: list[str], flags: dict[str, Any]) -> Resolved:
    """The configuration, in its miniature form where that is asked for or where no accelerator is present.

    Both forms are checked first, so that a mistake is refused before torch is imported to look for a device.
    """

    def load(miniature: bool) -> Resolved:
        resolved = load_train_config(preset, overrides=overrides, flags=flags, miniature=miniature)
        check_parts(resolved.config.model.name, resolved.config.reward.name, resolved.config.algorithm.name)
        return resolved

    if flags["model.name"] is not None:
        return load(flags["model.name"] == "miniature")
    forms: dict[bool, Resolved | UsageError] = {}
    for miniature in (False, True):
        try:
            forms[miniature] = load(miniature)
        except UsageError as error:
            forms[miniature] = error
    plain = forms[False]
    if isinstance(plain, Resolved) and (
        plain.origins["model.name"] == "--set" or plain.config.model.name == "miniature"
    ):
        return plain
    if all(isinstance(form, UsageError) for form in forms.values()):
        raise plain

    from srpo_cli.runtime.devices import has_accelerator

    chosen = forms[not has_accelerator()]
    if isinstance(chosen, UsageError):
        raise chosen
    if chosen.config.model.name == "miniature":
        note("no accelerator here: the preset runs on the built-in miniature (--model decides otherwise)")
    return chosen


def _load_run(folder: Path, steps: int | None) -> Resolved:
    """The configuration that a run folder was made with, its length apart."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UsageError(f"{folder} holds no run (no config.yaml): name the folder that `srpo train` made")
    return load_train_config(path, flags={"train.steps": steps})


def _refuse_beside_resume(**given: Any) -> None:
    for name, value in given.items():
        if value not in (None, []):
            raise UsageError(f"--{name} cannot be used with --resume: a run goes on as it was begun")
