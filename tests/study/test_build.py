"""A study is made whole or not at all, crossed, balanced, and blind in every byte that a rater may get."""

import hashlib
import json
import os
import stat
import struct
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from srpo_cli.errors import UsageError
from srpo_cli.study.arms import items_of_folders, items_of_result
from srpo_cli.study.build import Options, new_study, resolve
from srpo_cli.study.design import deal
from srpo_cli.study.rubric import load_rubric
from srpo_cli.study.store import Change, Store, read_facts
from srpo_cli.study.training import read_training

PROMPTS = ["a red sphere", "a blue cone", "a green cube"]


@pytest.fixture
def arms(serving, tmp_path) -> dict[str, Path]:
    return {arm: serving.draw_arm(tmp_path / "arms", arm, PROMPTS) for arm in serving.ARMS}


def png_chunks(content: bytes) -> list[str]:
    names, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        names.append(content[at + 4 : at + 8].decode())
        at += length + 12
    return names


def test_folders_are_matched_by_prompt(arms, serving):
    items = items_of_folders(arms)
    assert [item.prompt for item in items] == PROMPTS
    assert [item.prompt_id for item in items] == ["00000", "00001", "00002"]
    for number, item in enumerate(items):
        assert {arm: path.name for arm, path in item.files.items()} == dict.fromkeys(
            serving.ARMS, f"okapi-{number:03d}.png"
        )


def test_the_first_missing_picture_is_named(arms):
    (arms["walrus-tuned"] / "okapi-001.png").unlink()
    with pytest.raises(UsageError, match=r"arm walrus-tuned has no picture of 'a blue cone'.*zebra-base") as caught:
        items_of_folders(arms)
    assert "\n" not in str(caught.value)


def test_several_seeds_of_a_prompt_are_matched_by_seed_and_stay_one_prompt(serving, tmp_path):
    def draw(arm: str, seeds: list[int]) -> Path:
        folder = tmp_path / arm
        folder.mkdir()
        for place, seed in enumerate(seeds):
            (folder / f"{place}.txt").write_text("a red sphere")
            info = serving.PngImagePlugin.PngInfo()
            info.add_text("srpo", json.dumps({"seed": seed}))
            Image.new("RGB", (8, 8)).save(folder / f"{place}.png", pnginfo=info)
        return folder

    items = items_of_folders({"one": draw("one", [7, 8]), "two": draw("two", [8, 7])})
    assert [[path.name for path in item.files.values()] for item in items] == [["0.png", "1.png"], ["1.png", "0.png"]]
    assert {item.prompt_id for item in items} == {"00000"}
    with pytest.raises(UsageError, match="two pictures of 'a red sphere' with seed 7"):
        items_of_folders({"three": draw("three", [7, 7])})


def test_pictures_without_seeds_are_matched_in_the_order_of_their_names(tmp_path):
    for arm in ("one", "two"):
        (tmp_path / arm).mkdir()
        for name in ("a", "b"):
            Image.new("RGB", (8, 8)).save(tmp_path / arm / f"{name}.jpg")
            (tmp_path / arm / f"{name}.txt").write_text("a red sphere")
    items = items_of_folders({arm: tmp_path / arm for arm in ("one", "two")})
    assert [[path.name for path in item.files.values()] for item in items] == [["a.jpg"] * 2, ["b.jpg"] * 2]


def test_prompts_may_come_from_a_file(tmp_path):
    for arm in ("one", "two"):
        (tmp_path / arm).mkdir()
        for number in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / arm / f"{number}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    folders = {arm: tmp_path / arm for arm in ("one", "two")}
    assert [item.prompt for item in items_of_folders(folders, str(tmp_path / "prompts.txt"))] == PROMPTS
    with pytest.raises(UsageError, match=r"0\.png does not say what it shows"):
        items_of_folders(folders)


def test_a_result_of_eval_is_a_study_s_source(arms, serving, tmp_path):
    table = [
        {
            "model": arm,
            "item": f"photo/{number:05d}",
            "group": "photo",
            "prompt": prompt,
            "image": 0,
            "seed": number,
            "file": f"arms/{arm}/okapi-{number:03d}.png",
        }
        for arm in (*serving.ARMS, "third")
        for number, prompt in enumerate(PROMPTS)
    ]
    items = items_of_result(pd.DataFrame(table), tmp_path, serving.ARMS)
    assert [(item.prompt_id, item.prompt, item.group) for item in items] == [
        (f"photo/{number:05d}", prompt, "photo") for number, prompt in enumerate(PROMPTS)
    ]
    assert all(list(item.files) == list(serving.ARMS) for item in items)
    assert all(path.is_file() for item in items for path in item.files.values())
    assert len(items_of_result(pd.DataFrame(table), tmp_path)[0].files) == 3
    with pytest.raises(UsageError, match=r"Unknown model 'wallrus-tuned'\. Did you mean 'walrus-tuned'"):
        items_of_result(pd.DataFrame(table), tmp_path, ["wallrus-tuned"])
    with pytest.raises(UsageError, match="arm third has no picture of 'a green cube'"):
        items_of_result(pd.DataFrame(table[:-1]), tmp_path)


