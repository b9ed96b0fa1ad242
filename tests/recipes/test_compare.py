"""A comparison from its file to its table: one small one that is stopped, goes on and has a run that fails."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import yaml

from srpo_cli.cli.app import main
from srpo_cli.config.comparison import Comparison, Tuning, load_comparison
from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.metrics.aggregate import Measure
from srpo_cli.pages.writing import NONE
from srpo_cli.recipes.compare import Job, Table, run_all
from srpo_cli.recipes.comparison import (
    _hacking,
    _ratios,
    cost_rows,
    difference_rows,
    differences,
    figure_rows,
    level_rows,
    passes,
    summarise,
    tuning_rows,
    unbracketed,
)
from srpo_cli.recipes.results import Result
from srpo_cli.runtime.checkpoints import list_checkpoints
from srpo_cli.runtime.signals import StopRequest

SMALL = {"train.batch_size": 2, "algorithm.target": None, "rollout.steps": 3, "algorithm.pairs": 2}
TINY = {
    "name": "tiny",
    "description": "three methods for a moment",
    "budget": 60,
    "seeds": [1],
    "prompts": 8,
    "tuning_seed": 5,
    "tuning_prompts": 4,
    "columns": ["sgp:miniature", "photo_distance", "photo_rate"],
    "rate": "photo_rate",
    "levels": [0, 2],  # the untrained model is there, and nobody ever
    "reference": "srpo",
    "methods": [
        {
            "label": "refl",
            "preset": "baselines:refl",
            "set": {"train.batch_size": 2, "rollout.steps": 4},
            "tuning": {"lr": [1e-5, 1e-4], "by": "reward"},
            "note": "on | the plain reward",
        },
        {"label": "srpo", "preset": "realism", "set": SMALL, "checkpoints": 2},
        {"label": "broken", "like": "srpo", "set": {"optimizer.lr": 1e6}, "groups": ["methods", "alone"]},
    ],
}
STEPS = {"refl": 4, "srpo": 2}
"""60 / (2 x 4 + 3 x 2) and 60 / (2 x 3 + 3 x 2 x 2 pairs of 2 branches), to the next whole number."""

pytestmark = pytest.mark.slow


def write(folder: Path, **changes: object) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


def comparison(**changes: object) -> Comparison:
    return Comparison.model_validate({**TINY, **changes})


@dataclass(frozen=True)
class Ended:
    exit_code: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Ended:
    """``srpo eval compare`` in this process; its parts are processes of their own."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as stop:
        main(["eval", "compare", *map(str, arguments)])
    return Ended(int(stop.value.code or 0), stdout.getvalue(), stderr.getvalue())


def interrupt_once_there(file: Path) -> None:
    """Press Ctrl-C as soon as a file is there."""
    end = time.monotonic() + 120
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.02)
    if file.exists():
        os.kill(os.getpid(), signal.SIGINT)


def written(folder: Path) -> dict[str, int]:
    """When each file below a folder was written last."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Story:
    """What happened to one comparison. Its folder is to be read only: see ``copied``."""

    folder: Path
    file: Path
    stopped: Ended
    logs_when_stopped: dict[str, str]
    running_when_stopped: list[str]
    finished: Ended
    data: dict
    page: str


def processes_of(folder: Path) -> list[str]:
    """Command lines of the running processes that name a folder."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if str(folder) in line and process.name != str(os.getpid()):
                lines.append(line)
    return lines


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Story:
    """Stopped while it trains its first run, and begun again."""
    home = tmp_path_factory.mktemp("tiny")
    folder, file = home / "out", write(home)
    arguments = ("--preset", file, "--output", folder, "--jobs", 2)
    pressing = threading.Thread(target=interrupt_once_there, args=[folder / "tuning/refl/lr-1e-05/config.yaml"])
    pressing.start()
    stopped = run(*arguments)
    pressing.join()
    logs = {path.name: path.read_text() for path in (folder / "logs").iterdir()}
    running = processes_of(folder)
    finished = run(*arguments)
    data, page = read(folder / "comparison.json"), (folder / "table.md").read_text()
    return Story(folder, file, stopped, logs, running, finished, data, page)


