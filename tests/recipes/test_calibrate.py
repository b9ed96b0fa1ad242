"""Calibration against a world whose styles and words are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from srpo_cli.algorithms.base import ControlWords
from srpo_cli.errors import UsageError
from srpo_cli.metrics.intervals import mean_interval
from srpo_cli.miniature.world import CG, COMIC, PAINTING, PHOTO, draw_prompts, draw_scenes_of, render, vocabulary
from srpo_cli.recipes.calibrate import MADE_UP, Calibration, calibrate
from srpo_cli.rewards.clip import ClipReward
from srpo_cli.rewards.miniature import load_miniature

PROMPTS = draw_prompts(30, 3, "validation", lit=False)
STYLES = [i % 5 for i in range(30)]
KNOWN = {
    "realistic photo": PHOTO,
    "photo": PHOTO,
    "cg render": CG,
    "3d render": CG,
    "comic": COMIC,
    "cartoon": COMIC,
    "oil painting": PAINTING,
    "painting": PAINTING,
}
UNSEEN = ["renaissance", "cyberpunk", "steampunk", "ukiyo-e", "watercolour", "vaporwave", "gouache", "sketch"]


@pytest.fixture(scope="module")
def pictures() -> list[Tensor]:
    """Every fifth in each style, the first of them in none."""
    by_style = [render(draw_scenes_of(PROMPTS[style::5], style, seed=style)) for style in range(5)]
    return [by_style[style][i // 5] for i, style in enumerate(STYLES)]


@pytest.fixture(scope="module")
def reward() -> ClipReward:
    return load_miniature()


@pytest.fixture(scope="module")
def calibration(reward: ClipReward, pictures: list[Tensor]) -> Calibration:
    return calibrate(reward, pictures, PROMPTS, ControlWords(list(KNOWN), UNSEEN))


def by_word(calibration: Calibration) -> dict:
    return {row["word"]: row for row in calibration.words}


def test_words_of_the_rewards_captions_are_told_from_words_it_never_saw(calibration: Calibration) -> None:
    rows = by_word(calibration)
    assert all(rows[word]["understood"] for word in KNOWN)
    assert sum(rows[word]["understood"] for word in UNSEEN) <= 1  # one in twenty passes by chance
    assert not set(UNSEEN) & set(vocabulary())
    assert not set(MADE_UP) & set(vocabulary())


def test_what_is_called_understood_finds_its_style(reward: ClipReward, pictures: list[Tensor]) -> None:
    """The truth behind the criterion: shifts of known words separate the styles that they name."""
    styles, stack = torch.tensor(STYLES), torch.stack(pictures)
    words = ControlWords(list(KNOWN), UNSEEN)
    plain = reward(stack, PROMPTS)
    for word, style in KNOWN.items():
        shift = reward(stack, words.texts(word, PROMPTS)) - plain
        its, others = shift[styles == style], shift[(styles != style) & (styles != 0)]
        assert (its[:, None] > others).float().mean() > 0.8, word


def test_shifts_are_rewards_with_the_word_minus_rewards_without(
    reward: ClipReward, calibration: Calibration, pictures: list[Tensor]
) -> None:
    stack = torch.stack(pictures)
    with torch.no_grad():
        shift = reward(stack, [f"comic. {prompt}" for prompt in PROMPTS]).double() - reward(stack, PROMPTS).double()
    row = by_word(calibration)["comic"]
    expected = mean_interval(shift)
    assert [row["shift"], row["shift_low"], row["shift_high"]] == pytest.approx(list(expected), abs=1e-6)
    assert row["spread"] == pytest.approx(shift.std().item(), abs=1e-6)
    assert row["shift_sd"] == pytest.approx(shift.mean().item() / reward(stack, PROMPTS).std().item(), rel=1e-4)


def test_synonyms_are_redundant_and_opposites_are_not(reward: ClipReward, pictures: list[Tensor]) -> None:
    calibration = calibrate(
        reward, pictures, PROMPTS, ControlWords(["realistic photo", "cg render"], ["3d render", "comic"])
    )
    pairs = {(row["positive"], row["negative"]): row for row in calibration.pairs}
    assert len(pairs) == 4 and len(calibration.redundancy) == 6
    synonyms, opposites = pairs["cg render", "3d render"], pairs["realistic photo", "3d render"]
    assert synonyms["redundancy"] > 0.9 > 0 > opposites["redundancy"]
    assert synonyms["spread"] < 0.2 * opposites["spread"]
    assert opposites["gap_low"] < opposites["gap"] < opposites["gap_high"]
    assert "realistic photo / " in calibration.summary()[-1]


def test_few_pictures_are_said_and_fewer_refused(reward: ClipReward, pictures: list[Tensor]) -> None:
    words = ControlWords(["photo"], ["cg render"])
    calibration = calibrate(reward, pictures[:5], PROMPTS[:5], words)
    assert any(note.startswith("5 pictures: intervals are wide") for note in calibration.notes)
    with pytest.raises(UsageError, match="got 2 pictures"):
        calibrate(reward, pictures[:2], PROMPTS[:2], words)


def test_a_reward_without_text_is_refused(pictures: list[Tensor]) -> None:
    blind = load_miniature()
    blind.reads_text = False
    with pytest.raises(UsageError, match="reads no text"):
        calibrate(blind, pictures, PROMPTS, ControlWords(["photo"], ["cg render"]))


def test_without_prompts_the_text_is_the_word_and_understanding_is_left_open(
    reward: ClipReward, pictures: list[Tensor]
) -> None:
    calibration = calibrate(reward, pictures, [""] * 30, ControlWords(["photo"], ["cg render"]))
    stack = torch.stack(pictures)
    gap = reward(stack, ["photo"] * 30) - reward(stack, ["cg render"] * 30)
    assert calibration.pairs[0]["gap"] == pytest.approx(gap.mean().item(), abs=1e-6)
    assert [row["understood"] for row in calibration.words] == [None, None]
    assert any(note.startswith("no prompts") for note in calibration.notes)


@pytest.mark.parametrize(("different", "told"), [(1, False), (7, False), (8, True)])
def test_too_few_different_prompts_leave_open_which_words_are_understood(
    reward: ClipReward, pictures: list[Tensor], different: int, told: bool
) -> None:
    prompts = [PROMPTS[i % different] for i in range(30)]
    calibration = calibrate(reward, pictures, prompts, ControlWords(["photo"], ["cyberpunk"]))
    assert (by_word(calibration)["photo"]["understood"] is not None) == told
    assert any(note.startswith(f"{different} different prompts") for note in calibration.notes) != told


def test_pictures_may_differ_in_size(reward: ClipReward, pictures: list[Tensor]) -> None:
    words = ControlWords(["photo"], ["cg render"])
    mixed = [*pictures[:9], pictures[9].repeat_interleave(2, -1).repeat_interleave(2, -2)]
    assert calibrate(reward, mixed, PROMPTS[:10], words).pictures == 10


def test_rows_are_flat_and_sorted(calibration: Calibration) -> None:
    for rows in (calibration.words, calibration.pairs, calibration.redundancy):
        assert all(row.keys() == rows[0].keys() for row in rows)
        assert all(value is None or isinstance(value, str | int | float) for row in rows for value in row.values())
    shifts = [row["shift"] for row in calibration.words]
    assert shifts == sorted(shifts, reverse=True)
    assert calibration.summary()[0].startswith("not understood by miniature")
    assert calibration.noise[0] < calibration.noise[1] and 0 < calibration.floor < 1


def test_the_picture_is_a_png_that_grows_with_the_words(
    reward: ClipReward, calibration: Calibration, pictures: list[Tensor], tmp_path: Path
) -> None:
    few = calibrate(reward, pictures, PROMPTS, ControlWords(["photo"], ["cg render"]))
    sizes = []
    for name, result in (("few", few), ("many", calibration)):
        result.save_picture(tmp_path / "new" / f"{name}.png")
        with Image.open(tmp_path / "new" / f"{name}.png") as image:
            assert image.format == "PNG" and len(image.getcolors(1 << 24)) > 50
            sizes.append(image.size)
    assert sizes[1][1] > sizes[0][1] > 300
