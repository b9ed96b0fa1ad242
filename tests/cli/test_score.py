"""``srpo score`` as a user types it: forms, formats, prompts, exit codes."""

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from srpo_cli.miniature import WEIGHTS
from srpo_cli.miniature.world import PHOTO, draw_scenes_of, render
from srpo_cli.runtime.pictures import save_grid, save_png

PROMPTS = ["a red sphere on sand", "a blue cone on snow", "a green cube on grass"]
PAIR = ("--pos", "realistic photo", "--neg", "CG render")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "images").mkdir()
    pictures = render(draw_scenes_of(PROMPTS, PHOTO, 0))
    for i, (picture, prompt) in enumerate(zip(pictures, PROMPTS, strict=True)):
        save_png(picture, folder / "images" / f"{i}.png", {"prompt": prompt, "model": "miniature"})
    return folder


@pytest.fixture(autouse=True)
def here(drawn, monkeypatch):
    monkeypatch.chdir(drawn)


def json_rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_command_in_users_scripts_works_on_a_fresh_machine(srpo):
    outcome = srpo("score", "images/", *PAIR)
    assert outcome.exit_code == 0
    header, *rows = outcome.stdout.splitlines()
    assert header.split() == ["score", "positive", "negative", "gap", "reward", "file"]
    assert [row.split()[-1] for row in rows[:3]] == [f"images/{i}.png" for i in range(3)]
    for line in rows[:3]:
        score, positive, negative, gap = map(float, line.split()[:4])
        assert score == gap == pytest.approx(positive - negative, abs=2e-4)
    assert "100 x gap" in outcome.stdout and "win rate" in outcome.stdout and "3 prompts" in outcome.stdout
    assert "sha256:" in outcome.stdout
    assert "realistic photo against CG render" in outcome.stdout


def test_formats_hold_the_same_rows(srpo, tmp_path):
    jsonl = json_rows(srpo("score", "images/", *PAIR, "--format", "jsonl").stdout)
    table = list(csv.DictReader(io.StringIO(srpo("score", "images/", *PAIR, "--format", "csv").stdout)))
    assert len(jsonl) == len(table) == 3
    for row, cells in zip(jsonl, table, strict=True):
        assert cells["file"] == row["file"] and cells["prompt"] == row["prompt"] and cells["error"] == ""
        assert float(cells["gap"]) == row["gap"] and cells["reward_weights"] == row["reward_weights"]


def test_a_file_is_written_in_the_format_of_its_ending_and_the_summary_is_shown(srpo, tmp_path):
    file = tmp_path / "new" / "scores.csv"
    outcome = srpo("score", "images/", *PAIR, "-o", str(file))
    assert len(file.read_text().splitlines()) == 4
    assert "win rate" in outcome.stdout and "images/0.png" not in outcome.stdout


def test_data_is_on_stdout_and_the_summary_on_stderr(srpo):
    outcome = srpo("score", "images/", *PAIR, "--format", "jsonl")
    assert len(json_rows(outcome.stdout)) == 3
    assert "win rate" in outcome.stderr


def test_the_guided_forms(srpo):
    rows = json_rows(srpo("score", "images/", *PAIR, "--cfg-k", "0.7", "--format", "jsonl").stdout)
    assert rows[0]["score"] == pytest.approx(0.7 * rows[0]["positive"] + 0.3 * rows[0]["negative"], abs=1e-6)
    rows = json_rows(srpo("score", "images/", *PAIR, "--upstream-k", "0.2", "--format", "jsonl").stdout)
    assert rows[0]["score"] == pytest.approx(1.2 * rows[0]["positive"] - rows[0]["negative"], abs=1e-6)


def test_a_preset_brings_its_words_for_the_miniature(srpo):
    told = json_rows(srpo("score", "images/", "--preset", "realism", "--format", "jsonl").stdout)
    given = json_rows(
        srpo("score", "images/", "--pos", "realistic photo", "--neg", "cg render", "--format", "jsonl").stdout
    )
    assert [row["gap"] for row in told] == [row["gap"] for row in given]


