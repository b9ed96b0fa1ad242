"""The models that a command names: one, several by label, or the one that is meant where none is named."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srpo_cli.cli.output import note
from srpo_cli.errors import UsageError

if TYPE_CHECKING:  # commands import it when they are called, like all of its room
    from srpo_cli.runtime.sources import Source

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Base model, run, checkpoint, tuned transformer or LoRA. Of a run its best checkpoint is taken, the last "
        "where its guard knows none; RUN/checkpoints/step-000060 names another.",
    ),
]
BaseOption = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="What a transformer or LoRA is for.")]


def default_model(announce: str = "", say: Callable[[str], None] = note) -> str:
    """The model where none is named; ``announce`` says what is done from the miniature where that is it."""
    from srpo_cli.runtime.devices import has_accelerator

    if has_accelerator():
        return "flux.1-dev"
    if announce:
        say(f"no accelerator here: {announce} the built-in miniature (name a model to decide otherwise)")
    return "miniature"


def find_sources(named: Mapping[str, str], base: str | None) -> dict[str, Source]:
    """What to draw from, by label; ``base`` is what transformers and LoRAs are for: UsageError where of no use."""
    from srpo_cli.runtime.sources import Source, check_base

    if base:
        check_base(base)
    sources = {label: Source.find(name, lambda: base or default_model()) for label, name in named.items()}
    if base and base not in {source.base for source in sources.values()}:
        raise UsageError(f"--base {base} is of no use here: {', '.join(named.values())} brings a base of its own")
    return sources


def label_models(items: Iterable[str], flag: str = "") -> dict[str, str]:
    """Label to model of ``LABEL=MODEL``, or of a model by the last part of its name; ``flag`` is said in errors."""
    labels: dict[str, str] = {}
    for item in items:
        given = f"{flag} {item}".strip()
        label, _, name = item.partition("=")
        if name and not _is_label(label) and "/" not in label and not Path(item).exists():
            raise UsageError(
                f"{given}: give every model a label of its own, of letters, digits, _, - and ., first none of - and ."
            )
        if not (name and _is_label(label)):  # no label, or a "=" in the name of a folder
            label, name = re.sub(r"[^\w.-]", "-", Path(item).name), item
        if not _is_label(label) or label in labels:
            raise UsageError(f"{given}: give every model a label of its own, as in {f'{flag} '.lstrip()}base=miniature")
        labels[label] = name
    return labels


def _is_label(text: str) -> bool:
    """Whether a text will do as the name of a folder."""
    return re.fullmatch(r"\w[\w.-]*", text) is not None
