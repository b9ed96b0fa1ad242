"""``srpo train --dry-run`` says what a run would need: after the configuration as comments, or as one document."""

import json
import re

import pytest
import yaml

from srpo_cli.config.load import load_train_config
from srpo_cli.runtime.plan import Counts, Work

FLUX = Counts(  # as tests/recipes/test_plan.py counts it; here only the words around the numbers matter
    parameters=11_901_408_320,
    modulation=3_227_516_928,
    linears=8_606_711_808,
    block=339_831_296,
    matrix=56_623_104,
    lora=65_372_160,
    transformer=Work(37.28e12, 111.83e12, 149.10e12, 23_490_633_800, 933_475_784, 455_518_384, 77_936_640),
    decoder=Work(5.04e12, 10.21e12, 15.25e12, 5_897_613_840, 846_288_128, 2_786_919_168, 265_420_800),
    reward=Work(0.335e12, 0.68e12, 0.68e12, 389_662_224, 389_662_224, 0, 4_227_136),
    decoder_parameters=83_819_683,
    reward_parameters=632_076_800,
    encoder_parameters=4_885_371_136,
    prompt=4_195_840,
)


@pytest.fixture
def counted(monkeypatch):
    """FLUX.1-dev's counts, without counting them again for every line of output."""
    monkeypatch.setattr("srpo_cli.recipes.plan.count", lambda config, dtype=None: FLUX)


def comments(stdout: str) -> dict[str, str]:
    """The plan's lines by their first words."""
    lines = stdout[stdout.index("# memory plan:") :].splitlines()
    rows = (re.split(r": | {2,}", line.removeprefix("#").strip(), maxsplit=1) for line in lines)
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_the_plan_follows_the_configuration_as_comments(srpo, counted, tmp_path):
    outcome = srpo("train", "--preset", "realism", "--on", "h100", "--dry-run")
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    found = comments(outcome.stdout)
    assert found["memory plan"] == "streamed on h100, 79 GiB"
    assert found["total"].endswith("of 79.0 GiB, the peak, at update")
    assert found["forwards"].startswith("25 pictures")
    assert found["gradient passes"].startswith("2 pictures")
    assert "on h100" in found["time of a step"] and "estimated, not measured" in found["time of a step"]
    assert found["launch"] == "srpo train --preset realism"
    path = tmp_path / "printed.yaml"
    path.write_text(outcome.stdout)
    assert load_train_config(path).config == load_train_config("realism").config
    assert yaml.safe_load(outcome.stdout)["model"]["name"] == "flux.1-dev"


def test_the_same_as_one_document(srpo, counted):
    arguments = ["--preset", "realism", "--set", "optimizer.lr=1e-5", "--gpus", "8", "--on", "h100", "--dry-run"]
    outcome = srpo("train", *arguments, "--format", "json")
    document = json.loads(outcome.stdout)
    assert (document["plan"], document["fits"], document["advice"]) == ("sharded", True, [])
    *parts, total = document["memory_gib"].values()
    assert total == pytest.approx(sum(parts), abs=0.01)
    assert total <= 58
    assert (document["forwards_per_step"], document["gradient_passes_per_step"]) == (25, 2)
    assert document["flops_per_step"] == pytest.approx(1257e12, rel=0.01)
    assert document["seconds_per_step"]["h100"] > 0
    assert document["disk_gib"] >= 2 * 12 * FLUX.parameters / 2**30  # float32 weights and moments, twice
    assert document["launch"] == "srpo train --preset realism --set optimizer.lr=1e-5 --gpus 8"
    assert document["settings"]["shard"] == document["machine"]["gpus"] == 8
    assert document["config"]["optimizer"]["lr"] == 1e-5


def test_what_does_not_fit_comes_with_three_settings_that_would(srpo, counted):
    outcome = srpo("train", "--preset", "realism", "--on", "rtx-4090", "--dry-run")
    assert outcome.exit_code == 0
    assert "# memory plan: streamed on rtx-4090, 24 GiB: DOES NOT FIT" in outcome.stdout
    assert comments(outcome.stdout)["what would fit"].startswith("--set train.mode=lora")
    document = json.loads(
        srpo("train", "--preset", "realism", "--on", "rtx-4090", "--dry-run", "--format", "json").stdout
    )
    assert not document["fits"]
    assert [advice["fits"] for advice in document["advice"]] == [True] * 3


def test_the_launch_line_is_what_was_typed(srpo, counted, tmp_path):
    typed = f"--preset realism --set train.ema=0.99 --model flux.1-dev --output {tmp_path / 'my run'}"
    arguments = ["--preset", "realism", "--set", "train.ema=0.99", "--model", "flux.1-dev"]
    arguments += ["--output", tmp_path / "my run", "--seed", "3", "--steps", "9"]
    outcome = srpo("train", *arguments, "--on", "h200", "--dry-run", "--format", "json")
    launch = json.loads(outcome.stdout)["launch"]
    assert launch == f"srpo train {typed} --seed 3 --steps 9".replace(str(tmp_path / "my run"), f"'{tmp_path}/my run'")
    assert not (tmp_path / "my run").exists()


def test_a_model_that_is_not_here_and_not_known_is_one_line_after_the_configuration(srpo, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    outcome = srpo("train", "--preset", "realism", "--model", "someone/model", "--on", "h100", "--dry-run")
    assert outcome.exit_code == 4
    assert "name: someone/model" in outcome.stdout
    assert len(outcome.stderr.splitlines()) == 1
    assert "hf download someone/model" in outcome.stderr


def test_the_miniature_is_planned_for_the_cpu(srpo):
    outcome = srpo("train", "--preset", "realism", "--model", "miniature", "--dry-run", "--format", "json")
    document = json.loads(outcome.stdout)
    assert (document["plan"], document["fits"]) == ("replicated", True)
    assert document["forwards_per_step"] == 80
    assert 0 < document["memory_gib"]["total"] < 1
    assert document["launch"] == "srpo train --preset realism --model miniature"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--on h101 --dry-run", "Unknown GPU 'h101'. Did you mean 'h100'?"),
        ("--on h100", "--on and --format are for a plan: add --dry-run"),
        ("--format json", "--on and --format are for a plan: add --dry-run"),
    ],
)
def test_a_mistake_is_one_line(srpo, arguments, message):
    outcome = srpo("train", "--preset", "realism", "--model", "flux.1-dev", *arguments.split())
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert message in outcome.stderr