@pytest.fixture
def copied(story, tmp_path) -> Path:
    return Path(shutil.copytree(story.folder, tmp_path / "out"))


@pytest.fixture(scope="module")
def table(story) -> Table:
    return Table(load_comparison(str(story.file)), story.folder)


@pytest.fixture(scope="module")
def cells(table):
    return {cell.label: cell for cell in table.cells(table.rates())}


# Begun, stopped, gone on with


def test_ctrl_c_ends_what_runs_and_begins_nothing_more(story):
    assert story.stopped.exit_code == 130, story.stopped.stderr
    assert story.stopped.stdout == ""
    assert story.stopped.stderr.splitlines()[-1] == "stopped: the same command goes on with what is missing"
    assert story.running_when_stopped == []
    assert set(story.logs_when_stopped) <= {"tuning-refl-lr-1e-05.log", "tuning-refl-lr-0.0001.log"}
    assert "Traceback" not in story.logs_when_stopped["tuning-refl-lr-1e-05.log"]


def test_a_run_that_was_begun_is_gone_on_with(story):
    commands = [
        line
        for line in (story.folder / "logs" / "tuning-refl-lr-1e-05.log").read_text().splitlines()
        if line.startswith("$ ")
    ]
    folder = story.folder / "tuning" / "refl" / "lr-1e-05"
    assert commands[0].startswith("$ srpo train --preset baselines:refl --model miniature --seed 5 --steps 4 ")
    assert commands[1:] == [f"$ srpo train --resume {folder} --quiet"]
    assert read(folder / "summary.json")["steps"] == 4


def test_a_run_that_fails_does_not_end_the_others_and_is_named(story):
    assert story.finished.exit_code == 1
    assert list(story.data["failed"]) == ["broken, seed 1"]
    reason = story.data["failed"]["broken, seed 1"]
    assert reason.startswith("loss nan") and "lower optimizer.lr" in reason
    assert story.finished.stderr.splitlines()[-1] == "failed: broken, seed 1; the same command tries again"
    assert list(story.data["methods"]) == ["base", "refl", "srpo"]
    assert list(story.data["groups"]) == ["methods"], "a table of the untrained model alone is none"
    assert f"- broken, seed 1: {reason}" in story.page.replace("\\", "")
    assert "## alone" not in story.page


def test_what_is_finished_is_kept_and_no_process_is_started(story, tmp_path):
    whole = write(tmp_path, methods=TINY["methods"][:2])
    before = written(story.folder)
    again = run("--preset", whole, "--output", story.folder, "--format", "json")
    assert again.exit_code == 0, again.stderr
    now = written(story.folder)
    changed = {Path(path).name for path in now if now[path] != before.get(path)}
    assert now.keys() == before.keys() and changed == {"comparison.json", "table.md", "grid.png"}
    data = json.loads(again.stdout)
    assert {**data, "comparison": {}, "failed": {}} == {**story.data, "comparison": {}, "failed": {}}
    assert "done in" not in again.stderr


def test_an_evaluation_is_made_again_once_a_run_is_younger_or_the_command_another(story, table):
    cells = table.cells(table.rates())
    assert table.evaluations(cells) == []
    other = Table(comparison(prompts=7), story.folder)
    assert [job.name for job in other.evaluations(other.cells(table.rates()))] == [
        "evaluation seed-1",
        "evaluation curves-1",
    ]
    summary = story.folder / "runs" / "refl" / "seed-1" / "summary.json"
    then = summary.stat().st_mtime_ns
    os.utime(summary)
    try:
        assert [job.name for job in table.evaluations(cells)] == ["evaluation seed-1"]
    finally:
        os.utime(summary, ns=(then, then))


# What comes of the budget, the trials and the runs


def test_steps_follow_from_the_budget_by_hand(story, table):
    assert {label: table.steps(label) for label in STEPS} == STEPS
    for label, steps in STEPS.items():
        assert story.data["methods"][label]["asked_steps"] == steps
        assert read(story.folder / "runs" / label / "seed-1" / "summary.json")["steps"] == steps


