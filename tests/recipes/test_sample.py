"""The sampling recipe: it draws what ``FluxPipeline`` draws, and knows a picture by what decides it."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from srpo_cli.errors import UsageError
from srpo_cli.miniature import WEIGHTS
from srpo_cli.models.flux import load_flux
from srpo_cli.recipes import sample as recipe
from srpo_cli.runtime.pictures import read_metadata

PROMPTS = ("a red sphere on a wooden table", "realistic photo. an orange cube on grass, backlit", "comic. a blue cone")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(recipe, "best_device", lambda: torch.device("cpu"))


def draw(folder: Path, prompts=PROMPTS, model="miniature", **options) -> list[dict]:
    return list(recipe.sample(recipe.Source(str(model)), recipe.Request(prompts, **options), folder))


@pytest.mark.parametrize("size", [(48, 48), (64, 32)])
def test_it_draws_what_flux_pipeline_draws(tmp_path, size):
    rows = draw(tmp_path, model=WEIGHTS / "pipeline", num_images=2, seed=3, steps=12, size=size)
    pipeline = FluxPipeline.from_pretrained(WEIGHTS / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for row in rows:
        image = pipeline(
            row["prompt"],
            height=size[0],
            width=size[1],
            num_inference_steps=row["steps"],
            guidance_scale=row["guidance"],
            max_sequence_length=pipeline.tokenizer_2.model_max_length,
            generator=torch.Generator().manual_seed(row["seed"]),
        ).images[0]
        drawn = np.array(Image.open(tmp_path / Path(row["file"]).name)).astype(int)
        # One level, because float32 sums depend on the batch that a picture is drawn in, and rounding to 8 bits
        # makes a whole level of a difference in the seventh digit where a value lies between two.
        assert np.abs(drawn - np.array(image).astype(int)).max() <= 1


def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(tmp_path):
    together = draw(tmp_path / "together", num_images=3)
    alone = draw(tmp_path / "alone", PROMPTS[2:], seed=1)[0]
    same = next(row for row in together if Path(row["file"]).name == Path(alone["file"]).name)
    first, second = (np.array(Image.open(row["file"])).astype(int) for row in (same, alone))
    assert np.abs(first - second).max() <= 1  # as above


def test_a_grid_holds_whole_rows_of_seeds_and_no_more_than_fit(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(recipe, "_GRID_LIMIT", 5)
    monkeypatch.setattr(recipe, "save_grid", lambda rows, path, labels=(), captions=(): shown.append((rows, labels)))
    draw(tmp_path, num_images=2, steps=1)
    draw(tmp_path, num_images=1, steps=1)
    draw(tmp_path, PROMPTS[:1], num_images=7, steps=1)
    assert [(len(rows), len(rows[0]), len(labels)) for rows, labels in shown] == [(2, 2, 2), (1, 3, 0), (1, 5, 1)]


def test_large_pictures_are_drawn_in_small_batches():
    assert recipe._batch_size((48, 48)) == 8
    assert recipe._batch_size((1024, 1024)) == 2
    assert recipe._batch_size((4096, 4096)) == 1


def test_a_fingerprint_knows_every_part(monkeypatch):
    model = recipe.load_flux("miniature")
    seen = {recipe._fingerprint(model)}
    for part in (model.transformer, model.vae, model.text_encoder, model.text_encoder_2):
        with torch.no_grad():
            next(iter(part.parameters())).mul_(1.001)
        seen.add(recipe._fingerprint(model))
    assert len(seen) == 5


# --- how much of a LoRA ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """The folder of a LoRA for the miniature that changes its pictures; alpha / rank is 2."""
    model = load_flux("miniature")
    model.add_lora(4, alpha=8, seed=1)
    for name, parameter in sorted(model.named_trainable_parameters().items()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    folder = tmp_path_factory.mktemp("lora")
    model.save_weights(folder)
    return folder


def pixels(row: dict) -> np.ndarray:
    return np.array(Image.open(row["file"])).astype(int)


def draw_scaled(lora: Path, folder: Path, scale: float | None, **options) -> list[dict]:
    request = recipe.Request(PROMPTS, lora_scale=scale, **options)
    return list(recipe.sample(recipe.Source("miniature", lora), request, folder))


def test_at_scale_0_it_draws_what_the_base_draws_and_at_1_what_was_trained(lora, tmp_path):
    base, trained = draw(tmp_path / "base"), draw_scaled(lora, tmp_path / "trained", None)
    nothing, whole = (draw_scaled(lora, tmp_path / str(scale), scale) for scale in (0, 1))
    for plain, tuned, at_0, at_1 in zip(base, trained, nothing, whole, strict=True):
        assert (pixels(at_0) == pixels(plain)).all()
        assert Path(at_1["file"]).read_bytes() == Path(tuned["file"]).read_bytes()
        assert np.abs(pixels(tuned) - pixels(plain)).max() > 16


def test_at_any_other_scale_it_draws_what_flux_pipeline_draws_with_it(lora, tmp_path):
    rows = draw_scaled(lora, tmp_path, 0.5, num_images=2)
    pipeline = FluxPipeline.from_pretrained(WEIGHTS / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(lora, adapter_name="tuned")
    pipeline.set_adapters("tuned", 0.5)
    for row in rows:
        image = pipeline(
            row["prompt"],
            height=48,
            width=48,
            num_inference_steps=row["steps"],
            guidance_scale=row["guidance"],
            max_sequence_length=pipeline.tokenizer_2.model_max_length,
            generator=torch.Generator().manual_seed(row["seed"]),
        ).images[0]
        assert np.abs(pixels(row) - np.array(image).astype(int)).max() <= 1  # as for the base, above


def test_a_scale_is_recorded_and_decides_the_file_but_for_1(lora, tmp_path):
    rows = {scale: draw_scaled(lora, tmp_path, scale, steps=1)[0] for scale in (None, 1, 0, 0.5)}
    assert [row["lora_scale"] for row in rows.values()] == [1, 1, 0, 0.5]
    assert draw_scaled(lora, tmp_path, 0.0, steps=1)[0] == rows[0]
    assert len({row["file"] for row in rows.values()}) == 3
    for row in rows.values():
        assert read_metadata(Path(row["file"])) == {**row, "file": Path(row["file"]).name}
    # What decided a picture's name before there were scales.
    decides = [rows[1]["fingerprint"], PROMPTS[0], 0, 1, 3.5, [48, 48]]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:8]
    assert Path(rows[None]["file"]).stem.endswith(f"-seed0-{digest}") and rows[None] == rows[1]
    assert draw(tmp_path / "base", steps=1)[0]["lora_scale"] is None
    listed = [json.loads(line) for line in (tmp_path / recipe.SAMPLES).read_text().splitlines()]
    assert sorted(row["lora_scale"] for row in listed if row["prompt"] == PROMPTS[0]) == [0, 0.5, 1]


def test_scales_are_drawn_from_one_model_as_each_alone_and_nothing_twice(lora, tmp_path, monkeypatch):
    loads, drawings = [], []
    load, draw_pictures = recipe.load_flux, recipe.draw_pictures
    monkeypatch.setattr(recipe, "load_flux", lambda *args, **options: loads.append(1) or load(*args, **options))
    monkeypatch.setattr(recipe, "draw_pictures", lambda *args: drawings.append(args[-1]) or draw_pictures(*args))
    source, request = recipe.Source("miniature", lora), recipe.Request(PROMPTS, steps=2)
    rows = list(recipe.compare_scales(source, [1.5, 0, 0.25], request, tmp_path))
    assert (len(loads), drawings) == (1, [3, 3, 3])
    labels = ["scale-1.5", "scale-0", "scale-0.25"]
    assert [row["label"] for row in rows] == [label for label in labels for _ in PROMPTS]
    assert [row["lora_scale"] for row in rows[::3]] == [1.5, 0, 0.25]
    assert {Path(row["file"]).parent.name for row in rows} == set(labels)
    assert list(recipe.compare_scales(source, [1.5, 0, 0.25], request, tmp_path)) == rows and len(drawings) == 3
    for row, alone in zip(rows[-3:], draw_scaled(lora, tmp_path / "alone", 0.25, steps=2), strict=True):
        assert Path(row["file"]).read_bytes() == Path(alone["file"]).read_bytes()


def test_what_a_lora_was_trained_on_is_not_scaled(lora, tmp_path):
    tuned = load_flux("miniature")
    with torch.no_grad():
        for parameter in tuned.transformer.parameters():
            parameter.mul_(1.02)
    tuned.save_weights(tmp_path / "tuned")
    beneath, request = tmp_path / "tuned", recipe.Request(PROMPTS, steps=2, lora_scale=0)
    on_it = list(recipe.sample(recipe.Source("miniature", lora, beneath), request, tmp_path / "on"))
    alone = list(recipe.sample(recipe.Source("miniature", beneath), replace(request, lora_scale=None), tmp_path / "a"))
    for row, plain, base in zip(on_it, alone, draw(tmp_path / "base", steps=2), strict=True):
        assert (pixels(row) == pixels(plain)).all() and np.abs(pixels(row) - pixels(base)).max() > 8


@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_a_model_without_a_lora_has_none_to_scale_and_is_not_even_loaded(tmp_path, monkeypatch, scale):
    load_flux("miniature").save_weights(tmp_path / "full")
    monkeypatch.setattr(recipe, "load_flux", lambda *_, **__: pytest.fail("it was loaded"))
    for source in (recipe.Source("miniature"), recipe.Source("miniature", tmp_path / "full")):
        with pytest.raises(UsageError, match=rf"^lora scale {scale}: .* has no LoRA .* --format extract") as refused:
            list(recipe.sample(source, recipe.Request(PROMPTS, lora_scale=scale), tmp_path / "out"))
        assert str(source.weights or "miniature") in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_prompt_in_another_script_has_a_file_of_its_own():
    model = recipe.load_flux("miniature")
    loaded = recipe._Loaded(recipe.Source("m"), model, recipe._fingerprint(model))
    rows = recipe._rows(loaded, recipe.Request(["木の球", "雪"]))
    assert len({row["file"] for row in rows}) == 2
    assert all(row["file"].startswith("picture-seed0-") for row in rows)