def test_the_held_out_reward_of_the_miniature_judges_by_its_words(srpo):
    flags = ("--reward", "miniature:clip", "--weights", f"miniature:clip={WEIGHTS / 'reward'}", "--preset", "realism")
    rows = json_rows(srpo("score", "images/", *flags, "--format", "jsonl").stdout)
    trained_on = json_rows(srpo("score", "images/", "--preset", "realism", "--format", "jsonl").stdout)
    for row, other in zip(rows, trained_on, strict=True):
        assert row["reward"] == "miniature:clip" and row["reward_weights"].startswith("clip.safetensors sha256:")
        assert row["gap"] > 0 and row["gap"] != other["gap"], "they are photographs, which both can tell"


def test_prompts_from_a_flag_a_file_and_a_sidecar(srpo, tmp_path):
    by_flag = srpo("score", "images/1.png", "--prompt", "a red sphere", "--format", "jsonl").stdout
    assert json_rows(by_flag)[0]["prompt"] == "a red sphere"
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    rows = json_rows(srpo("score", "images/", "--prompts", str(tmp_path / "p.txt"), "--format", "jsonl").stdout)
    assert [row["prompt"] for row in rows] == ["one", "two", "three"]
    beside = tmp_path / "a.png"
    beside.write_bytes(Path("images/0.png").read_bytes())
    beside.with_suffix(".txt").write_text("a yellow cylinder")
    assert json_rows(srpo("score", str(beside), "--format", "jsonl").stdout)[0]["prompt"] == "a yellow cylinder"


def test_prompts_in_order_do_not_count_the_sheets_in_a_folder(srpo, tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(Path(f"images/{i}.png").read_bytes())
    save_grid([torch.rand(2, 3, 48, 48)], tmp_path / "grid.png")
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    rows = json_rows(srpo("score", str(tmp_path), "--prompts", str(tmp_path / "p.txt"), "--format", "jsonl").stdout)
    assert [row["prompt"] for row in rows] == ["one", "two"]


def test_a_list_that_names_none_of_the_pictures_is_told(srpo, tmp_path):
    (tmp_path / "p.csv").write_text("file,prompt\nnope.png,x\n")
    outcome = srpo("score", "images/", "--prompts", str(tmp_path / "p.csv"))
    assert "does not name 3 of 3 pictures" in outcome.stderr


def test_rows_on_standard_input_are_scored_and_keep_their_keys(srpo, monkeypatch):
    rows = [{"file": "images/2.png", "seed": 7}, {"image": "images/0.png", "prompt": "a blue cone"}]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(row) + "\n" for row in rows)))
    first, second = json_rows(srpo("score", "-", "--format", "jsonl").stdout)
    assert (first["seed"], first["prompt"]) == (7, PROMPTS[2]) and second["prompt"] == "a blue cone"


