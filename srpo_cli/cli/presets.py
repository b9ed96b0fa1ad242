"""``srpo presets``: list, show, copy and validate the runs that are written down."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srpo_cli.cli.options import FormatOption, OverridesOption, PresetArgument
from srpo_cli.cli.output import OutputFormat, note, print_rows
from srpo_cli.errors import UsageError
from srpo_cli.registry import check_parts

if TYPE_CHECKING:  # pydantic and YAML take longer than all of `srpo --help`
    from srpo_cli.config.load import Resolved

app = typer.Typer(no_args_is_help=True, help="List, show, copy and validate presets.")


@app.command("list")
def list_presets(output_format: FormatOption = OutputFormat.TABLE) -> None:
    """List the presets and their variants."""
    from srpo_cli.config.load import preset_names, read_preset

    presets = [read_preset(name) for name in preset_names()]
    rows = [
        {
            "preset": preset.name,
            "variants": list(preset.variants),
            "default": preset.default_variant,
            "description": preset.description,
        }
        for preset in presets
    ]
    if not rows:
        raise UsageError("No presets are installed; install srpo-cli again, or run from a checkout.")
    print_rows(rows, output_format)


@app.command("show")
def show_preset(
    preset: PresetArgument,
    overrides: OverridesOption = None,
    miniature: Annotated[
        bool,
        typer.Option("--miniature", help="As it runs on the built-in miniature, without an accelerator."),
    ] = False,
) -> None:
    """Show every value of a preset and where it comes from; the text is itself a preset."""
    from srpo_cli.config.load import dump_yaml, load_train_config

    resolved = load_train_config(preset, overrides=overrides or [], miniature=miniature)
    typer.echo(dump_yaml(resolved), nl=False)


@app.command("copy")
def copy_preset(
    preset: PresetArgument, file: Annotated[Path, typer.Argument(help="File to write; must not exist yet.")]
) -> None:
    """Copy a preset, comments included, to a file of your own."""
    from srpo_cli.config.load import read_preset, split_variant

    name, variant = split_variant(preset)
    text = read_preset(name).text
    try:
        with file.open("x", encoding="utf-8") as copy:
            copy.write(text)
    except FileExistsError:
        raise UsageError(f"{str(file)!r} exists and is left alone; name another file, or remove it first.") from None
    except OSError as error:
        raise UsageError(f"{str(file)!r} cannot be written: {error.strerror}.") from error
    note(f"Wrote {file}. Run it with: srpo train --preset {file}" + (f":{variant}" if variant else ""))


@app.command("validate")
def validate_presets(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Preset files or names.")],
) -> None:
    """Check presets, every variant of each, with and without its miniature section; exit 2 if one is bad."""
    bad = 0
    for file in files:
        try:
            for resolved in _every_form(file):
                config = resolved.config
                check_parts(config.model.name, config.rewards, config.algorithm.name)
        except UsageError as error:
            bad += 1
            note(f"error: {file}: {error}")
        else:
            typer.echo(f"{file}: ok")
    if bad:
        raise UsageError(f"{bad} of {len(files)} presets cannot be used.")


def _every_form(name: str) -> list[Resolved]:
    """The preset resolved for each of its variants, and on the miniature where it has such a section."""
    from srpo_cli.config.load import load_train_config, read_preset

    preset = read_preset(name)
    forms = []
    for variant, layer in (preset.variants or {None: preset.base}).items():
        forms.append(load_train_config(name, variant=variant))
        if layer.miniature is not None:
            forms.append(load_train_config(name, variant=variant, miniature=True))
    return forms
