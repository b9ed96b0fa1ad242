"""What a study says, checked by hand-worked numbers, identities and limits."""

import json
import math
from collections.abc import Callable, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import pandas as pd
import pytest

from srpo_cli.errors import MissingError, SrpoError, UsageError
from srpo_cli.metrics.intervals import resample, wilson
from srpo_cli.study.agreement import krippendorff_alpha
from srpo_cli.study.analysis import EXCELLENT, FAIL, GOOD, PASS, analyze, overall_rule
from srpo_cli.study.export import GRADES, read_answers, read_study, write_answers
from srpo_cli.study.preference import PRIOR, bradley_terry

DIMENSIONS = ("alignment", "realism", "detail", "aesthetics", "overall")
DRAWS = 500

Write = Callable[..., Path]


def task(rater: str, prompt: str, arm: str, grades: int | Sequence[int], **more: Any) -> dict[str, Any]:
    """A picture that one rater has graded, with one grade on all dimensions or one for each."""
    each = [grades] * len(DIMENSIONS) if isinstance(grades, int) else grades
    return {"rater": rater, "prompt": prompt, "arm": arm, "answers": dict(zip(DIMENSIONS, each, strict=True)), **more}


def choice(rater: str, prompt: str, left: str, right: str, value: int, **more: Any) -> dict[str, Any]:
    """A pair of which one rater has preferred the left (0) or right (2) picture, or neither (1)."""
    return {"rater": rater, "prompt": prompt, "arm": left, "other": right, "answers": {"overall": value}, **more}


def analyzed(study: Path, baseline: str | None = None, draws: int = DRAWS) -> dict[str, Any]:
    return analyze(read_answers(study), read_study(study, baseline), draws)


@pytest.fixture
def crossed(write_study: Write) -> Path:
    """Two raters, 12 prompts: ours is Excellent everywhere, base in every fourth prompt and Good elsewhere."""
    grades = {"base": lambda prompt: EXCELLENT if prompt % 4 == 0 else GOOD, "ours": lambda _prompt: EXCELLENT}
    cells = product(("r01", "r02"), range(12), grades)
    return write_study(list(grades), [task(rater, f"p{n:02d}", arm, grades[arm](n)) for rater, n, arm in cells])


# The table of answers


def test_answers_come_with_arm_prompt_and_the_grade_s_name(write_study):
    study = write_study(["base", "ours"], [task("r01", "p0", "ours", [3, 2, 1, 0, 3], ms=1500)])
    frame = read_answers(study)
    assert frame["dimension"].tolist() == list(DIMENSIONS)
    assert frame["grade"].tolist() == ["Excellent", "Good", "Pass", "Fail", "Excellent"]
    assert frame.loc[0, ["study", "rater", "role", "kind", "arm", "prompt_id", "group", "value", "ms"]].tolist() == [
        *("mine", "r01", "rater", "item", "ours", "p0", "photo"),
        *(3, 1500),
    ]


def test_a_pair_has_an_arm_on_each_side(write_study):
    frame = read_answers(write_study(["base", "ours"], [choice("r01", "p0", "ours", "base", 2)], mode="pairs"))
    assert frame.loc[0, ["arm_left", "arm_right", "value", "grade"]].tolist() == ["ours", "base", 2, "right"]
    assert "arm" not in frame


def test_what_is_written_is_read_again(crossed, tmp_path):
    frame = read_answers(crossed)
    readers = {"csv": pd.read_csv, "jsonl": lambda path: pd.read_json(path, lines=True), "parquet": pd.read_parquet}
    for ending, read in readers.items():
        path = tmp_path / f"answers.{ending}"
        write_answers(frame, path)
        again = read(path)
        assert again.columns.tolist() == frame.columns.tolist()
        assert again["value"].tolist() == frame["value"].tolist()
    with pytest.raises(UsageError, match=r"answers\.xlsx"):
        write_answers(frame, tmp_path / "answers.xlsx")


@pytest.mark.parametrize("damage", ["no folder", "no answers", "broken facts", "other facts", "no database"])
def test_a_folder_that_is_no_study_is_refused_in_one_line(crossed, tmp_path, damage):
    folder = tmp_path / "elsewhere" if damage == "no folder" else crossed
    if damage == "no answers":
        (crossed / "answers.sqlite").unlink()
    if damage == "no database":
        (crossed / "answers.sqlite").write_text("no database at all, but long enough to have a header " * 5)
    if damage == "broken facts":
        (crossed / "study.json").write_text("{")
    if damage == "other facts":
        (crossed / "study.json").write_text('{"name": "mine"}')
    for read in (read_answers, read_study):
        with pytest.raises(UsageError, match=r"srpo eval rate new|restore it from a backup") as refused:
            read(folder)
        assert "\n" not in str(refused.value)