def test_items_of_one_text_are_one_prompt_whose_pictures_are_apart(arms, serving, tmp_path):
    texts = ["a red sphere", "a blue cone", "a red sphere", *(f"prompt {number}" for number in range(27))]
    table = [
        {"model": arm, "item": f"{number:05d}", "group": f"group {number}", "prompt": text, "image": 0}
        | {"file": f"arms/{arm}/okapi-{number % 3:03d}.png"}
        for arm in serving.ARMS
        for number, text in enumerate(texts)
    ]
    items = items_of_result(pd.DataFrame(table), tmp_path)
    assert [item.prompt_id for item in items[:3]] == ["00000", "00001", "00000"]
    facts = new_study(tmp_path / "study", items, Options("mine", raters=2, k=2, repeats=0))
    assert (facts.prompts, facts.pictures) == (29, 60)
    key = json.loads((tmp_path / "study" / "private" / "key.json").read_text())
    tasks = serving.rows(
        tmp_path / "study", "SELECT rater, position, picture, prompt_id, group_name FROM tasks ORDER BY rater, position"
    )
    assert all(group == key[picture]["group"] for _, _, picture, _, group in tasks)  # each item keeps its own
    red = [(rater, position) for rater, position, _, prompt, _ in tasks if prompt == "00000"]
    assert [rater for rater, _ in red] == ["r01"] * 4 + ["r02"] * 4
    gaps = [after - before for (rater, before), (same, after) in pairwise(red) if rater == same]
    assert min(gaps) >= 60 // 8  # half of four rounds


def test_pictures_that_size_would_tell_apart_are_refused_and_leave_nothing(arms, tmp_path):
    Image.new("RGB", (48, 56)).save(arms["zebra-base"] / "okapi-002.png")
    (arms["zebra-base"] / "okapi-002.txt").write_text(PROMPTS[2])
    with pytest.raises(UsageError, match=r"zebra-base/okapi-002.png is 48x56, .*walrus-tuned/okapi-002.png is 48x48"):
        new_study(tmp_path / "study", items_of_folders(arms), Options("mine"))
    assert [path.name for path in tmp_path.iterdir()] == ["arms"]


def test_a_study_of_grades_is_fully_crossed_and_balanced(serving, tmp_path):
    study = serving.make_study(tmp_path, prompts=15, raters=5, k=3, repeats=0.1)
    key = json.loads((study / "private" / "key.json").read_text())
    tasks = serving.rows(study, "SELECT rater, kind, picture, prompt_id FROM tasks ORDER BY rater, position")
    seen = defaultdict(list)
    for rater, kind, picture, prompt in tasks:
        assert key[picture]["prompt_id"] == prompt
        if kind == "item":
            seen[rater, prompt].append(key[picture]["arm"])
    assert all(sorted(of_prompt) == sorted(serving.ARMS) for of_prompt in seen.values())
    assert set(Counter(prompt for _, prompt in seen).values()) == {3}
    assert set(Counter(rater for rater, _ in seen).values()) == {9}
    assert Counter(rater for rater, kind, *_ in tasks if kind == "repeat") == dict.fromkeys(
        [f"r0{number}" for number in range(1, 6)], round(0.1 * 18)
    )


def test_the_order_is_the_seed_s_and_the_ids_are_nobody_s(serving, tmp_path):
    def shown(folder: str, seed: int) -> tuple[list[tuple[str, str, str]], set[str]]:
        study = serving.make_study(tmp_path / folder, prompts=6, seed=seed)
        key = json.loads((study / "private" / "key.json").read_text())
        tasks = serving.rows(study, "SELECT rater, kind, picture, prompt_id FROM tasks ORDER BY rater, position")
        return [(rater, kind, key[picture]["arm"], prompt) for rater, kind, picture, prompt in tasks], set(key)

    (first, ids), (again, other_ids), (different, _) = shown("a", 1), shown("b", 1), shown("c", 2)
    assert first == again != different
    assert not ids & other_ids


