"""``srpo doctor``: what would run here, what it would need, and the command for whatever is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from srpo_cli.cli.options import FormatOption, OptionalPresetOption
from srpo_cli.cli.output import OutputFormat, note, print_rows
from srpo_cli.cli.plan import describe, document, launch_line, to_json
from srpo_cli.errors import MissingError, SrpoError

if TYPE_CHECKING:
    from srpo_cli.config.schema import TrainConfig
    from srpo_cli.runtime.doctor import Check, Device
    from srpo_cli.runtime.plan import Plan


def doctor(preset: OptionalPresetOption = None, output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Say what would run here: versions, devices, disk, and the weights, memory and time of a preset."""
    from srpo_cli.config.load import load_train_config

    if preset is not None:
        load_train_config(preset)  # a bad name is refused before torch is loaded
    from srpo_cli.runtime import doctor as examine

    packages, torch = examine.check_packages(), examine.check_loads("torch")
    devices = examine.accelerators() if torch.ok else []
    checks = [*packages, torch, examine.check_loads("torchvision"), *examine.check_hardware(devices)]
    config = load_train_config(preset, miniature=not devices).config if preset is not None else None
    elsewhere: list[Check] = []
    plan, without = None, "the packages above are needed first"
    if all(check.ok for check in (*packages, torch)):
        checks.append(examine.check_hub_cache())
        checks += _check_parts(config)
        if preset is not None and not devices:  # what the same preset needs where there is an accelerator
            there = load_train_config(preset, miniature=False).config
            elsewhere = [check for check in _check_parts(there) if check not in checks]
        if config is not None:
            try:
                plan = _plan(config, devices, launch_line([("--preset", preset), ("--gpus", _several(devices))]))
            except MissingError as error:
                without = str(error)
    extras = examine.check_extras()
    rows = [_row(check, "missing") for check in checks]
    rows += [_row(check, "not here") for check in elsewhere] + [_row(check, "optional") for check in extras]
    _print(rows, config, plan, without, output_format)
    missing = [check for check in checks if not check.ok]
    if missing:
        raise MissingError(f"{missing[0].subject}: {missing[0].found}. Next: {missing[0].remedy}")
    if plan is not None and not plan.fits:
        tried = f". Next: {plan.advice[0]}" if plan.advice else ""
        raise SrpoError(f"{preset} does not fit here, {plan.why}{tried}")


def _plan(config: TrainConfig, devices: Sequence[Device], launch: str) -> Plan:
    """The preset's plan on all accelerators of this machine, or on its CPU."""
    from srpo_cli.recipes.plan import plan_for
    from srpo_cli.runtime.plan import this_machine

    return plan_for(config, this_machine(devices, max(1, len(devices))), launch)


def _several(devices: Sequence[Device]) -> int | None:
    return len(devices) if len(devices) > 1 else None


def _print(
    rows: list[dict[str, str]],
    config: TrainConfig | None,
    plan: Plan | None,
    without: str,
    output_format: OutputFormat,
) -> None:
    """The checks, then the plan of a preset, or why there is none."""
    if output_format is OutputFormat.JSON:
        content: dict[str, Any] = {"checks": rows}
        if plan is not None and config is not None:
            content |= document(plan, config)
        elif config is not None:
            content |= {"plan": None, "why": without}
        typer.echo(to_json(content))
        return
    print_rows(rows, output_format)
    if plan is not None and config is not None:
        typer.echo("\n" + "\n".join(describe(plan, config)))
    elif config is not None:
        note(f"no memory plan: {without}")


def _row(check: Check, otherwise: str) -> dict[str, str]:
    status = "ok" if check.ok else otherwise
    return {"check": check.subject, "status": status, "found": check.found, "remedy": check.remedy}


def _check_parts(config: TrainConfig | None) -> list[Check]:
    """Weights and prompts of a run as it would be here, without one the weights of the miniature."""
    from srpo_cli.runtime.doctor import check_path, check_plugin, check_prompts, check_weights

    if config is None:
        return [check_weights("model", "miniature"), check_weights("reward", "miniature")]
    checks = [check_weights("model", config.model.name)]
    if config.model.weights:  # they go into the named model
        checks.append(check_path("tuned weights", config.model.weights))
    for name, part in config.reward.parts.items():
        if part.weights:  # they take the place of the named reward's own
            plugin = check_plugin(name)
            checks += [*([plugin] if plugin else []), check_path(f"weights of {name}", part.weights)]
        else:
            checks.append(check_weights("reward", name))
    return [*checks, check_prompts(config.prompts.source)]
