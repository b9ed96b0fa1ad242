"""``srpo eval rate export`` and ``analyze`` on studies that the tool has made and raters have answered."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from srpo_cli.config.benchmark import Benchmark
from srpo_cli.metrics.aggregate import Measure
from srpo_cli.recipes.results import Result, summarise, write_result
from srpo_cli.study.arms import Item
from srpo_cli.study.build import Options, new_study, resolve
from srpo_cli.study.export import GRADES, read_answers, read_study
from srpo_cli.study.store import Change, Store

PROMPTS = 12


def answer_all(study: Path, grade: Callable[[str, str, str], int]) -> None:
    """Everybody answers everything; ``grade`` takes the rater, the arm (of the left picture) and the dimension."""
    store, key = Store(study), json.loads((study / "private" / "key.json").read_text())
    for person in store.progress():
        while (standing := store.standing(person.rater)).task:
            arm = key[standing.task.picture]["arm"]
            value = grade(person.rater, arm, standing.dimension)
            request = f"{standing.task.task} {standing.dimension}"
            store.record(person.rater, Change(request, standing.task.task, standing.dimension, value, 1500))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Make a study of small pictures of two arms."""

    def make_one(mode: str = "grades", **options: int) -> Path:
        items = []
        for number in range(PROMPTS):
            files = {arm: tmp_path / f"{arm}-{number}.png" for arm in ("base", "ours")}
            for place, file in enumerate(files.values()):
                pixels = np.full((8, 8, 3), 10 * number + place, np.uint8)
                Image.fromarray(pixels).save(file)
            items.append(Item(f"{number:05d}", f"prompt {number}", "photo", files))
        chosen = {"raters": 4, "experts": 1, "k": 3, "repeats": 0.1, **options}
        new_study(tmp_path / "study", items, Options("taste", mode, **chosen))
        return tmp_path / "study"

    return make_one


def strict_and_mild(rater: str, arm: str, _dimension: str) -> int:
    """Ours is one grade better than base, and r01 is one grade stricter than the others."""
    return 2 + (arm == "ours") - (rater == "r01")


def test_export_writes_a_row_for_every_answer(make, srpo):
    study = make()
    answer_all(study, strict_and_mild)
    done = srpo("eval", "rate", "export", study)
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert done.exit_code == 0
    assert len(rows) == read_study(study).due
    for row in rows:
        assert row["study"] == "taste"
        assert int(row["value"]) == strict_and_mild(row["rater"], row["arm"], row["dimension"])
        assert row["grade"] == GRADES[int(row["value"])]
    assert {row["kind"] for row in rows} == {"item", "repeat"}


