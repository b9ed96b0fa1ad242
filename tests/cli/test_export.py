"""``srpo export`` on the command line: what it reports and how it refuses."""

import json
from pathlib import Path

import pytest
import torch

from srpo_cli.config.load import dump_yaml, load_train_config
from srpo_cli.models.flux import load_flux
from srpo_cli.runtime.folder import RunFolder


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the miniature with one checkpoint, as far as an export reads it."""
    folder = RunFolder(tmp_path_factory.mktemp(request.param) / request.param)
    settings = {"model.name": "miniature", "train.mode": request.param}
    folder.start(dump_yaml(load_train_config("realism", flags=settings, miniature=True)))
    model = load_flux("miniature", torch.float32)
    if request.param == "lora":
        model.add_lora(rank=2)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.01
    checkpoint = folder.checkpoints / "step-000003"
    model.save_weights(checkpoint / "transformer")
    (checkpoint / "state.json").write_text('{"step": 3}')
    return folder.path


def test_it_writes_what_was_trained_and_reports_one_row(srpo, run, tmp_path):
    outcome = srpo("export", run, "--output", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.stderr
    header, row = outcome.stdout.splitlines()
    assert header.split()[:4] == ["format", "step", "weights", "dtype"]
    assert row.split()[:4] == [run.name, "3", "trained", "float32"]
    assert row.split()[-1] == str(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").is_file()


def test_json_is_one_document(srpo, run, tmp_path):
    outcome = srpo("export", run, "--output", tmp_path / "out", "--dtype", "bfloat16", "--report", "json")
    report = json.loads(outcome.stdout)
    assert report["format"] == run.name
    assert report["dtype"] == "bfloat16"
    assert report["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))


def test_without_an_output_it_goes_below_the_run_and_a_second_one_is_refused(srpo, run):
    assert srpo("export", run / "checkpoints" / "step-000003").exit_code == 0
    assert (run / "exports" / f"step-000003-{run.name}" / "README.md").is_file()
    outcome = srpo("export", run)
    assert outcome.exit_code == 2
    assert "is not empty" in outcome.stderr


@pytest.mark.parametrize("run", ["full"], indirect=True)
def test_an_extracted_lora_is_reported_layer_by_layer_and_in_all(srpo, run, tmp_path):
    outcome = srpo("export", run, "--output", tmp_path / "out", "--format", "extract", "--rank", "2")
    assert outcome.exit_code == 0, outcome.stderr
    layers, summary = outcome.stdout.split("\n\n")
    assert layers.splitlines()[0].split() == ["layer", "rank", "difference", "error"]
    assert any(line.startswith("transformer_blocks.0.attn.to_q ") for line in layers.splitlines())
    assert {"error", "left_out", "total_error"} < set(summary.splitlines()[0].split())
    assert "The LoRA leaves out modulation, norms, biases" in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "4"], "--rank 4 is of no use here"),
        (["--checkpoint", "9"], "no checkpoint of step 9: --checkpoint can be 3"),
        (["--format", "lora"], "--format extract makes one"),
    ],
)
@pytest.mark.parametrize("run", ["full"], indirect=True)
def test_a_mistake_is_one_line(srpo, run, tmp_path, arguments, message):
    outcome = srpo("export", run, "--output", tmp_path / "out", *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert outcome.stdout == ""
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(srpo, run, tmp_path, monkeypatch):
    def interrupt(**_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("srpo_cli.recipes.export.model_card", interrupt)
    assert srpo("export", run, "--output", tmp_path / "out").exit_code == 130
    assert not list(tmp_path.iterdir())
