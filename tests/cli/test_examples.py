"""Every example in the help of `srpo score` works as it is printed, on the miniature, offline."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest

from srpo_cli.cli import score

PROMPTS = [
    f"{'an' if colour == 'orange' else 'a'} {colour} {shape} on {ground}"
    for colour, shape, ground in [
        ("red", "sphere", "sand"),
        ("blue", "cone", "snow"),
        ("green", "cube", "grass"),
        ("yellow", "cylinder", "a wooden table"),
        ("orange", "sphere", "a checkered floor"),
        ("purple", "cube", "sand"),
        ("red", "cone", "grass"),
        ("blue", "sphere", "a wooden table"),
    ]
]


def examples(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(r"(srpo|\w+ .*\| srpo) ", line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with eight pictures of the miniature in ``images``, as `srpo sample` leaves them."""
    from srpo_cli.recipes.sample import Request, sample
    from srpo_cli.runtime.sources import Source

    folder = tmp_path_factory.mktemp("examples")
    list(sample(Source("miniature"), Request(PROMPTS), folder / "images"))
    return folder


@pytest.mark.parametrize("example", examples(score.EXAMPLES))
def test_the_example_works(example, folder, srpo, monkeypatch):
    monkeypatch.chdir(folder)
    piped = ""
    for command in example.split(" | "):
        program, *arguments = shlex.split(command)
        assert program == "srpo"
        monkeypatch.setattr("sys.stdin", io.StringIO(piped))
        outcome = srpo(*(arguments[: arguments.index(">")] if ">" in arguments else arguments))
        assert outcome.exit_code == 0, outcome.stderr
        piped = outcome.stdout
    assert piped
    if "jsonl" in example:
        assert all(isinstance(json.loads(line), dict) for line in piped.splitlines())


def test_there_are_examples():
    assert len(examples(score.EXAMPLES)) >= 5