def test_pairs_show_every_pair_of_arms_with_balanced_sides(serving, tmp_path):
    study = serving.make_study(tmp_path, prompts=8, mode="pairs", raters=3, k=3, repeats=0)
    key = json.loads((study / "private" / "key.json").read_text())
    tasks = serving.rows(study, "SELECT rater, picture, other, prompt_id FROM tasks")
    assert len(tasks) == 3 * 8
    left = Counter((rater, key[picture]["arm"]) for rater, picture, *_ in tasks)
    assert set(left.values()) == {4}
    for _, picture, other, prompt in tasks:
        assert {key[picture]["arm"], key[other]["arm"]} == set(serving.ARMS)
        assert key[picture]["prompt_id"] == key[other]["prompt_id"] == prompt


def test_nothing_outside_the_private_folder_names_an_arm_or_a_file(serving, tmp_path):
    study = serving.make_study(tmp_path)
    key = json.loads((study / "private" / "key.json").read_text())
    assert {entry["arm"] for entry in key.values()} == set(serving.ARMS)
    files = [path for path in study.rglob("*") if path.is_file() and path.parent.name != "private"]
    assert len(files) == 2 + len(key)
    for path in files:
        content = path.name.encode() + path.read_bytes()
        assert not [word for word in (*serving.ARMS, serving.TELLTALE) if word.encode() in content], path
    for picture, entry in key.items():
        content = (study / "pictures" / f"{picture}.png").read_bytes()
        assert set(png_chunks(content)) == {"IHDR", "IDAT", "IEND"}
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        with Image.open(study / "pictures" / f"{picture}.png") as blind, Image.open(entry["file"]) as original:
            assert blind.tobytes() == original.convert("RGB").tobytes()


def test_the_key_and_the_links_are_for_their_owner_only(serving, tmp_path):
    study = serving.make_study(tmp_path)
    assert stat.S_IMODE((study / "private").stat().st_mode) == 0o700
    for name in ("key.json", "links.csv"):
        assert stat.S_IMODE((study / "private" / name).stat().st_mode) == 0o600
    links = serving.tokens(study)
    assert list(links) == ["r01", "r02", "e01"] and len(set(links.values())) == 3
    stored = dict(serving.rows(study, "SELECT rater, token_sha256 FROM raters"))
    assert stored == {rater: hashlib.sha256(token.encode()).hexdigest() for rater, token in links.items()}


def test_what_is_answered_is_for_its_owner_only(serving, tmp_path):
    before = os.umask(0)
    try:
        study = serving.make_study(tmp_path)
        store = Store(study)
        answer_all(store, "r01", lambda task, dimension: 2)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in study.glob("answers.sqlite*")}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("answers.sqlite", "answers.sqlite-wal", "answers.sqlite-shm"), 0o600)


def test_a_folder_that_is_taken_is_left_alone(arms, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="study exists"):
        new_study(tmp_path / "study", items_of_folders(arms), Options("mine"))
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"raters": 3, "k": 5}, "--per-prompt 5 is more than --raters 3"), ({"mode": "pairs"}, "pairs need two arms")],
)
def test_options_that_do_not_fit_are_refused(arms, tmp_path, options, message):
    items = items_of_folders({"zebra-base": arms["zebra-base"]})
    with pytest.raises(UsageError, match=message):
        new_study(tmp_path / "study", items, Options("mine", **options))


def test_training_comes_first_asks_what_is_known_and_belongs_to_no_arm(arms, tmp_path):
    row = {"image": "arms/zebra-base/okapi-000.png", "prompt": "a red sphere"}
    grades = {"realism": "Pass", "alignment": "Excellent"}
    (tmp_path / "training.jsonl").write_text(json.dumps({**row, "grades": grades}) + "\n\n")
    training = read_training(tmp_path, "grades", load_rubric("grades"))
    study = tmp_path / "study"
    new_study(study, items_of_folders(arms), Options("mine", raters=2, k=2), training)
    store = Store(study)
    for rater in ("r01", "r02"):
        standing = store.standing(rater)
        assert (standing.task.kind, standing.task.known) == ("training", {"alignment": 3, "realism": 1})
        assert (standing.steps, standing.dimension) == (2, "alignment")
        assert standing.upcoming.kind == "item"
    key = json.loads((study / "private" / "key.json").read_text())
    assert key[standing.task.picture]["arm"] is None and key[standing.task.picture]["kind"] == "training"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("nothing", "line 1: not a JSON object"),
        ('{"image": "a.png", "grades": {"alignment": "Good"}}', "line 1: prompt is missing"),
        ('{"image": "a.png", "prompt": "a", "grades": {}}', "line 1: grades are missing"),
        ('{"image": "a.png", "prompt": "a", "grades": {"alignement": "Good"}}', "Did you mean 'alignment'"),
        ('{"image": "a.png", "prompt": "a", "grades": {"alignment": "Godd"}}', "Did you mean 'Good'"),
        ("", "holds no training item"),
    ],
)
def test_a_training_row_that_cannot_be_used_is_named(tmp_path, row, message):
    (tmp_path / "training.jsonl").write_text(row)
    with pytest.raises(UsageError, match=message):
        read_training(tmp_path / "training.jsonl", "grades", load_rubric("grades"))