def test_a_method_may_ask_for_fewer_steps_and_not_for_more():
    def steps(asked):
        own = {"label": "srpo", "preset": "realism", "set": SMALL, "checkpoints": 2, "steps": asked}
        return Table(comparison(methods=[own]), Path("nowhere")).steps("srpo")

    assert (steps(1), steps(99)) == (1, STEPS["srpo"])


def test_a_method_with_a_trial_missing_has_no_rate_and_is_told_all_the_same(copied):
    (copied / "tuning" / "refl" / "lr-0.0001" / "summary.json").unlink()
    table = Table(comparison(), copied)
    assert table.rates() == {}
    data = summarise(table, {})
    assert list(data["methods"]) == ["base", "srpo"]
    assert [(trial["lr"], trial["chosen"]) for trial in data["tuning"]] == [(1e-5, False)]


def test_a_method_like_another_takes_its_steps():
    own = {"label": "srpo", "preset": "realism", "set": SMALL, "checkpoints": 2, "steps": 1}
    table = Table(comparison(methods=[own, {"label": "late", "like": "srpo"}]), Path("nowhere"))
    assert table.steps("late") == 1


def test_another_number_of_prompts_is_refused_before_anything_runs(story):
    with pytest.raises(UsageError, match=r"seed-1 was measured on 8 prompts, not 7: choose another --output"):
        Table(comparison(prompts=7), story.folder).check()


def test_the_lower_photo_distance_is_the_better_one_unless_said_otherwise():
    def merit(**facts):
        return Tuning(lr=(1, 2), **facts).merit(3.0)

    assert (merit(by="photo_distance"), merit(by="reward")) == (-3.0, 3.0)
    assert (merit(by="photo_distance", better="higher"), merit(by="reward", better="lower")) == (3.0, -3.0)


def test_the_best_trial_gives_the_rate(story, table, cells):
    rewards = {
        lr: read(story.folder / "tuning" / "refl" / f"lr-{lr:g}" / "summary.json")["tuned"]["reward"]["mean"]
        for lr in (1e-5, 1e-4)
    }
    best = max(rewards, key=rewards.get)
    assert table.rates() == {"refl": best}
    assert cells["refl"].resolved.config.optimizer.lr == story.data["methods"]["refl"]["lr"] == best
    assert {trial["lr"]: (trial["chosen"], trial["figures"]["reward"]) for trial in story.data["tuning"]} == {
        lr: (lr == best, reward) for lr, reward in rewards.items()
    }
    stars = {row["lr"].removesuffix(" *"): row["lr"].endswith(" *") for row in tuning_rows(story.data)}
    assert stars == {f"{lr:g}": lr == best for lr in rewards}


def test_a_lower_figure_may_be_the_better_one(story, table):
    methods = [{**TINY["methods"][0], "tuning": {"lr": [1e-5, 1e-4], "by": "reward", "better": "lower"}}]
    lower = Table(comparison(methods=methods, rate=None, levels=[], reference=None), story.folder)
    assert {*lower.rates().values(), *table.rates().values()} == {1e-5, 1e-4}


def test_a_trial_without_a_finite_figure_is_not_chosen(copied, table):
    loser = next(lr for lr in (1e-5, 1e-4) if lr != table.rates()["refl"])
    for lr, value in ((loser, float("nan")), (table.rates()["refl"], -1.0)):
        file = copied / "tuning" / "refl" / f"lr-{lr:g}" / "summary.json"
        summary = read(file)
        summary["tuned"]["reward"]["mean"] = value
        file.write_text(json.dumps(summary))
    spoilt = Table(comparison(), copied)
    assert spoilt.rates() == table.rates()
    data = summarise(spoilt, {})
    assert {trial["lr"]: trial["figures"]["reward"] for trial in data["tuning"]} == {
        loser: None,
        **dict.fromkeys(table.rates().values(), -1.0),
    }
    assert json.dumps(data, allow_nan=False)
    assert NONE in {row["reward"] for row in tuning_rows(data)}


