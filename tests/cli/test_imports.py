"""Help, presets and every refusal answer at once: they import nothing that takes seconds."""

import json
import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "open_clip",
    "accelerate",
    "peft",
    "numpy",
    "pandas",
    "PIL",
}

RUN = """
import contextlib, io, json, sys
from srpo_cli.cli.app import main

try:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(sys.argv[1:])
except SystemExit as stop:
    print(json.dumps({"exit_code": stop.code or 0, "modules": sorted(sys.modules)}))
"""


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("train --help", 0),
        ("sample --help", 0),
        ("score --help", 0),
        ("recover --help", 0),
        ("export --help", 0),
        ("doctor --help", 0),
        ("presets --help", 0),
        ("presets list", 0),
        ("presets show realism", 0),
        ("presets show lighting:dark --miniature", 0),
        ("presets validate realism lighting style", 0),
        ("presets show nope", 2),
        ("train --preset nope", 2),
        ("train --preset realism --set algorithm.windw=1", 2),
        ("train --preset realism --set train.steps=0", 2),
        ("train --no-such-flag", 2),
        ("doctor --preset nope", 2),
        ("sample --model nope x", 2),
        ("sample --model nope.safetensors x", 2),
        ("sample --compare miniature --compare nope x", 2),
        ("sample --base nope x", 2),
        ("sample --base nope --model miniature x", 2),
        ("sample --base flux.1-dev --model miniature x", 2),
        ("sample --base presets --model miniature x", 2),
        ("sample --model miniature --size 48by48 x", 2),
        ("sample --model miniature --size 0 x", 2),
        ("sample --model miniature --prompts nope.txt", 2),
        ("recover", 2),
        ("recover --prompt x --noise-only", 2),
        ("recover nope.png", 2),
        ("recover presets", 2),
        ("recover docs --steps 3", 2),
        ("recover docs --sigmas 0.5,1.5", 2),
        ("recover docs --delta-sigma 0", 2),
        ("recover docs --gain much", 2),
        ("recover docs --size 0", 2),
        ("recover docs --reward nope", 2),
        ("recover docs --weights miniature=x", 2),
        ("recover docs --model nope", 2),
        ("recover docs --model miniature --preset nope", 2),
        ("recover docs --model miniature --base flux.1-dev", 2),
        ("score nope", 2),
        ("score presets", 2),
        ("score README.md --reward nope", 2),
        ("score README.md --neg word", 2),
        ("score README.md --weights pickscore=x", 2),
        ("eval --help", 0),
        ("eval run --help", 0),
        ("eval show --help", 0),
        ("eval compare --help", 0),
        ("eval compare --preset nope", 2),
        ("eval compare --preset nope.yaml", 2),
        ("eval miniature", 2),
        ("eval miniature --benchmark nope", 2),
        ("eval nope --benchmark miniature", 2),
        ("eval miniature --benchmark hpdv2", 2),
        ("eval miniature --benchmark miniature --metric nope", 2),
        ("eval miniature --benchmark miniature --fail-under much", 2),
        ("eval miniature --benchmark miniature --weights pickscore=x", 2),
        ("eval miniature --benchmark miniature --reference docs", 2),
        ("eval miniature --benchmark README.md --prompts README.md", 2),
        ("export nope", 2),
        ("export docs --rank 8", 2),
        ("nope", 2),
    ],
)
def test_nothing_heavy_is_imported(arguments, exit_code):
    process = subprocess.run(
        [sys.executable, "-c", RUN, *arguments.split()], capture_output=True, text=True, check=True
    )
    outcome = json.loads(process.stdout)
    assert outcome["exit_code"] == exit_code
    assert HEAVY.isdisjoint(outcome["modules"])


def test_help_documents_the_exit_codes(srpo):
    text = " ".join(srpo("--help").stdout.split())
    for meaning in [
        "0 done",
        "1 failed run",
        "2 bad usage",
        "3 done in part",
        "4 missing weights",
        "5 a bound of srpo eval",
        "130 or 143",
    ]:
        assert meaning in text


def test_a_bug_keeps_its_traceback():
    raise_a_bug = "import srpo_cli.cli.app as a; a.app.command('bug')(lambda: 1 / 0); a.main(['bug'])"
    process = subprocess.run([sys.executable, "-c", raise_a_bug], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "Traceback" in process.stderr
    assert "ZeroDivisionError" in process.stderr


def test_a_closed_pipe_is_no_error():
    process = subprocess.run(
        f"{sys.executable} -m srpo_cli presets show realism | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.startswith("# ")
    assert process.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --gpus 0", "Invalid value for '--gpus': should be greater than or equal to 1: see `srpo train --help`"),
        ("doctor --format yaml", "Invalid value for '--format': 'yaml' is not one of 'table', 'json'"),
        ("train --no-such-flag", "No such option: --no-such-flag"),
        ("presets shw realism", "No such command 'shw'"),
    ],
)
def test_what_the_parser_refuses_is_one_line_too(srpo, arguments, message):
    outcome = srpo(*arguments.split())
    assert outcome.exit_code == 2 and outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith(f"error: {message}") and line.endswith("--help`")