def test_a_picture_that_the_key_does_not_know_is_no_guess(crossed):
    (crossed / "private" / "key.json").write_text("{}")
    with pytest.raises(SrpoError, match=r"key\.json does not know picture"):
        read_answers(crossed)


def test_reading_changes_nothing_in_the_study(crossed):
    before = (crossed / "answers.sqlite").read_bytes()
    read_answers(crossed)
    assert (crossed / "answers.sqlite").read_bytes() == before


# Grades


def test_the_analysis_has_the_promised_keys_and_is_json(crossed):
    analysis = analyzed(crossed)
    assert list(analysis) == [
        *("format", "study", "mode", "arms", "raters", "experts", "prompts", "pictures", "answers", "complete"),
        *("dimensions", "grade_names", "grades", "differences", "agreement", "raters_table", "overall_rule"),
        *("pairs", "notes"),
    ]
    assert json.loads(json.dumps(analysis, allow_nan=False)) == analysis
    counted = ["arms", "raters", "experts", "prompts", "pictures", "answers", "complete", "grade_names", "pairs"]
    assert [analysis[key] for key in counted] == [["base", "ours"], 2, 0, 12, 24, 240, 1.0, list(GRADES), None]


def test_grades_are_counted_and_rated_by_hand(crossed):
    base = analyzed(crossed)["grades"]["base"]["realism"]  # 6 of 24 Excellent, 18 Good
    assert base["counts"] == [0, 0, 18, 6]
    assert base["excellent"]["mean"] == pytest.approx(0.25)
    assert base["mean"]["mean"] == pytest.approx(2.25)
    assert base["good_or_better"]["mean"] == 1
    assert base["excellent"]["low"] < 0.25 < base["excellent"]["high"]


def test_the_cluster_interval_is_that_of_an_independent_bootstrap():
    counts = np.random.default_rng(0).multinomial(5, [0.2, 0.3, 0.3, 0.2], size=60)
    drawn = resample(counts, 4000, 0)
    rates = drawn[:, 3] / drawn.sum(1)
    index = np.random.default_rng(5).integers(60, size=(4000, 60))
    slow = np.array([counts[rows, 3].sum() / counts[rows].sum() for rows in index])
    assert np.quantile(rates, [0.025, 0.975]) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.01)


def test_more_raters_who_repeat_each_other_make_the_cluster_interval_no_narrower(write_study):
    def study_of(raters: int) -> list[dict[str, Any]]:
        cells = product(range(raters), range(40), ("base", "ours"))
        return [task(f"r{rater}", f"p{n:02d}", arm, EXCELLENT if n % 2 else GOOD) for rater, n, arm in cells]

    study = write_study(["base", "ours"], study_of(6))
    frame, facts = read_answers(study), read_study(study)
    many = analyze(frame, facts, DRAWS)["grades"]["base"]["detail"]
    few = analyze(frame[frame["rater"] == "r0"], facts, DRAWS)["grades"]["base"]["detail"]
    assert many["excellent"] == few["excellent"]
    width = {len(each): each["high"] - each["low"] for each in (many["excellent_wilson"], few["excellent_wilson"])}
    assert max(width.values()) < many["excellent"]["high"] - many["excellent"]["low"]


def test_differences_are_paired_over_prompts(crossed):
    difference = next(each for each in analyzed(crossed)["differences"] if each["dimension"] == "detail")
    assert [difference["baseline"], difference["arm"]] == ["base", "ours"]
    assert difference["difference"] == pytest.approx(0.75)
    assert 0 < difference["low"] < 0.75 < difference["high"] <= 1
    assert difference["p"] < 0.05


def test_arms_that_get_the_same_grades_do_not_differ(write_study):
    cells = product(("r01", "r02"), range(20), ("base", "ours"))
    study = write_study(["base", "ours"], [task(rater, f"p{n}", arm, n % 4) for rater, n, arm in cells])
    for each in analyzed(study)["differences"]:
        assert [each["difference"], each["p"], each["p_holm"]] == [0, 1, 1]
        assert each["low"] < 0 < each["high"]