def test_runs_have_the_protocols_seed_budget_and_checkpoints_and_pay_for_nothing_else(story, cells):
    for label, steps in STEPS.items():
        config = cells[label].resolved.config
        assert (config.train.seed, config.train.steps, config.model.name) == (1, steps, "miniature")
        assert (config.guard.action, config.evaluation.prompts, config.samples.count) == ("off", 0, 0)
    kept = {label: [each.step for each in list_checkpoints(cells[label].folder / "checkpoints")] for label in STEPS}
    assert kept == {"refl": [4], "srpo": [1, 2]}


def test_costs_are_those_that_the_runs_have_counted(story):
    by_hand = {"refl": (4 * 2 * 4, 4 * 2), "srpo": (2 * 2 * 3, 2 * 2 * 2 * 2)}
    for label, (forwards, gradient_passes) in by_hand.items():
        costs = story.data["methods"][label]["costs"]
        ledger = read(story.folder / "runs" / label / "seed-1" / "summary.json")["ledger"]
        assert (costs["forwards"], costs["gradient_passes"]) == (forwards, gradient_passes)
        assert costs == {"steps": STEPS[label], **{key: ledger[key] for key in costs if key != "steps"}}
        assert passes(ledger) == forwards + 3 * gradient_passes
    rows = {row["method"]: row for row in cost_rows(story.data, "methods")}
    assert list(rows) == ["refl", "srpo"]
    assert (rows["refl"]["lr"], rows["refl"]["forwards"]) == (f"{story.data['methods']['refl']['lr']:g}", "32")


def test_figures_of_one_seed_are_those_of_its_evaluation(story):
    figures = read(story.folder / "evaluation" / "seed-1" / "results.json")["figures"]
    for label, method in story.data["methods"].items():
        own = figures["base" if label == "base" else f"{label}.1"]["all"]
        assert list(method["figures"]) == TINY["columns"]
        for name, figure in method["figures"].items():
            assert figure == pytest.approx({end: own[name][end] for end in ("mean", "low", "high")})
            assert method["seeds"][name] == {"1": own[name]["mean"]}
    assert [row["method"] for row in figure_rows(story.data, "methods")] == ["base", "refl", "srpo"]


def test_hacking_rates_of_a_table_add_up_to_one(story):
    rates = story.data["groups"]["methods"]
    assert sum(rate["farthest"]["mean"] for rate in rates.values()) == pytest.approx(1)
    assert rates["base"]["than_base"] is None
    known = [rate["farthest"] for rate in rates.values()] + [rates[label]["than_base"] for label in ("refl", "srpo")]
    assert all(0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1 for rate in known)


def test_a_curve_begins_with_the_untrained_model_and_ends_with_the_run(story):
    costs = story.data["costs"]
    assert list(costs["curves"]) == ["srpo"]
    curve = costs["curves"]["srpo"]["1"]
    assert [point["step"] for point in curve] == [0, 1, 2]
    assert [point["passes"] for point in curve] == [0, 6 + 3 * 8, 2 * (6 + 3 * 8)]
    assert curve[0]["value"] == costs["base"] == story.data["methods"]["base"]["figures"]["photo_rate"]["mean"]
    assert curve[-1]["value"] == story.data["methods"]["srpo"]["figures"]["photo_rate"]["mean"]
    assert costs["reached"]["srpo"] == {"2": {"passes": {"1": None}, "cpu_seconds": {"1": None}}}
    (row,) = level_rows(story.data, "passes")
    assert (row["method"], row["2"]) == ("srpo", NONE)


def test_the_page_and_the_picture_grid_are_written(story):
    page = story.page
    assert page.startswith("# tiny\n\nthree methods for a moment.\n")
    for title in ("## methods", "## Cost of a photo rate", "## Learning rates", "## Settings", "## Failed"):
        assert f"\n{title}\n" in page
    assert "on \\| the plain reward" in page
    assert (story.folder / "grid.png").stat().st_size > 1000
    for file in ("table.md", "grid.png", "comparison.json"):
        assert f"written: {story.folder / file}" in story.finished.stderr.splitlines()


# Refused


