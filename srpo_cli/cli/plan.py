"""The memory plan of a run for people and for scripts: ``srpo train --dry-run`` and ``srpo doctor --preset``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from srpo_cli.cli.output import OutputFormat

if TYPE_CHECKING:  # the commands import it when they are called, like all of its room
    from srpo_cli.config.load import Resolved
    from srpo_cli.config.schema import TrainConfig
    from srpo_cli.runtime.plan import Machine, Plan

_GIB = 2**30

OnOption = Annotated[
    str | None,
    typer.Option("--on", metavar="GPU", help="With --dry-run: plan for this GPU instead, for instance h100."),
]
DryRunFormatOption = Annotated[
    OutputFormat, typer.Option("--format", help="Of --dry-run: a preset with comments, or JSON.")
]


def find_machine(on: str | None, gpus: int, nodes: int) -> Machine:
    """The machine to plan for: a known GPU by name, else this one; imports torch only if it may have an accelerator."""
    from srpo_cli.runtime.plan import known_machine, this_machine

    if on is not None:
        return known_machine(on, gpus, nodes)

    from srpo_cli.runtime.devices import has_accelerator
    from srpo_cli.runtime.doctor import accelerators

    return this_machine(accelerators() if has_accelerator() else [], gpus, nodes)


def print_dry_run(resolved: Resolved, machine: Machine, launch: str, output_format: OutputFormat) -> None:
    """Print the configuration and its plan: as a preset that ends in comments, or as one JSON document.

    Raises MissingError where the plan cannot be counted, after the configuration was printed as a preset.
    """
    from srpo_cli.config.load import dump_yaml

    if output_format is OutputFormat.TABLE:
        typer.echo(dump_yaml(resolved), nl=False)

    from srpo_cli.recipes.plan import plan_for

    plan = plan_for(resolved.config, machine, launch)
    if output_format is OutputFormat.TABLE:
        typer.echo("\n".join(f"# {line}".rstrip() for line in ("", *describe(plan, resolved.config))))
        return
    typer.echo(to_json(document(plan, resolved.config)))


def launch_line(named: Sequence[tuple[str, Any]]) -> str:
    """The ``srpo train`` that the flags make, those without a value left out; a list's values each get the flag."""
    words = ["srpo", "train"]
    for flag, value in named:
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                words += [flag, shlex.quote(str(one))]
    return " ".join(words)


def document(plan: Plan, config: TrainConfig) -> dict[str, Any]:
    """The plan as one JSON object; GiB, FLOPs, pictures and seconds are those of one process."""
    machine = plan.machine
    return {
        "plan": plan.name,
        "why": plan.why,
        "fits": plan.fits,
        "machine": {
            "gpu": machine.gpu,
            "gpus": machine.gpus,
            "nodes": machine.nodes,
            "memory_gib": round(machine.memory / _GIB, 1),
        },
        "memory_gib": {part: round(size, 3) for part, size in (*plan.memory_gib.items(), ("total", plan.total_gib))},
        "peak": plan.stage,
        "host_gib": round(plan.host_gib, 1),
        "forwards_per_step": plan.forwards_per_step,
        "gradient_passes_per_step": plan.gradient_passes_per_step,
        "flops_per_step": plan.flops_per_step,
        "seconds_per_step": plan.seconds_per_step,
        "disk_gib": round(plan.disk_gib, 3),
        "launch": plan.launch,
        "advice": [asdict(advice) for advice in plan.advice],
        "uncounted": _uncounted(plan),
        "settings": asdict(plan.settings),
        "config": config.model_dump(mode="json"),
    }


def to_json(content: dict[str, Any]) -> str:
    import json

    return json.dumps(content, indent=2, ensure_ascii=False)


def describe(plan: Plan, config: TrainConfig) -> Iterator[str]:
    """The plan in lines for people."""
    machine = plan.machine
    yield f"memory plan: {plan.name} on {machine}{'' if plan.fits else ': DOES NOT FIT'}"
    yield f"why: {plan.why}"
    yield ""
    for part, size in plan.memory_gib.items():
        if size:
            yield _row(part, _size(size))
    yield _row("total", f"{_size(plan.total_gib)} of {_size(machine.memory / _GIB)}, the peak, at {plan.stage}")
    yield _row("host", f"{_size(plan.host_gib)} of {_size(machine.host_memory / _GIB)}")
    yield ""
    yield _row("forwards", f"{plan.forwards_per_step:g} pictures a step and process, without a gradient")
    yield _row("gradient passes", f"{plan.gradient_passes_per_step:.4g} pictures a step and process")
    yield _row("work", f"{_flops(plan.flops_per_step)} a step and process")
    if plan.seconds_per_step:
        times = ", ".join(f"{seconds:g} s on {gpu}" for gpu, seconds in plan.seconds_per_step.items())
        yield _row("time of a step", f"{times}: estimated, not measured")
    yield _row("disk", f"{_size(plan.disk_gib)} for {config.checkpoint.keep} checkpoints and encoded prompts")
    yield _row("guard", _guard(plan, config))
    yield _row("settings", ", ".join(f"{key} {_word(value)}" for key, value in asdict(plan.settings).items()))
    if uncounted := _uncounted(plan):
        yield _row("not counted", uncounted)
    for number, advice in enumerate(plan.advice):
        yield _row("" if number else "what would fit" if plan.advice[0].fits else "what is nearer", str(advice))
    if plan.launch:
        yield _row("launch", plan.launch)


def _guard(plan: Plan, config: TrainConfig) -> str:
    """What the guard of the run may spend, in words."""
    from srpo_cli.recipes.guard import Plan as GuardPlan

    if config.guard.action == "off":
        return "off"
    processes = plan.machine.gpus * plan.machine.nodes
    guard = GuardPlan.of(config, config.train.batch_size * processes, processes)
    if guard.shortfall:
        return f"off, {guard.shortfall}"
    panel = f", a panel after {', '.join(map(str, guard.panel))}" if guard.panel else ""
    return f"{guard.calibration} pictures of each kind, a check every {guard.every} steps{panel}"


def _row(name: str, text: str) -> str:
    return f"  {name:<17}{text}"


def _size(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 0.95 else f"{gib * 1024:.1f} MiB"


def _flops(number: float) -> str:
    return f"{number / 1e12:,.1f} TFLOP" if number >= 1e11 else f"{number / 1e9:,.1f} GFLOP"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _uncounted(plan: Plan) -> str:
    return plan.counts.uncounted if plan.counts else ""