def test_export_writes_other_formats(make, srpo, tmp_path):
    study = make()
    answer_all(study, strict_and_mild)
    lines = srpo("eval", "rate", "export", study, "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line)["task"] for line in lines] == read_answers(study)["task"].tolist()
    done = srpo("eval", "rate", "export", study, "-o", tmp_path / "new" / "folder" / "answers.parquet")
    assert done.stdout == ""
    assert len(pd.read_parquet(tmp_path / "new" / "folder" / "answers.parquet")) == len(lines)
    refused = srpo("eval", "rate", "export", study, "-o", tmp_path / "answers.xlsx")
    assert refused.exit_code == 2
    assert "answers.xlsx" in refused.stderr


@pytest.mark.parametrize("command", ["export", "analyze"])
def test_a_folder_that_is_no_study_is_refused_in_one_line(srpo, tmp_path, command):
    refused = srpo("eval", "rate", command, tmp_path)
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert "is no study" in refused.stderr


def test_an_unanswered_study_is_refused_in_one_line(make, srpo):
    refused = srpo("eval", "rate", "analyze", make())
    assert refused.exit_code == 2
    assert "has too few answers yet, 0" in refused.stderr


def test_analyze_prints_the_rates_and_writes_a_report(make, srpo):
    study = make()
    answer_all(study, strict_and_mild)
    done = srpo("eval", "rate", "analyze", study)
    assert done.exit_code == 0, done.stderr
    analysis = json.loads((study / "analysis" / "analysis.json").read_text())
    expected = analysis["grades"]["ours"]["realism"]["excellent"]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ours"))
    assert f"{100 * expected['mean']:.1f} [{100 * expected['low']:.1f}, {100 * expected['high']:.1f}]" in line
    for heading in ("Excellent", "Difference", "Agreement", "Raters", "Overall by the rule"):
        assert heading in done.stdout
    page = (study / "analysis" / "report.html").read_text()
    assert "Realism and artifacts" in page
    assert "report.html" in done.stderr


def test_analyze_says_as_json_what_it_writes(make, srpo, tmp_path):
    study = make()
    answer_all(study, strict_and_mild)
    done = srpo("eval", "rate", "analyze", study, "--format", "json", "-o", tmp_path / "out", "--baseline", "ours")
    analysis = json.loads(done.stdout)
    assert analysis == json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert {(each["baseline"], each["arm"]) for each in analysis["differences"]} == {("ours", "base")}
    assert analysis["complete"] == 1
    assert analysis["overall_rule"]["base"]["excellent"]["mean"] == 0
    bias = {row["rater"]: row["bias"] for row in analysis["raters_table"]}
    assert bias["r01"] == -1
    assert all(0 < bias[rater] < 1 for rater in ("r02", "r03", "r04"))
    assert {row["repeat_agreement"] for row in analysis["raters_table"]} == {1}
    assert all(row["repeats"] > 0 for row in analysis["raters_table"])


def test_the_experts_have_the_last_word(make, srpo):
    study = make()
    answer_all(study, lambda rater, _arm, dimension: 3 if dimension != "detail" or rater != "r01" else 0)
    assert resolve(study) > 0
    answer_all(study, lambda *_: 1)
    analysis = json.loads(srpo("eval", "rate", "analyze", study, "--format", "json").stdout)
    disputed = analysis["grades_before_resolution"]["base"]["detail"]["counts"]
    resolved = analysis["grades"]["base"]["detail"]["counts"]
    assert disputed[0] > 0
    assert resolved == [0, 3 * disputed[0], 0, 3 * PROMPTS - 3 * disputed[0]]  # r01 and two others have one grade each
    assert analysis["grades"]["base"]["realism"]["counts"] == [0, 0, 0, 3 * PROMPTS]


def test_a_preference_shows_in_pairs_on_either_side(make, srpo):
    study = make("pairs")
    answer_all(study, lambda _rater, left, _dimension: 0 if left == "ours" else 2)
    done = srpo("eval", "rate", "analyze", study)
    assert done.exit_code == 0, done.stderr
    analysis = json.loads((study / "analysis" / "analysis.json").read_text())
    (row,) = analysis["pairs"]["win_rates"]
    assert [row["arm"], row["wins"], row["ties"], row["losses"]] == ["ours", 3 * PROMPTS, 0, 0]
    assert "Strength" in done.stdout
    assert "Excellent" not in done.stdout


def result_in(folder: Path, labels: Sequence[str] = ("base", "ours")) -> Path:
    """A result of two models with two pictures each."""
    rows = []
    for model, number in product(labels, range(2)):
        file = folder / f"{model}-{number}.png"
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 90 * number, np.uint8)).save(file)
        row = {"model": model, "item": f"{number:05d}", "group": "", "prompt": f"prompt {number}", "image": 0}
        rows.append({**row, "seed": number, "file": file.name, "hpsv2.1": 0.25 + 0.01 * number})
    prompts = {"layout": "lines", "files": ["prompts.txt"]}
    benchmark = Benchmark.model_validate(
        {"name": "tiny", "description": "Two prompts", "prompts": prompts, "metrics": ["hpsv2.1"]}
    )
    known = {"model": "miniature", "weights": None, "fingerprint": "0", "folder": ".", "pictures": 2}
    models = [{"label": label, **known} for label in labels]
    table = pd.DataFrame(rows)
    facts = {"prompts_sha256": 64 * "0", "prompt_count": 2, "items": 16 * "0", "steps": 12, "size": [8, 8]}
    protocol = {"benchmark": benchmark.model_dump(mode="json"), **facts, "judges": {}}
    data = summarise(table, [Measure("hpsv2.1", "HPS", ("hpsv2.1",))], benchmark, protocol, models)
    write_result(Result(data, table, folder))
    return folder


@pytest.mark.parametrize("named", [".", "results.json"])
def test_people_and_measures_share_a_report(make, srpo, tmp_path, named):
    study, folder = make(), result_in(tmp_path / "result")
    answer_all(study, strict_and_mild)
    done = srpo("eval", "rate", "analyze", study, "--with", folder / named)
    assert done.exit_code == 0, done.stderr
    page = (folder / "report.html").read_text()
    assert "Realism and artifacts" in page
    assert "HPS" in page
    assert (folder / "analysis.json").is_file()
    assert not (study / "analysis").exists()
    assert "no model of" not in done.stderr


def test_a_result_of_other_models_is_refused_and_one_that_lacks_an_arm_is_noted(make, srpo, tmp_path):
    study, other = make(), result_in(tmp_path / "other", ("refl", "tuned"))
    answer_all(study, strict_and_mild)
    before = sorted(other.iterdir())
    refused = srpo("eval", "rate", "analyze", study, "--with", other)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1
    assert "is of refl, tuned, and the study of base, ours" in refused.stderr
    assert sorted(other.iterdir()) == before
    half = result_in(tmp_path / "half", ("base", "tuned"))
    done = srpo("eval", "rate", "analyze", study, "--with", half)
    assert done.exit_code == 0
    assert f"note: ours: no model of {half}, so that only people have judged it" in done.stderr.splitlines()
    assert 'id="study"' in (half / "report.html").read_text()


def test_what_was_joined_stays_in_the_report_when_the_result_is_shown_again(make, srpo, tmp_path):
    study, folder = make(), result_in(tmp_path / "result")
    answer_all(study, strict_and_mild)
    srpo("eval", "rate", "analyze", study, "--with", folder)
    assert srpo("eval", "show", folder, "--output", folder).exit_code == 0
    assert (folder / "report.html").read_text().count('id="study"') == 1


def test_an_output_beside_a_result_is_refused(make, srpo, tmp_path):
    refused = srpo("eval", "rate", "analyze", make(), "--with", tmp_path, "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert "--output" in refused.stderr
