"""What a name is: a model, a run, a checkpoint or its average, a transformer's file, a LoRA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from srpo_cli.config.load import load_train_config
from srpo_cli.errors import UsageError
from srpo_cli.runtime.sources import Source, check_base, is_model


def refuse() -> str:
    raise AssertionError("nobody asked for a base")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run on the miniature with one checkpoint."""
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoints" / "step-000002"
    (checkpoint / "transformer").mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    (checkpoint / "state.json").write_text(json.dumps({"step": 2}))
    write_config(folder)
    return folder


def write_config(folder: Path, mode: str = "full", weights: Path | None = None) -> None:
    config = load_train_config("realism", miniature=True).config.model_dump(mode="json")
    config["train"]["mode"], config["model"]["weights"] = mode, None if weights is None else str(weights)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("part", ["", "checkpoints/step-000002", "checkpoints/step-000002/transformer"])
def test_a_run_and_its_checkpoint_are_the_runs_base_with_their_weights(run: Path, part: str) -> None:
    source = Source.find(str(run / part), refuse)
    assert source.base == "miniature"
    assert source.tuned == (source.weights,) == (run / "checkpoints" / "step-000002" / "transformer",)


def test_a_run_is_its_best_checkpoint_and_the_link_the_checkpoint_that_it_points_to(run: Path, tmp_path: Path) -> None:
    newer = shutil.copytree(run / "checkpoints" / "step-000002", run / "checkpoints" / "step-000003")
    (newer / "state.json").write_text(json.dumps({"step": 3}))
    assert Source.find(str(run), refuse).weights == newer / "transformer"
    (run / "best").symlink_to("checkpoints/step-000002")
    for name in (run, run / "best", run / "best" / "transformer"):
        assert Source.find(str(name), refuse) == Source("miniature", newer.with_name("step-000002") / "transformer")
    assert is_model(run / "best")
    (tmp_path / "elsewhere").symlink_to(run)
    assert Source.find(str(tmp_path / "elsewhere" / "best"), refuse).weights.parent.name == "step-000002"
    assert Source.find(str(newer), refuse).weights == newer / "transformer"


def test_averaged_weights_are_what_a_checkpoint_is_for_unless_others_are_named(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-000002"
    (checkpoint / "ema").mkdir()
    for name in (run, checkpoint, checkpoint / "ema"):
        assert Source.find(str(name), refuse).weights == checkpoint / "ema"
    assert Source.find(str(checkpoint / "transformer"), refuse).weights == checkpoint / "transformer"


def test_a_lora_that_was_trained_on_a_tuned_transformer_comes_with_it(run: Path, tmp_path: Path) -> None:
    tuned, lora = tmp_path / "tuned.safetensors", tmp_path / "lora.safetensors"
    save_file({"transformer_blocks.0.attn.to_q.weight": torch.zeros(1)}, tuned)
    save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(1)}, lora)
    write_config(run, "lora", tuned)
    source = Source.find(str(run), refuse)
    assert source.tuned == (tuned, source.weights)
    write_config(run, "lora", lora)  # which it went on from
    assert Source.find(str(run), refuse).tuned == (source.weights,)
    write_config(run, "full", tuned)
    assert Source.find(str(run), refuse).tuned == (source.weights,)


def test_a_file_is_put_into_the_base_that_is_asked_for_and_may_be_one(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"double_blocks.0.img_attn.proj.weight": torch.zeros(1)}, file)
    assert Source.find(str(file), lambda: "flux.1-krea-dev") == Source("flux.1-krea-dev", file)
    check_base(str(file))
    with pytest.raises(UsageError, match="is no base model"):
        check_base(str(tmp_path))
    with pytest.raises(UsageError, match="does not exist"):
        Source.find(str(tmp_path / "y.safetensors"), refuse)


@pytest.mark.parametrize("name", ["flux.1-dev", "flux.1-krea-dev", "miniature", "someone/a-model"])
def test_a_models_name_is_itself(name: str) -> None:
    assert Source.find(name, refuse) == Source(name)


def test_a_misspelt_model_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'flux\.1-krea-dev'"):
        Source.find("flux.1-krea", refuse)
