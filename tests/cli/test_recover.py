"""``srpo recover`` as it is typed: its examples, what it leaves behind, and what it refuses."""

import csv
import io
import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from srpo_cli.cli.recover import EXAMPLES
from srpo_cli.miniature import WEIGHTS
from srpo_cli.recipes import recover as recipe
from srpo_cli.recipes import sample

PROMPTS = ("a red sphere on a wooden table", "a blue cone on snow, dark")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """What ``srpo sample`` leaves: two pictures and their grid."""
    folder = tmp_path_factory.mktemp("drawn") / "images"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "best_device", lambda: torch.device("cpu"))
        list(sample.sample(sample.Source("miniature"), sample.Request(PROMPTS, steps=2), folder))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, images):
    """Every test types its commands beside that folder, on a machine without an accelerator."""
    (tmp_path / "images").symlink_to(images)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("srpo_cli.runtime.devices.has_accelerator", lambda: False)
    monkeypatch.setattr(recipe, "best_device", lambda: torch.device("cpu"))
    return tmp_path


@pytest.fixture
def one(images):
    """One picture."""
    return sorted(images.glob("*seed*.png"))[0]


# --- examples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES.split("\n\n")[1:])
def test_an_example_of_the_help_runs(srpo, elsewhere, example):
    command, _, file = example.partition(" > ")
    outcome = srpo(*shlex.split(command)[1:])
    assert outcome.exit_code == 0, outcome.stderr
    folder = elsewhere / ("window" if "window" in command else "recover")
    assert {"curve.png", "rows.jsonl", "summary.json"} <= {path.name for path in folder.iterdir()}
    drawn = "--prompt" in command
    assert len(list(folder.glob("strip-*.png"))) == (8 if drawn else 2)
    for path in folder.glob("*.png"):
        Image.open(path).load()
    if file:
        rows = list(csv.DictReader(io.StringIO(outcome.stdout)))
        methods = {row["label"] for row in rows if row["sigma"] == "0.95"}
        assert "Direct-Align gain 0.025 invert" in methods and "Direct-Align 0.025 invert" in methods
        assert len({row["picture"] for row in rows}) == 2
    elif "--noise-only" in command:
        assert "autoencoder alone" in outcome.stderr
    else:
        assert ("  one-step: sigma" in outcome.stdout) == drawn  # a window takes eight pictures
        assert ("no recommended window" in outcome.stderr) != drawn
    assert ("preset realism trains at sigma 0.3 to 0.9" in outcome.stdout) == ("--preset" in command)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_help_fits_and_ends_with_examples(columns):
    from typer.testing import CliRunner

    from srpo_cli.cli.app import app

    help_text = CliRunner().invoke(app, ["recover", "--help"], env={"COLUMNS": str(columns), "NO_COLOR": "1"}).stdout
    lines = [line.rstrip() for line in help_text.splitlines()]
    assert max(map(len, lines)) <= columns
    assert [line.strip() for line in lines[lines.index(" Examples:") :] if line] == EXAMPLES.split("\n\n")


# --- what it says -----------------------------------------------------------------------------------------------


def test_a_table_for_people_says_what_its_columns_are(srpo, one):
    outcome = srpo("recover", one, "--sigmas", "0.95,0.5", "--delta-sigma", "0.025")
    assert outcome.exit_code == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert lines[0].split() == ["sigma", "method", "psnr", "ssim", "psnr*", "ssim*", "latent", "reward", "change"]
    assert [line.split()[0] for line in lines[1:8]] == ["0", *["0.5"] * 3, *["0.95"] * 3]
    assert "against the autoencoder's own round trip, with * against the picture" in lines[8]
    assert "pictures: 1;" in lines[8] and "rank:" not in lines[8]
    assert "it takes 8 pictures to rank, here is one" in outcome.stderr
    assert "no accelerator here" in outcome.stderr and "recover/curve.png" in outcome.stderr