def test_the_family_of_holm_is_every_arm_on_every_dimension(write_study):
    grade = {"base": lambda n: n % 4, "same": lambda n: n % 4, "best": lambda _n: EXCELLENT}
    study = write_study(list(grade), [task("r01", f"p{n}", arm, grade[arm](n)) for n, arm in product(range(20), grade)])
    differences = analyzed(study)["differences"]
    assert len(differences) == 2 * len(DIMENSIONS)
    smallest = min(differences, key=lambda each: each["p"])
    assert smallest["arm"] == "best"
    assert smallest["p_holm"] == pytest.approx(smallest["p"] * len(differences))
    assert {each["p_holm"] for each in differences if each["arm"] == "same"} == {1}


def test_the_baseline_may_be_another_arm(crossed):
    analysis = analyzed(crossed, baseline="ours")
    assert analysis["arms"] == ["ours", "base"]
    assert {each["difference"] for each in analysis["differences"]} == {-0.75}
    with pytest.raises(UsageError, match="Did you mean 'ours'"):
        read_study(crossed, "our")


def test_a_dimension_that_an_arm_lacks_is_left_out_and_told(write_study):
    tasks = [task("r01", f"p{n}", arm, GOOD) for n, arm in product(range(3), ("base", "ours"))]
    for each in tasks:
        if each["arm"] == "ours":
            del each["answers"]["overall"]
    analysis = analyzed(write_study(["base", "ours"], tasks))
    assert [each["name"] for each in analysis["dimensions"]] == list(DIMENSIONS[:-1])
    assert set(analysis["grades"]["base"]) == set(DIMENSIONS[:-1])
    assert any(note.startswith("Overall: not every arm") for note in analysis["notes"])
    assert analysis["complete"] == pytest.approx(27 / 30)


def test_a_study_without_answers_is_told_so(write_study):
    learnt = task("r01", "known", "", 3, kind="training", known={"detail": 3})
    study = write_study(["base"], [learnt, {**task("r01", "p0", "base", 3), "answers": {}}])
    with pytest.raises(UsageError, match="too few answers yet, 0"):
        analyzed(study)


def test_a_study_in_which_one_arm_has_no_answer_is_told_so(write_study):
    study = write_study(["base", "ours"], [task("r01", "p0", "base", 3)])
    with pytest.raises(UsageError, match="too few answers yet, 5 "):
        analyzed(study)


# Overall


@pytest.mark.parametrize(
    ("grades", "overall"),
    [
        ([3, 3, 3, 3], EXCELLENT),
        ([3, 3, 3, 2], GOOD),
        ([3, 3, 1, 1], GOOD),
        ([3, 3, 3, 0], FAIL),
        ([3, 2, 2, 2], PASS),
        ([2, 2, 2, 2], PASS),
        ([1, 1, 1, 1], PASS),
        ([1, 1, 1, 0], FAIL),
        ([0, 0, 0, 0], FAIL),
    ],
)
def test_overall_by_the_paper_s_rule(grades, overall):
    assert overall_rule(np.array([grades])).tolist() == [overall]


def test_the_rule_stands_next_to_the_overall_grade_that_was_asked(write_study):
    grades = {"p0": [3, 3, 3, 3, 0], "p1": [3, 3, 1, 1, 0], "p2": [2, 2, 2, 2, 0], "p3": [3, 3, 3, 0, 0]}
    analysis = analyzed(write_study(["base"], [task("r01", prompt, "base", each) for prompt, each in grades.items()]))
    assert analysis["overall_rule"]["base"]["counts"] == [1, 1, 1, 1]
    assert analysis["grades"]["base"]["overall"]["counts"] == [4, 0, 0, 0]
    assert analysis["overall_rule"]["base"]["excellent"]["mean"] == 0.25


# Resolution, repeats, training


def test_the_experts_grade_takes_the_place_of_every_rater_s(write_study):
    tasks = [task(f"r{n}", "p0", "base", grade) for n, grade in enumerate((0, 3, 3))]
    tasks += [task(f"r{n}", "p1", "base", 3) for n in range(3)]
    tasks += [task(f"e{n}", "p0", "base", grade, kind="resolution") for n, grade in enumerate((1, 2))]
    analysis = analyzed(write_study(["base"], tasks))
    assert analysis["grades"]["base"]["detail"]["counts"] == [0, 3, 0, 3]  # the lower median of Pass and Good
    assert analysis["grades_before_resolution"]["base"]["detail"]["counts"] == [1, 0, 0, 5]
    assert any(note.startswith("15 of 30 grades are the experts'") for note in analysis["notes"])
    assert analysis["agreement"]["detail"]["alpha"] < 0.5  # the raters' own