def test_an_empty_standard_input_is_told(srpo, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    outcome = srpo("score", "-")
    assert outcome.exit_code == 2 and "held no row" in outcome.stderr


def test_an_unreadable_picture_is_a_row_and_exit_code_3(srpo, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "b.png").write_bytes(Path("images/0.png").read_bytes())
    outcome = srpo("score", str(tmp_path), "--format", "jsonl")
    bad, good = json_rows(outcome.stdout)
    assert outcome.exit_code == 3
    assert "not a picture" in bad["error"] and "score" not in bad and good["score"] > 0
    assert "1 of 2 rows" in outcome.stderr


def test_pictures_of_other_models_need_hpsv2_and_nothing_takes_its_place(srpo, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    outcome = srpo("score", str(tmp_path), *PAIR)
    assert outcome.exit_code == 4 and outcome.stdout == ""
    announced, error = outcome.stderr.splitlines()
    assert announced.startswith("downloading HPS_v2.1_compressed.pt (1.97 GB)") and "xswu/HPSv2" in announced
    assert error.startswith("error: hpsv2.1 needs") and "hf download xswu/HPSv2 HPS_v2.1_compressed.pt" in error


def test_what_was_in_the_output_outlives_a_mistake(srpo, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "scores.csv").write_text("precious")
    assert srpo("score", str(tmp_path), *PAIR, "-o", str(tmp_path / "scores.csv")).exit_code == 4
    assert (tmp_path / "scores.csv").read_text() == "precious"


def test_scores_can_be_scored_again(srpo, monkeypatch):
    first = srpo("score", "images/", *PAIR, "--format", "jsonl").stdout
    monkeypatch.setattr("sys.stdin", io.StringIO(first.replace('"gap"', '"error": "old", "gap"')))
    again = srpo("score", "-", "--format", "jsonl")
    assert again.exit_code == 0
    plain = srpo("score", "images/", "--format", "jsonl").stdout
    for row, expected in zip(json_rows(again.stdout), json_rows(plain), strict=True):
        assert row["score"] == pytest.approx(expected["score"], abs=1e-6)
        assert row.keys() == expected.keys()


def test_one_picture_has_no_interval(srpo):
    outcome = srpo("score", "images/0.png", *PAIR)
    (summary,) = (line for line in outcome.stdout.splitlines() if "1 picture" in line)
    assert "[" not in summary and "1 pictures" not in summary


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "nope does not exist"),
        (["images/", "--neg", "CG render"], "--neg needs --pos"),
        (["images/", "--pos", "a", "--cfg-k", "0.5"], "weighs --pos against --neg"),
        (["images/", *PAIR, "--cfg-k", "1", "--upstream-k", "1"], "two forms"),
        (["images/", "--pos", " "], "--pos is empty"),
        (["images/", "--reward", "hps"], "Did you mean 'hpsv2"),
        (["images/", "--weights", "pickscore=x"], "no use without --reward pickscore"),
        (["images/", "--weights", "x"], "give NAME=PATH"),
        (["images/", "--prompt", "a", "--prompts", "b"], "cannot be used together"),
        (["images/", "-o", "scores.xyz"], "--format"),
        (["-", "images/"], "leave out images/"),
        (["images/", "--calibrate"], "--calibrate needs control words"),
        (["images/", "--check", "--calibrate", *PAIR], "cannot be used together"),
        (["images/", "--preset", "nope"], "Unknown preset"),
        (["images/", "--preprocess", "pad"], "no preprocessing 'pad'"),
    ],
)
def test_mistakes_are_one_line(srpo, arguments, said):
    outcome = srpo("score", *arguments)
    assert outcome.exit_code == 2 and outcome.stdout == ""
    assert outcome.stderr.count("\n") == 1 and said in outcome.stderr


def test_a_check_names_the_reward_and_its_verdict(srpo):
    (row,) = json_rows(srpo("score", "images/", "--check", "--format", "jsonl").stdout)
    assert row["reward"] == "miniature" and row["verdict"] == "ok" and row["dead_pixels"] == 0
    assert row["error_random"] < 0.05


def test_a_calibration_is_a_table_and_a_picture(srpo, tmp_path):
    outcome = srpo("score", "images/", "--calibrate", "--preset", "realism", "-o", str(tmp_path / "w.png"))
    assert outcome.exit_code == 0
    assert "realistic photo" in outcome.stdout and "cg render" in outcome.stdout and "redundancy" in outcome.stdout
    assert Image.open(tmp_path / "w.png").size[0] > 300
    rows = json_rows(
        srpo("score", "images/", "--calibrate", *PAIR, "--format", "jsonl", "-o", str(tmp_path / "w.jsonl")).stdout
    )
    assert rows == [] and (tmp_path / "w.png").is_file()
    assert {row["table"] for row in json_rows((tmp_path / "w.jsonl").read_text())} == {"word", "pair", "redundancy"}