def refused(table: Table, kind: type[SrpoError] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        table.check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("config.yaml", "model: {}", "is the folder of a training run"),
        ("comparison.json", '{"comparison": {"name": "other"}}', "holds comparison other, not tiny"),
    ],
)
def test_a_folder_of_something_else_is_refused(file, content, why, tmp_path):
    (tmp_path / file).write_text(content)
    said = refused(Table(comparison(), tmp_path))
    assert said.startswith(str(tmp_path)) and why in said and "another --output" in said
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_a_budget_that_pays_for_no_step_is_refused_with_one_that_does(tmp_path):
    assert re.search(
        r"budget is 3: one step of refl takes \d+, so give at least", refused(Table(comparison(budget=3), tmp_path))
    )


@pytest.mark.parametrize("cell", ["tuning/refl/lr-1e-05", "runs/refl/seed-1", "runs/srpo/seed-1"])
@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (
            lambda text: text.replace("batch_size: 2", "batch_size: 3"),
            ["with other settings", "train.batch_size was 3 and is 2", "another --output"],
        ),
        (lambda text: text[:40] + "\n: [", ["is not YAML", "Remove"]),
    ],
)
def test_a_folder_of_another_or_a_damaged_run_is_refused_before_anything_runs(cell, damage, parts, copied, story):
    file = copied / cell / "config.yaml"
    file.write_text(damage(file.read_text()))
    shutil.rmtree(copied / "runs" / "broken")
    before = written(copied)
    outcome = run("--preset", story.file, "--output", copied)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    (line,) = outcome.stderr.splitlines()
    for part in (str(copied / cell), *parts):
        assert part in line
    assert written(copied) == before


def test_a_summary_that_cannot_be_read_is_refused_in_one_line(copied):
    (copied / "tuning" / "refl" / "lr-1e-05" / "summary.json").write_text("{")
    message = refused(Table(comparison(), copied), SrpoError)
    assert "lr-1e-05/summary.json cannot be read" in message and "remove" in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"columns": ["photo_rat"]}, ["measure of benchmark miniature", "'photo_rat'", "'photo_rate'"]),
        ({"rate": "photo_distanc"}, ["measure of benchmark miniature", "'photo_distance'"]),
    ],
)
def test_what_nothing_measures_is_refused(changes, parts, tmp_path):
    message = refused(Table(comparison(**changes), tmp_path))
    assert all(part in message for part in parts)


def test_a_rate_cannot_be_chosen_by_what_no_run_tells(tmp_path):
    methods = [{**TINY["methods"][0], "tuning": {"lr": [1e-5, 1e-4], "by": "rewards"}}, *TINY["methods"][1:]]
    message = refused(Table(comparison(methods=methods), tmp_path))
    assert all(part in message for part in ("that refl is tuned by", "'rewards'", "Did you mean 'reward'?"))


def test_a_table_of_nothing_is_told_in_one_line(tmp_path):
    with pytest.raises(SrpoError, match=r"no run of tiny was trained and measured, see .*logs \(a, seed 1: too hot\)"):
        summarise(Table(comparison(), tmp_path), {"a, seed 1": "too hot"})


def test_a_run_that_its_evaluation_does_not_have_yet_is_not_in_the_table(copied):
    shutil.copytree(copied / "runs" / "srpo", copied / "runs" / "late")
    late = {"label": "late", "like": "srpo", "checkpoints": 2}
    data = summarise(Table(comparison(methods=[*TINY["methods"], late]), copied), {})
    assert list(data["methods"]) == ["base", "refl", "srpo"]
    assert list(data["costs"]["curves"]) == ["srpo"]


# Processes


def test_a_command_is_told_by_its_last_line_and_keeps_its_log(tmp_path):
    said: list[str] = []
    job = Job("help of nothing", ["presets", "show", "nope"], tmp_path / "a.log")
    ended = run_all([job], 1, StopRequest(), said.append)
    assert list(ended.failed) == ["help of nothing"] and ended.exit_code == 0
    assert ended.failed["help of nothing"].startswith("Unknown preset 'nope'")
    assert job.log.read_text().startswith("$ srpo presets show nope\n")
    assert said == [f"help of nothing: failed: {ended.failed['help of nothing']} (see {job.log})"]


# Figures, by hand


