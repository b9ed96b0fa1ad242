"""Scoring: the numbers are the reward's own, in every form, and every picture has a row."""

import json
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from srpo_cli.miniature.world import CG, PHOTO, draw_scenes_of, render
from srpo_cli.recipes import score as recipe
from srpo_cli.recipes.score import Request, Summary, Wording
from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.miniature import load_miniature
from srpo_cli.runtime.inputs import Picture, list_pictures
from srpo_cli.runtime.pictures import save_grid, save_png

PROMPTS = ["a red sphere on sand", "a blue cone on snow", "a green cube on grass"]
POSITIVE, NEGATIVE = "realistic photo", "cg render"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(recipe, "best_device", lambda: torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three photographs and three CG pictures of the miniature's world, and a sheet of them."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, style in (("photo", PHOTO), ("cg", CG)):
        pictures = render(draw_scenes_of(PROMPTS, style, 0))
        (folder / name).mkdir()
        for i, (picture, prompt) in enumerate(zip(pictures, PROMPTS, strict=True)):
            save_png(picture, folder / name / f"{i}.png", {"prompt": prompt, "model": "miniature"})
        save_grid([pictures], folder / name / "grid.png")
    return folder


@pytest.fixture(scope="module")
def reward() -> Reward:
    return load_miniature()


def pair(form="srp", k=0.0, positive=(POSITIVE,), negative=(NEGATIVE,)):
    return lambda _name: Wording(form, positive, negative, k=k)


def rows_of(folder: Path, wording=lambda _name: Wording(), **options) -> list[dict]:
    return list(recipe.score(list_pictures([str(folder)]), Request(wording=wording, **options)))


def pixels(row: dict) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(row["file"]))).permute(2, 0, 1)[None] / 255


def test_a_plain_score_is_the_reward_of_the_file(folder, reward):
    rows = rows_of(folder)
    assert len(rows) == 6
    for row in rows:
        torch.testing.assert_close(row["score"], reward(pixels(row), [row["prompt"]]).item(), rtol=1e-5, atol=1e-6)
        assert row["reward"] == "miniature" and row["unit"] == "cosine" and row["preprocess"] == "crop"
        assert row["reward_weights"] == reward.weights and "sha256:" in row["reward_weights"]


@pytest.mark.parametrize(
    ("form", "k", "weights"),
    [("sgp", 0, (1, 0)), ("srp", 0, (1, -1)), ("cfg", 0.7, (0.7, 0.3)), ("upstream", 0.25, (1.25, -1))],
)
def test_every_form_is_its_weighted_sum_of_two_rewards(folder, reward, form, k, weights):
    for row in rows_of(folder, pair(form, k)):
        positive, negative = (reward(pixels(row), [f"{word}. {row['prompt']}"]).item() for word in (POSITIVE, NEGATIVE))
        assert row["score"] == pytest.approx(weights[0] * positive + weights[1] * negative, abs=2e-6)
        if form != "sgp":
            assert row["positive"] == pytest.approx(positive, abs=1e-6)
            assert row["gap"] == pytest.approx(row["positive"] - row["negative"], abs=1e-6)


def test_lists_of_words_are_averaged(folder):
    one, other, both = (
        rows_of(folder, pair(positive=words)) for words in ((POSITIVE,), ("comic",), (POSITIVE, "comic"))
    )
    for first, second, mean in zip(one, other, both, strict=True):
        assert mean["positive"] == pytest.approx((first["positive"] + second["positive"]) / 2, abs=1e-6)
        assert mean["negative"] == pytest.approx(first["negative"], abs=1e-6)


def test_photographs_win_and_cg_loses(folder):
    summary = Summary()
    for row in rows_of(folder, pair()):
        summary.add(row)
    cg, photo, everything = summary.rows()
    assert (cg["folder"], photo["folder"]) == (str(folder / "cg"), str(folder / "photo"))
    assert cg["win_rate"].mean == 0 and photo["win_rate"].mean == 1 and everything["win_rate"].mean == 0.5
    assert photo["gap"].low > cg["gap"].high
    assert everything["gap_x100"].mean == pytest.approx(100 * everything["gap"].mean)
    assert everything["pictures"] == 6 and everything["resampled"] == "3 prompts"


def test_the_interval_resamples_prompts_and_not_their_pictures():
    """Ten copies of two prompts hold no more than the two prompts."""
    few, many = Summary(), Summary()
    for summary, copies in ((few, 1), (many, 10)):
        for i in range(copies):
            for prompt, score in (("a", 0.0), ("b", 1.0)):
                row = {"file": f"{i}.png", "prompt": prompt, "reward": "r", "score": score}
                summary.add({**row, "unit": "", "preprocess": None, "reward_weights": ""})
    assert few.rows()[0]["score"] == many.rows()[0]["score"]
    assert few.rows()[0]["score"].mean == 0.5 and few.rows()[0]["score"].low == 0