def test_training_and_repeats_count_for_nothing_but_the_rater(crossed, write_study, tmp_path):
    extra = [
        task("r01", "p00", "base", 0, kind="repeat"),
        task("r01", "x", "", 1, kind="training", known={"detail": 1}),
    ]
    plain = [task(rater, f"p{n:02d}", "base", n % 4) for rater, n in product(("r01", "r02"), range(8))]
    crossed.rename(tmp_path / "other")
    with_both = analyzed(write_study(["base"], plain + extra))
    (tmp_path / "study").rename(tmp_path / "with_both")
    without = analyzed(write_study(["base"], plain))
    for key in ("grades", "agreement", "overall_rule"):
        assert with_both[key] == without[key]


def test_repeats_show_how_consistent_a_rater_is(write_study):
    tasks = [task("r01", f"p{n}", "base", 2) for n in range(3)]
    tasks += [task("r01", f"p{n}", "base", grade, kind="repeat") for n, grade in enumerate((2, 1, 0))]
    (row,) = analyzed(write_study(["base"], tasks))["raters_table"]
    assert [row["repeats"], row["repeat_agreement"]] == pytest.approx([15, 1 / 3])  # answers, as `status` counts them


def test_training_agreement_is_the_share_of_known_grades_that_were_met(write_study):
    known = {"alignment": 3, "realism": "Good", "detail": 1}
    tasks = [task("r01", "known", "", [3, 2, 2, 2, 2], kind="training", known=known), task("r01", "p0", "base", 2)]
    (row,) = analyzed(write_study(["base"], tasks))["raters_table"]
    assert row["training_agreement"] == pytest.approx(2 / 3)


def test_a_rater_s_bias_is_measured_against_the_others_on_the_same_pictures(write_study):
    grades = {"r01": lambda n: n % 3, "r02": lambda n: n % 3, "r03": lambda n: n % 3 + 1}
    tasks = [task(rater, f"p{n}", "base", grades[rater](n), ms=3000) for rater, n in product(grades, range(30))]
    rows = analyzed(write_study(["base"], [*tasks, task("r04", "alone", "base", 3)]))["raters_table"]
    assert [row["bias"] for row in rows] == pytest.approx([-0.5, -0.5, 1, None])
    assert [row["low"] for row in rows[:3]] == [row["high"] for row in rows[:3]] == pytest.approx([-0.5, -0.5, 1])
    assert rows[0]["median_seconds"] == 3


# Agreement


def test_alpha_of_krippendorff_s_own_example():
    n = np.nan  # Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: four observers, 12 units
    grades = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, n, n, n],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, n, 3],
            [n, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, n],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, n],
        ]
    )
    counts = (grades.T[..., None] == np.arange(1, 6)).sum(1)
    assert krippendorff_alpha(counts) == pytest.approx(0.815, abs=5e-4)


def test_alpha_of_the_analysis_is_that_of_the_matrix_of_raters_and_pictures(write_study):
    random = np.random.default_rng(3)
    grades = np.clip(random.integers(0, 4, 25) + random.integers(-1, 2, (4, 25)), 0, 3)
    cells = product(range(4), range(25))
    study = write_study(["base"], [task(f"r{r}", f"p{n:02d}", "base", int(grades[r, n])) for r, n in cells])
    found = analyzed(study)["agreement"]["aesthetics"]
    assert found["alpha"] == pytest.approx(krippendorff.alpha(grades.astype(float), level_of_measurement="ordinal"))
    assert found["low"] < found["alpha"] < found["high"]


@pytest.mark.parametrize(("noise", "label"), [(0.0, "good"), (0.45, "tentative"), (2.0, "poor")])
def test_agreement_has_krippendorff_s_labels(write_study, noise, label):
    random = np.random.default_rng(0)
    grades = np.clip(np.rint(random.uniform(0, 3, 200) + noise * random.normal(size=(3, 200))), 0, 3).astype(int)
    cells = product(range(3), range(200))
    tasks = [task(f"r{r}", f"p{n:03d}", "base", int(grades[r, n])) for r, n in cells]
    found = analyzed(write_study(["base"], tasks), draws=50)["agreement"]["detail"]
    assert found["label"] == label
    assert (found["alpha"] >= 0.8, found["alpha"] >= 0.667) == (label == "good", label != "poor")


@pytest.mark.parametrize("raters", [1, 3])
def test_agreement_is_undefined_where_nothing_can_disagree(write_study, raters):
    cells = product(range(raters), range(4))
    study = write_study(["base"], [task(f"r{r}", f"p{n}", "base", GOOD if raters > 1 else n) for r, n in cells])
    assert analyzed(study)["agreement"]["detail"] == {"alpha": None, "low": None, "high": None, "label": "undefined"}