def result_of(distances: dict[str, list[float]]) -> Result:
    """A result whose pictures deviate from photographs by so much, in one statistic up and in the other down."""
    rows = [
        {"model": label, "item": f"{number:03d}", "image": 0, "up": value + 0.5, "down": 0.5 - value}
        for label, own in distances.items()
        for number, value in enumerate(own)
    ]
    return Result({"models": [{"label": label} for label in distances]}, pd.DataFrame(rows), Path())


MEASURES = {"photo_distance": {"columns": ["up", "down"]}}


def means(shares, kind):
    return {label: share[kind] and share[kind]["mean"] for label, share in shares.items()}


def test_shares_of_the_farthest_picture_by_hand():
    # of four prompts base has the farthest of two, a of one, and one is shared, where a's is not farther
    result = result_of({"base": [3, 3, 1, 2], "a.1": [1, 2, 2, 2], "b.1": [9, 9, 9, 9]})
    shares = _hacking(["base", "a"], {1: result}, MEASURES)
    assert means(shares, "farthest") == {"base": 2.5 / 4, "a": 1.5 / 4}
    assert means(shares, "than_base") == {"base": None, "a": 1 / 4}


def test_pictures_are_compared_by_their_prompts_and_not_by_their_order():
    result = result_of({"base": [3, 3, 1, 2], "a.1": [1, 2, 2, 2]})
    turned = Result(result.data, result.table.iloc[::-1], Path())
    mixed = Result(result.data, pd.concat([result.table[:4], result.table[4:][::-1]]), Path())
    shares = [means(_hacking(["base", "a"], {1: each}, MEASURES), "farthest") for each in (result, turned, mixed)]
    assert shares[0] == shares[1] == shares[2]


def test_a_seed_with_a_run_missing_says_nothing_of_shares():
    whole = result_of({"base": [1, 1], "a.1": [2, 2], "b.1": [3, 0]})
    torn = result_of({"base": [9, 9], "a.2": [1, 1]})
    shares = _hacking(["base", "a", "b"], {1: whole, 2: torn}, MEASURES)
    assert means(shares, "farthest") == {"base": 0, "a": 0.5, "b": 0.5}
    assert means(_hacking(["base", "b"], {2: torn}, MEASURES), "farthest") == {"base": None, "b": None}
    assert means(_hacking(["base", "a"], {1: whole}, {}), "farthest") == {"base": None, "a": None}


def of_costs(**costs):
    return {
        label: {level: {"passes": dict(enumerate(own, 1))} for level, own in of.items()} for label, of in costs.items()
    }


def test_levels_are_told_as_mean_ratio_count_or_dash():
    reached = of_costs(
        srpo={"0.1": [100, 400], "0.5": [400, None]},
        slow={"0.1": [900, 900], "0.5": [4, 8]},
        never={"0.1": [None, 5], "0.5": [None, None]},
    )
    data = {"costs": {"reached": reached, "ratios": _ratios(reached, "srpo")}}
    # 9 times and 2.25 times: 4.5 times by the geometric mean, and two seeds say nothing of others
    assert level_rows(data, "passes") == [
        {"method": "srpo", "0.1": "250", "0.5": "1 of 2 seeds"},
        {"method": "slow", "0.1": "900; 4.5 x [4.5, 4.5]", "0.5": "6"},
        {"method": "never", "0.1": "1 of 2 seeds", "0.5": NONE},
    ]


def test_without_a_run_of_the_reference_there_are_costs_and_no_ratios():
    reached = of_costs(slow={"0.1": [900, 1100]})
    data = {"costs": {"reached": reached, "ratios": _ratios(reached, "srpo")}}
    assert level_rows(data, "passes") == [{"method": "slow", "0.1": "1,000"}]


def of_seeds(texts="aabc", **rewards):
    """Results of three seeds, of one picture of each of four prompts, two of which are of one text."""
    results = {}
    for seed in (1, 2, 3):
        rows = [
            {"model": f"{label}.{seed}", "prompt": text, "reward": value}
            for label, own in rewards.items()
            for text, value in zip(texts, own(seed), strict=True)
        ]
        results[seed] = Result({}, pd.DataFrame(rows), Path())
    return results


