"""README.md says what is run: its first two commands are CI's, and it knows every command and preset."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from srpo_cli.cli.app import app
from srpo_cli.config.load import preset_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def test_it_opens_with_two_commands_and_ci_runs_both():
    install_and_run, test = BLOCKS[0].strip(), BLOCKS[1].strip()
    install, run = install_and_run.split(" && ")
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]
    assert any(line.startswith("pip install") and line.endswith(install.removeprefix("pip install ")) for line in lines)
    assert any(line.endswith(run) and not line.startswith("say") for line in lines)
    assert test in lines


def commands(app: typer.Typer, above: str = "") -> Iterator[str]:
    """Every command of the tree, by its whole name."""
    for command in app.registered_commands:
        yield f"{above}{command.name or command.callback.__name__}"
    for group in app.registered_groups:
        yield from commands(group.typer_instance, f"{above}{group.name} ")


@pytest.mark.parametrize("command", list(commands(app)))
def test_it_shows_every_command(command):
    assert f"srpo {command}" in README


def test_it_names_every_preset():
    for name in preset_names():
        assert f"`{name}`" in README


def test_its_pictures_are_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).is_file()