def test_flaws_are_counted_relative_to_other_pictures_as_in_the_paper():
    counted = [each.name for each in load_rubric("grades") if each.question.startswith("Beside other pictures")]
    assert counted == ["realism", "detail"]


def test_prompt_free_questions_come_before_the_prompt_was_seen(serving, tmp_path):
    facts = read_facts(serving.make_study(tmp_path))
    assert [dimension.name for dimension in facts.dimensions] == [
        "alignment",
        "realism",
        "detail",
        "aesthetics",
        "overall",
    ]
    assert facts.asked[0].name == "aesthetics"
    assert [dimension.name for dimension in facts.dimensions if dimension.prompt == "hidden"] == ["aesthetics"]


def answer_all(store: Store, rater: str, value_of) -> None:
    while (standing := store.standing(rater)).task:
        value = value_of(standing.task, standing.dimension)
        request = f"{standing.task.task}-{standing.dimension}"
        assert store.record(rater, Change(request, standing.task.task, standing.dimension, value, 5))


def test_what_raters_differ_on_by_two_goes_to_the_experts_once_and_only_that(serving, tmp_path):
    study = serving.make_study(tmp_path, prompts=6, experts=2, repeats=0)
    store = Store(study)
    answer_all(store, "r01", lambda task, dimension: 2)
    differing = {("00000", "detail"), ("00000", "realism"), ("00003", "detail"), ("00004", "overall")}

    def value(task, dimension: str) -> int:
        return 0 if (task.prompt_id, dimension) in differing else 3 if dimension == "aesthetics" else 2

    answer_all(store, "r02", value)
    disputes = store.disputes()
    assert {(dispute.prompt_id, name) for dispute in disputes for name in dispute.dimensions} == differing
    assert len(disputes) == 3 * len(serving.ARMS)  # both arms' pictures of three prompts
    assert store.waiting().unresolved == 6
    assert resolve(study) == 6 and resolve(study) == 0
    assert store.loads("expert") == {"e01": 3, "e02": 3}
    assert (store.waiting().unresolved, store.waiting().with_experts) == (0, 6)
    answer_all(store, "e01", lambda task, dimension: 1)
    assert store.waiting().with_experts == 3
    answered = serving.rows(
        study, "SELECT prompt_id, dimension FROM answers JOIN tasks USING (task) WHERE kind = 'resolution'"
    )
    assert set(answered) <= differing


def test_experts_get_a_dispute_once_however_many_resolve_at_once(serving, tmp_path, monkeypatch):
    study = serving.make_study(tmp_path, prompts=3, experts=2, repeats=0)
    for rater, grade in (("r01", 0), ("r02", 3)):
        answer_all(Store(study), rater, lambda task, dimension, grade=grade: grade)

    def slowly(*arguments):
        time.sleep(0.05)  # between reading and adding
        return deal(*arguments)

    monkeypatch.setattr("srpo_cli.study.build.deal", slowly)
    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(resolve, [study] * 4)) == [0, 0, 0, 6]
    assert Store(study).loads("expert") == {"e01": 3, "e02": 3}


def test_grades_one_apart_are_no_dispute(serving, tmp_path):
    study = serving.make_study(tmp_path, prompts=2, repeats=0)
    store = Store(study)
    answer_all(store, "r01", lambda task, dimension: 2)
    answer_all(store, "r02", lambda task, dimension: 3)
    assert store.disputes() == [] and resolve(study) == 0


def test_a_study_without_experts_or_grades_resolves_nothing(serving, tmp_path):
    with pytest.raises(UsageError, match="has no experts"):
        resolve(serving.make_study(tmp_path / "a", experts=0))
    with pytest.raises(UsageError, match="compares pairs"):
        resolve(serving.make_study(tmp_path / "b", mode="pairs"))