REWARD = [Measure("reward", "reward", ("reward",))]


def test_differences_are_told_seed_by_seed():
    results = of_seeds(
        srpo=lambda seed: [seed, 2, 3, 9],
        refl=lambda seed: [seed + 0.3 + 0.1 * seed, 2.3 + 0.1 * seed, 3.3 + 0.1 * seed, 9.3 + 0.1 * seed],
    )
    found = differences(["refl", "srpo"], "srpo", results, REWARD)
    assert list(found) == ["refl"] and found["refl"]["against"] == "srpo"
    # 0.4, 0.5 and 0.6 of every prompt: Student's t with 2 degrees of freedom times 0.1 / sqrt(3), and no more
    half = 4.302653 * 0.1 / math.sqrt(3)
    told = found["refl"]["reward"]
    assert (told["mean"], told["low"], told["high"]) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-5)
    assert differences(["refl", "srpo"], "other", results, REWARD)["srpo"]["against"] == "refl"


def test_differences_that_prompts_do_not_share_are_less_sure():
    results = of_seeds(srpo=lambda _: [0, 0, 0, 0], refl=lambda _: [0, 1, 2, 5])
    told = differences(["srpo", "refl"], "srpo", results, REWARD)["refl"]["reward"]
    assert told["mean"] == 2 and told["low"] < 1 < 3 < told["high"]


def test_p_values_are_corrected_in_a_family_of_what_has_a_better_side_and_one_of_the_rest():
    places = range(20)
    results = of_seeds(
        "abcdefghijklmnopqrst",
        srpo=lambda seed: [seed * place for place in places],
        near=lambda seed: [seed * place + 0.4 + 0.1 * (place % 3) for place in places],
        far=lambda seed: [seed * place + 4 + seed for place in places],
    )
    measures = [*REWARD, Measure("double", "double", ("reward",)), Measure("grain", "grain", ("reward",), better="")]
    found = differences(["srpo", "near", "far"], "srpo", results, measures)
    near, far = found["near"], found["far"]
    assert near["reward"]["p"] == near["grain"]["p"] < far["reward"]["p"] == far["grain"]["p"] < 0.05
    assert [near[name]["p_holm"] for name in ("reward", "double")] == [4 * near["reward"]["p"]] * 2
    assert [far[name]["p_holm"] for name in ("reward", "double")] == [2 * far["reward"]["p"]] * 2
    assert (near["grain"]["p_holm"], far["grain"]["p_holm"]) == (2 * near["grain"]["p"], far["grain"]["p"])

    data = {"differences": {"all": found}, "measures": [{"name": "reward", "title": "reward", "digits": 3}]}
    assert [row["reward"].endswith(" *") for row in difference_rows(data, "all")] == [
        True,
        2 * far["reward"]["p"] < 0.05,
    ]


def test_a_rate_at_an_end_of_its_ladder_is_named():
    ladder = Tuning(lr=[1e-5, 2e-5, 5e-5], by="reward")
    chosen = {"low": 1e-5, "inside": 2e-5, "high": 5e-5, "none": None}
    data = {
        "tuning": [
            {"label": label, "end": ladder.end(lr), "chosen": lr == own}
            for label, own in chosen.items()
            for lr in ladder.lr
        ]
    }
    assert unbracketed(data) == ["low", "high"]


def test_rates_that_are_0_and_1_everywhere_are_told_apart_as_surely_as_so_few_prompts_can():
    results = of_seeds("abcdefgh", srpo=lambda _: [0] * 8, refl=lambda _: [1] * 8)
    told = differences(["srpo", "refl"], "srpo", results, REWARD)["refl"]["reward"]
    assert told["mean"] == 1 and told["low"] < 0.6 and told["high"] == 1
    assert told["p"] == told["p_holm"] == 2**-7


def test_two_seeds_tell_no_difference():
    results = of_seeds(srpo=lambda _: [0, 0, 0, 0], refl=lambda _: [0, 1, 2, 5])
    del results[3]
    assert differences(["srpo", "refl"], "srpo", results, REWARD) == {}