@pytest.mark.parametrize(("library", "use"), [("krippendorff", krippendorff_alpha), ("choix", bradley_terry)])
def test_a_missing_library_is_named_with_the_extra_that_has_it(monkeypatch, library, use):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(MissingError, match=rf"{library}.*pip install 'srpo-cli\[rate\]'"):
        use(np.array([[2, 0], [1, 1]]))


# Pairs


def test_wins_ties_and_losses_do_not_depend_on_the_side(write_study):
    tasks = [choice("r01", "p0", "base", "ours", 2), choice("r01", "p1", "ours", "base", 0)]
    tasks += [choice("r01", "p2", "ours", "base", 1), choice("r01", "p3", "ours", "base", 2)]
    (row,) = analyzed(write_study(["base", "ours"], tasks, mode="pairs"))["pairs"]["win_rates"]
    assert [row[key] for key in ("arm", "against", "wins", "ties", "losses")] == ["ours", "base", 2, 1, 1]
    assert row["rate"]["mean"] == pytest.approx(2.5 / 4)
    assert 0 <= row["rate"]["low"] < 2.5 / 4 < row["rate"]["high"] <= 1


def test_bradley_terry_of_two_arms_is_their_log_odds():
    strengths = bradley_terry(np.array([[0.0, 40.0], [60.0, 0.0]]))
    assert strengths[1] - strengths[0] == pytest.approx(math.log((60 + 2 * PRIOR) / (40 + 2 * PRIOR)))
    large = bradley_terry(np.array([[0.0, 4e6], [6e6, 0.0]]))
    assert large == pytest.approx([-math.log(1.5) / 2, math.log(1.5) / 2], abs=1e-6)


def test_bradley_terry_finds_the_strengths_that_made_the_wins():
    strengths = np.array([-1.0, -0.2, 0.3, 0.9])
    wins = 1e6 / (1 + np.exp(strengths[None] - strengths[:, None]))
    np.fill_diagonal(wins, 0)
    assert bradley_terry(wins) == pytest.approx(strengths, abs=1e-4)


def test_an_arm_that_always_wins_has_a_finite_strength(write_study):
    arms = ["base", "middle", "best"]
    pairs = [(n, *pair) for n, pair in product(range(10), combinations(arms, 2))]
    study = write_study(arms, [choice("r01", f"p{n}", low, high, 2) for n, low, high in pairs], mode="pairs")
    found = analyzed(study)["pairs"]
    strengths = [found["strengths"][arm]["mean"] for arm in arms]
    assert strengths == sorted(strengths)
    assert all(map(math.isfinite, strengths))
    assert sum(strengths) == pytest.approx(0, abs=1e-9)
    for row in found["win_rates"]:
        assert row["rate"]["mean"] == row["rate"]["high"] == 1
        assert row["rate"]["low"] == pytest.approx(wilson(10, 10).low)
        assert row["p"] == 2**-9  # ten prompts


def test_ties_only_leave_all_arms_equal(write_study):
    arms = ["base", "other", "ours"]
    pairs = [(n, *pair) for n, pair in product(range(4), combinations(arms, 2))]
    study = write_study(arms, [choice("r01", f"p{n}", *pair, 1) for n, *pair in pairs], mode="pairs")
    analysis = analyzed(study)
    assert [each["mean"] for each in analysis["pairs"]["strengths"].values()] == pytest.approx([0, 0, 0], abs=1e-9)
    assert {(each["rate"]["mean"], each["p"]) for each in analysis["pairs"]["win_rates"]} == {(0.5, 1)}
    assert analysis["grades"] == {}
    assert analysis["differences"] == []


def test_a_rater_of_pairs_leans_to_a_side_not_to_an_arm(write_study):
    sides = [("base", "ours"), ("ours", "base")]
    tasks = [choice("r01", f"p{n}", *sides[n % 2], 2) for n in range(6)]
    tasks += [choice("r02", f"p{n}", *sides[n % 2], 2 * (n % 2 == 0)) for n in range(6)]
    rows = analyzed(write_study(["base", "ours"], tasks, mode="pairs"))["raters_table"]
    assert [row["bias"] for row in rows] == [1, 0]


def test_a_repeated_pair_is_compared_whichever_way_round_it_was_shown(write_study):
    tasks = [choice("r01", "p0", "base", "ours", 2), choice("r01", "p0", "ours", "base", 0, kind="repeat")]
    (row,) = analyzed(write_study(["base", "ours"], tasks, mode="pairs"))["raters_table"]
    assert [row["repeats"], row["repeat_agreement"]] == [1, 1]