def test_the_rows_do_not_depend_on_the_batch_and_keep_the_order(folder):
    whole = rows_of(folder, pair(), batch_size=32)
    for batch_size in (1, 4):
        parts = rows_of(folder, pair(), batch_size=batch_size)
        assert [row["file"] for row in parts] == [row["file"] for row in whole]
        for part, row in zip(parts, whole, strict=True):
            assert part["gap"] == pytest.approx(row["gap"], abs=1e-6)


def test_pictures_of_many_sizes_are_one_batch(folder, tmp_path, reward):
    for i, size in enumerate([(48, 48), (96, 64), (33, 120)]):
        image = Image.open(folder / "photo" / f"{i}.png")
        info = image.info["srpo"]
        image.resize(size).save(tmp_path / f"{i}.png", pnginfo=_info(info))
    for row in rows_of(tmp_path):
        torch.testing.assert_close(row["score"], reward(pixels(row), [row["prompt"]]).item(), rtol=1e-5, atol=1e-6)


def _info(text: str):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("srpo", text)
    return info


def test_what_cannot_be_read_or_has_no_prompt_is_a_row_and_the_rest_is_scored(folder, tmp_path):
    good = folder / "photo" / "0.png"
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:900])
    for name in ("mute", "garbled"):
        Image.new("RGB", (48, 48)).save(tmp_path / f"{name}.png")
    (tmp_path / "garbled.txt").write_bytes(b"\xff\xfe\xfa")
    bad = [Picture(str(tmp_path / f"{name}.png")) for name in ("cut", "mute", "gone", "garbled")]
    sources = [bad[0], Picture(str(good)), *bad[1:]]
    cut, scored, mute, gone, garbled = recipe.score(sources, Request(rewards=["miniature"]))
    assert "garbled.txt" in garbled["error"]
    assert "cut.png" in cut["error"] and "gone.png" in gone["error"] and "score" not in cut
    assert "no prompt" in mute["error"] and "--prompt" in mute["error"]
    assert scored["score"] > 0 and "error" not in scored


def test_a_picture_without_a_prompt_can_be_judged_by_the_words_alone(folder, reward):
    image = folder / "photo" / "0.png"
    bare = folder.parent / "bare.png"
    Image.open(image).save(bare)
    (row,) = recipe.score([Picture(str(bare))], Request(rewards=["miniature"], wording=pair()))
    assert row["positive"] == pytest.approx(reward(pixels(row), [POSITIVE]).item(), abs=1e-6)


def test_rows_keep_their_own_keys_and_come_before_the_source_ends(folder):
    first_is_there = Event()

    def rows():
        yield Picture(str(folder / "photo" / "0.png"), "a red sphere", row={"seed": 3, "score": "old"})
        assert first_is_there.wait(60)
        yield Picture(str(folder / "photo" / "1.png"), "a blue cone", row={"seed": 4})

    seen = []
    for row in recipe.score(rows(), Request(rewards=["miniature"]), as_they_come=True):
        seen.append(row)
        first_is_there.set()
    assert [row["seed"] for row in seen] == [3, 4] and isinstance(seen[0]["score"], float)


def test_a_mistake_in_the_rows_comes_after_those_before_it(folder):
    first_is_there = Event()

    def rows():
        yield Picture(str(folder / "photo" / "0.png"), "a red sphere")
        assert first_is_there.wait(60)
        raise recipe.SrpoError("line 2")

    scored = recipe.score(rows(), Request(rewards=["miniature"]), as_they_come=True)
    assert next(scored)["score"]
    first_is_there.set()
    with pytest.raises(recipe.SrpoError, match="line 2"):
        next(scored)


class Blind(Reward):
    """Mean brightness: reads no text."""

    name, unit, reads_text = "blind", "brightness", False

    def __call__(self, images, prompts):
        return torch.stack([image.mean() for image in images]).float()


class Sick(Blind):
    name = "sick"

    def __call__(self, images, prompts):
        return super().__call__(images, prompts) / 0


def test_a_reward_that_reads_no_text_gives_its_plain_score_beside_a_pair(folder, monkeypatch):
    load = recipe.load_reward
    monkeypatch.setattr(recipe, "load_reward", lambda name, *a: Blind() if name == "blind" else load(name, *a))
    rows = rows_of(folder / "photo", pair(), rewards=["blind", "miniature"])
    assert [row["reward"] for row in rows] == ["blind", "miniature"] * 3
    assert rows[0]["score"] == pytest.approx(pixels(rows[0]).mean().item(), abs=1e-6)
    assert "gap" not in rows[0] and "gap" in rows[1]


def test_a_number_that_is_none_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(recipe, "load_reward", lambda *_: Sick())
    assert all("no finite number" in row["error"] for row in rows_of(folder / "photo", rewards=["sick"]))


def test_rows_are_json(folder):
    row = rows_of(folder / "photo", pair())[0]
    assert json.loads(json.dumps(row)) == row
