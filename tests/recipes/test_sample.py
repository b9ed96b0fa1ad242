"""The sampling recipe: it draws what ``FluxPipeline`` draws, and knows a picture by what decides it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from srpo_cli.miniature import WEIGHTS
from srpo_cli.recipes import sample as recipe

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


def test_a_prompt_in_another_script_has_a_file_of_its_own():
    model = recipe.load_flux("miniature")
    rows = recipe._rows(recipe.Source("m"), recipe._fingerprint(model), recipe.Request(["木の球", "雪"]), 2, (48, 48))
    assert len({row["file"] for row in rows}) == 2
    assert all(row["file"].startswith("picture-seed0-") for row in rows)