def test_rows_for_scripts_are_those_of_the_folder(srpo, one, elsewhere):
    flags = ("--sigmas", "0.9", "--delta-sigma", "0.075", "--output", "out")
    outcome = srpo("recover", one, *flags, "--format", "jsonl")
    assert outcome.stdout == (elsewhere / "out" / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert [row["label"] for row in rows] == [
        "round trip",
        "one-step",
        "Direct-Align 0.075 denoise",
        "Direct-Align 0.075 invert",
    ]
    assert [row.get("delta_sigma") for row in rows] == [None, None, 0.075, -0.075]
    as_csv = list(csv.DictReader(io.StringIO(srpo("recover", one, *flags, "--format", "csv").stdout)))
    assert [float(row["psnr"]) for row in as_csv] == [row["psnr"] for row in rows]


def test_noise_only_takes_any_folder_with_an_autoencoder_and_pictures_without_a_prompt(srpo, elsewhere):
    Image.new("RGB", (48, 48), "red").save("red.png")
    (elsewhere / "alone").mkdir()
    (elsewhere / "alone" / "vae").symlink_to(WEIGHTS / "pipeline" / "vae")
    for model in ((), ("--model", "alone")):
        outcome = srpo("recover", "red.png", "--noise-only", "--sigmas", "0.5", *model)
        assert outcome.exit_code == 0, outcome.stderr
        assert "no reward" in outcome.stderr and "reward" not in outcome.stdout
        assert "no recommended window" in outcome.stderr
    assert srpo("recover", "red.png", "--model", "alone").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "needs pictures, or a prompt to draw one"),
        ("--prompt ' '", "needs pictures"),
        ("nope.png", "nope.png does not exist"),
        ("plain.png", "plain.png has no prompt, and miniature reads one: give --prompt TEXT, or plain.txt beside it"),
        ("plain.png --prompt 'a cat'", "the miniature cannot draw 'a cat'"),
        ("broken.png --prompt 'a red cube'", "broken.png is not a picture"),
        ("sheets", "is a sheet of pictures"),
        ("plain.png --num-images 3", "--num-images 3 is for drawn pictures"),
        ("--prompt 'a red cube' --noise-only", "name pictures"),
        ("plain.png --sigmas 0.9,x", "--sigmas x: not a number"),
        ("plain.png --sigmas 0", "--sigmas 0: must lie between 0 and 1"),
        ("plain.png --delta-sigma 1", "--delta-sigma 1.0: must lie between 0 and 1"),
        ("plain.png --gain -0.1", "--gain -0.1: must lie between 0 and 1"),
        ("plain.png --prompt 'a red cube' --size 64", "the miniature takes 48x48 and no other"),
        (f"--prompt 'a red cube' --seed {2**64}", "is too large: choose one below 2**53"),
        ("plain.png --reward hpsv2", "Unknown reward 'hpsv2'. Did you mean 'hpsv2.1'"),
        ("plain.png --weights hpsv2.1=x", "--weights hpsv2.1=x is of no use"),
        ("plain.png --preset realsm", "Did you mean 'realism'?"),
        ("plain.png --prompt 'a red cube' --output plain.png", "cannot write to plain.png"),
    ],
)
def test_a_mistake_is_one_line(srpo, elsewhere, images, arguments, message):
    Image.new("RGB", (48, 48), "red").save("plain.png")
    Path("broken.png").write_text("not a picture")
    (elsewhere / "sheets").mkdir()
    (elsewhere / "sheets" / "grid.png").symlink_to(images / "grid.png")
    outcome = srpo("recover", *shlex.split(arguments))
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert outcome.exit_code == 2 and outcome.stdout == ""
    assert not (elsewhere / "recover" / "rows.jsonl").exists()


def test_an_interrupt_keeps_what_was_measured(srpo, elsewhere, images, monkeypatch):
    from srpo_cli.recipes.recover import Study

    study = Study._study

    def interrupted(self, model, reward, subject, number):
        if number == 1:
            raise KeyboardInterrupt
        return study(self, model, reward, subject, number)

    monkeypatch.setattr(Study, "_study", interrupted)
    outcome = srpo("recover", str(images), "--sigmas", "0.5")
    assert outcome.exit_code == 130
    assert "stopped" in outcome.stderr and "one-step" in outcome.stdout
    rows = (elsewhere / "recover" / "rows.jsonl").read_text().splitlines()
    assert len({json.loads(row)["picture"] for row in rows}) == 1
