"""The guard in real runs on the miniature: what it costs, what it sees, and that a run goes on or ends with it."""

import json
import shutil
import signal
import socket
from dataclasses import asdict

import pytest
import torch

from srpo_cli.algorithms.base import ControlWords
from srpo_cli.config.load import load_train_config
from srpo_cli.errors import SrpoError
from srpo_cli.metrics.pictures import picture_statistics
from srpo_cli.miniature.world import CG, PHOTO, draw_scenes_of, render
from srpo_cli.recipes.figures import Figures, OtherPrompts
from srpo_cli.recipes.guard import Plan, due_steps
from srpo_cli.recipes.parts import load_reward
from srpo_cli.rewards.noised import NoisedPair

pytestmark = [pytest.mark.usefixtures("on_the_cpu")]

CPU = torch.device("cpu")
WORDS = ControlWords(["realistic photo"], ["cg render"])
PROMPTS = ["a red sphere on grass, bright", "a blue cube on snow, dark", "a green cone on sand, backlit"]
WATCHED = {
    "train.batch_size": 8,
    "rollout.steps": 2,
    "algorithm.pairs": 1,
    "checkpoint.every": 5,
    "guard.action": "stop",
    "guard.share": 1,
}


def config(preset="realism", **changes):
    settings = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return load_train_config(preset, overrides=settings, miniature=True).config


# What it may spend


def test_the_plan_of_a_run_without_target_by_hand():
    # A step: 8 rollouts of 10 steps, 2 pairs of 2 branches, each three forwards: 8 * (10 + 12) = 176. Of 300 steps 5 %
    # are 2,640; 64 pictures of each kind cost 1,280, a panel of 8 pictures 80, so that 17 could be drawn, two of them
    # of the base model.
    plan = Plan.of(config(algorithm__target="null", train__steps=300), 8)
    assert plan == Plan(64, 5, (5, 10, 20, 40, 80, 160, 300), 300)


def test_a_shorter_run_is_calibrated_on_fewer_pictures_and_a_target_has_drawn_them():
    # 60 steps: 528, four fifths of it 422, so 21 pictures of each kind at 10 forwards; 108 are left, a panel and a bit.
    assert Plan.of(config(algorithm__target="null", train__steps=60), 8) == Plan(21, 5, (), 60)
    # With a target nothing is paid for them: 528 for 6 panels, two of the base model.
    assert Plan.of(config(train__steps=60), 8) == Plan(64, 5, (5, 20, 40, 60), 60)


@pytest.mark.parametrize(("steps", "due"), [(12, [5, 10, 12]), (10, [5, 10]), (4, [4])])
def test_checks_come_every_so_many_steps_and_after_the_last(steps, due):
    assert due_steps(steps, 5) == due


def test_ranks_that_share_a_picture_each_cost_as_many_pictures_as_there_are_ranks():
    alone, many = (Plan.of(config(algorithm__target="null", train__steps=60), 8, ranks) for ranks in (1, 16))
    assert (alone.calibration, many.calibration) == (21, 16)


def test_a_run_too_short_to_afford_a_guard_says_what_it_would_take():
    plan = Plan.of(config(algorithm__target="null", train__steps=10), 8)
    assert plan.calibration == 0
    assert plan.shortfall.endswith("does not pay for 8 pictures of each kind: set guard.share=0.12, or take 23 steps")
    assert Plan.of(config(algorithm__target="null", train__steps=23), 8).calibration == 8
    assert Plan.of(config(algorithm__target="null", train__steps=10, guard__share=0.12), 8).calibration == 8


def test_more_than_all_of_a_runs_work_is_not_advised():
    plan = Plan.of(config(algorithm__target="null", train__steps=1), 8)
    assert plan.shortfall.endswith("does not pay for 8 pictures of each kind: take 23 steps")


def test_of_given_pictures_there_is_nothing_to_see_but_the_panel():
    # 400 steps of 8 * 12, of which 5 % are 1,920: 48 pictures of each kind for half of it, 12 panels, two of the base.
    plan = Plan.of(config("realism:offline", algorithm__target="null", train__steps=400), 8)
    assert plan == Plan(48, 40, tuple(range(40, 401, 40)), 400)


def test_given_pictures_without_a_panel_are_not_called_watched():
    def plan(steps, **changes):
        return Plan.of(config("realism:offline", algorithm__target="null", train__steps=steps, **changes), 8)

    assert (plan(60).calibration, plan(60).panel) == (0, ())
    assert plan(60).shortfall.endswith("a look at the model's own: set guard.share=0.07, or take 84 steps")
    assert plan(84).panel == (84,) and plan(60, guard__share=0.07).panel == (60,)


def test_a_group_counts_as_one_picture_between_checks():
    assert Plan.of(config("baselines:dance-grpo", train__batch_size=16, algorithm__grpo__group=8), 16).every == 20


def test_a_replayed_step_counts_for_nothing_between_checks():
    assert Plan.of(config(rollout__replay=1), 8).every == 10


def test_a_guard_that_is_off_plans_nothing():
    assert Plan.of(config(guard__action="off"), 8) == Plan(0, 5, steps=60)


def test_a_run_that_goes_on_keeps_the_plan_that_it_was_begun_with(tmp_path):
    begun, long = Plan.of(config(train__steps=100), 8), config(train__steps=1000)
    assert Plan.as_begun(long, 8, 1, tmp_path).shortfall == "as this run was begun"
    (tmp_path / "guard.json").write_text(json.dumps({"plan": asdict(begun)}))
    assert Plan.as_begun(long, 8, 64, tmp_path) == begun
    for damaged in ("{", "[]", "{}", '{"plan": {"every": 3}}'):
        (tmp_path / "guard.json").write_text(damaged)
        with pytest.raises(SrpoError, match=r"guard\.json cannot be read .*: remove it, and the run goes on without"):
            Plan.as_begun(long, 8, 1, tmp_path)


# What it measures


@pytest.fixture(scope="module")
def figures():
    judges = {name: load_reward(name, None, CPU).via("training") for name in ("miniature", "miniature:clip")}
    return Figures(judges["miniature"], {"miniature:clip": judges["miniature:clip"]}, WORDS, PROMPTS, 8)


def test_the_columns_are_what_their_names_say(figures):
    photographs = render(draw_scenes_of(PROMPTS, PHOTO, 0))
    rows = dict(zip(figures.names, figures.measure(photographs, PROMPTS).T, strict=True))
    statistics = picture_statistics(photographs, 8)
    torch.testing.assert_close(rows["saturation"], statistics[:, 1])
    reward = load_reward("miniature", None, CPU).via("training")
    own, wrong = reward(photographs, PROMPTS), reward(photographs, [*PROMPTS[1:], PROMPTS[0]])
    torch.testing.assert_close(rows["reward"], own)
    torch.testing.assert_close(rows["caption_margin"], own - wrong)
    held_out = load_reward("miniature:clip", None, CPU).via("training")
    gap = held_out(photographs, WORDS.texts("realistic photo", PROMPTS))
    gap = gap - held_out(photographs, WORDS.texts("cg render", PROMPTS))
    torch.testing.assert_close(rows["miniature:clip/sgp_gap"], gap)
    assert (rows["caption_margin"] > 0).all()


def test_a_held_out_reward_tells_photographs_from_renders(figures):
    place = figures.names.index("miniature:clip/sgp_gap")
    photo, cg = (figures.measure(render(draw_scenes_of(PROMPTS, kind, 0)), PROMPTS)[:, place] for kind in (PHOTO, CG))
    assert (photo > cg).all()


def test_clipping_counts_black_and_white(figures):
    place = figures.names.index("clipping")
    picture = torch.full((2, 3, 48, 48), 0.5)
    picture[1, :, :24] = 1.0
    clipped = figures.measure(picture, PROMPTS[:2])[:, place].exp()
    torch.testing.assert_close(clipped, torch.tensor([0.001, 0.501]))


def test_wrong_captions_are_other_prompts_and_as_many_as_there_are():
    first, second, third = PROMPTS
    others = OtherPrompts([*PROMPTS, first])
    assert others.of([second, first]) == [[third, second]]
    assert others.of([second, first], 3) == [[third, second], [first, third]]
    assert OtherPrompts([first]).of([first], 3) == []


def test_a_pair_of_a_picture_and_its_copy_has_no_caption_margin():
    judge = load_reward("miniature", None, CPU)
    judge.reads_text = False
    figures = Figures(NoisedPair(judge, ["+"], ["-"], "{word}. {prompt}", noise=0.1), {}, WORDS, PROMPTS, 8)
    assert "caption_margin" not in figures.names


def test_with_one_prompt_there_is_no_wrong_caption_and_no_margin():
    reward = load_reward("miniature", None, CPU)
    figures = Figures(reward, {}, WORDS, PROMPTS[:1], 8)
    assert "caption_margin" not in figures.names
    assert figures.measure(torch.rand(2, 3, 48, 48), PROMPTS[:1] * 2).shape == (2, len(figures.names))


# What a run makes of it


@pytest.fixture(scope="module")
def run(processes, tiny, tmp_path_factory):
    """Runs of the guard, each made once; the arguments are settings."""
    made = {}

    def make(*pairs, steps=10, before=""):
        key = (pairs, steps)
        if key not in made:
            folder = tmp_path_factory.mktemp("guarded") / "run"
            process = processes.start(*tiny(folder, *settings(*pairs), steps=steps), before=before)
            assert process.wait() == 0, process.stderr.read_text()
            process.stderr.rename(folder.parent / "stderr")
            made[key] = folder
        return made[key]

    return make


def settings(*pairs):
    given = WATCHED | dict(pair.split("=", 1) for pair in pairs)
    return [f"--set={key}={value}" for key, value in given.items()]


def guard_of(folder):
    guard = json.loads((folder / "guard.json").read_text())
    del guard["cost"]
    return guard


@pytest.mark.slow
def test_a_run_keeps_what_its_guard_saw(run):
    folder = run()
    guard = guard_of(folder)
    assert guard["pictures"] == {"calibration": 64, "panel": 8}
    assert guard["series"]["step"] == list(range(10))
    assert guard["series"]["count"] == [8] * 10
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert guard["series"]["sgp_gap"] == [record["sgp_gap"] for record in records]
    assert guard["series"]["reward"] == pytest.approx([record["reward"] for record in records], abs=1e-5)
    assert [check["step"] for check in guard["checks"]] == [5, 10]
    assert [seen["step"] for seen in guard["panel"]] == [5, 10]
    assert all(seen["base_distance"] > 0 for seen in guard["panel"])
    assert {place["step"] for place in guard["checkpoints"]} == {5, 10}
    assert (folder / "report.html").is_file()


def test_the_rollouts_of_the_first_step_are_the_base_models(run):
    guard = guard_of(run())
    for watched in guard["signals"]:
        if watched["source"] == "rollouts":
            first = guard["series"][watched["name"]][0]
            assert abs(first - watched["base"]) < 5 * watched["spread"] * (1 / 8 + 1 / 64) ** 0.5, watched["name"]


def test_watching_changes_nothing_of_the_training(run, read_metrics):
    watched, alone = run(), run("guard.action=off")
    assert read_metrics(watched) == read_metrics(alone)
    weights = "checkpoints/step-000010/transformer/diffusion_pytorch_model.safetensors"
    assert (watched / weights).read_bytes() == (alone / weights).read_bytes()


def test_a_guard_that_is_off_leaves_nothing(run):
    names = {path.name for path in run("guard.action=off").iterdir()}
    assert not names & {"guard.json", "panel.safetensors", "report.html", "best"}


KILL = """
import os, signal
from srpo_cli.runtime.folder import RunFolder
log = RunFolder.log
def log_and_die(self, record):
    log(self, record)
    if record["step"] == 8:
        os.kill(os.getpid(), signal.SIGKILL)
RunFolder.log = log_and_die
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_what_its_guard_had_seen(run, tmp_path, processes, tiny, srpo):
    folder = tmp_path / "run"
    process = processes.start(*tiny(folder, *settings(), steps=10), before=KILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read_text()
    outcome = srpo("train", "--resume", folder)
    assert outcome.exit_code == 0, outcome.stderr
    assert guard_of(folder) == guard_of(run())


def test_a_collapse_ends_the_run_and_what_went_before_is_measured(run):
    folder = run("optimizer.lr=2e-3", "evaluation.prompts=8", steps=30)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stopped_by"] == "guard" and summary["steps"] <= 25
    guard = guard_of(folder)
    assert guard["stopped"]["step"] == summary["steps"]
    assert len({one["family"] for one in guard["signals"] if one["name"] in guard["stopped"]["signals"]}) >= 2
    told = (folder.parent / "stderr").read_text()
    for warning in guard["warnings"]:
        assert f"guard: at step {warning['step']} {warning['signal']} (" in told
    assert f"guard: collapsed at step {summary['steps']}" in told


DIGESTS = """
import hashlib, json, os
from srpo_cli.recipes.report import Report

drawn = []

def sample(report, step, original=Report.sample):
    original(report, step)
    files = sorted((report.folder.samples / f"step-{step:06d}").glob("*.png"))
    drawn.append([step, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]])
    open(os.environ["DRAWN"], "w").write(json.dumps(drawn))

Report.sample = sample
"""


@pytest.mark.slow
@pytest.mark.parametrize("own", [(), ("train.mode=lora", "optimizer.lr=4e-4", "train.ema=0.8")])
def test_the_best_checkpoint_is_put_back_before_it_is_shown(own, processes, tiny, srpo, tmp_path):
    """Its pictures are those that were drawn when it was the newest."""
    folder, drawn = tmp_path / "run", tmp_path / "drawn"
    pairs = ("rollout.steps=10", "algorithm.pairs=2", "samples.count=2", "samples.every=5", "guard.share=0.05", *own)
    process = processes.start(*tiny(folder, *settings(*pairs), steps=300), before=DIGESTS, DRAWN=str(drawn))
    assert process.wait() == 0, process.stderr.read_text()
    summary = json.loads((folder / "summary.json").read_text())
    best, pictures = summary["best_step"], json.loads(drawn.read_text())
    assert summary["stopped_by"] == "guard" and best < summary["steps"]
    (first, again) = (digests for step, digests in pictures if step == best)
    assert first == again
    assert (folder / "best").resolve().name == f"step-{best:06d}"
    outcome = srpo("sample", PROMPTS[0], "--model", folder, "--output", tmp_path / "drawn-again")
    assert outcome.exit_code == 0, outcome.stderr
    row = json.loads((tmp_path / "drawn-again" / "samples.jsonl").read_text().splitlines()[0])
    assert f"step-{best:06d}" in row["weights"]


@pytest.mark.slow
def test_a_guard_that_only_warns_lets_a_collapsing_run_go_on(run):
    folder = run("optimizer.lr=2e-3", "guard.action=warn", steps=30)
    assert json.loads((folder / "summary.json").read_text())["stopped_by"] == "steps"
    guard = guard_of(folder)
    assert guard["collapsed"]["step"] < 30
    assert guard["stopped"] is None


@pytest.fixture
def two(processes, tiny):
    """Starts a run of ten steps in two processes; returns their exit codes and what either said."""

    def start(folder, *pairs, before=("", "")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        arguments = tiny(folder, *settings("train.batch_size=4", *pairs), steps=10)  # of each process
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [
            processes.start(*arguments, before=own, RANK=str(rank), LOCAL_RANK=str(rank), **meeting)
            for rank, own in enumerate(before)
        ]
        return [rank.wait() for rank in ranks], [rank.stderr.read_text() for rank in ranks]

    return start


@pytest.mark.slow
def test_two_processes_see_what_one_sees(run, two, tmp_path):
    folder = tmp_path / "run"
    codes, said = two(folder)
    assert codes == [0, 0], said
    alone, shared = guard_of(run()), guard_of(folder)
    for one in alone["signals"]:
        if one["source"] == "rollouts":
            column = pytest.approx(alone["series"][one["name"]], abs=0.02 * one["spread"])
            assert shared["series"][one["name"]] == column, one["name"]
    for here, there in zip(shared["panel"], alone["panel"], strict=True):
        assert here == pytest.approx(there, rel=0.02)


FAILS = """
from srpo_cli.errors import SrpoError
from srpo_cli.recipes.drawing import Drawing

def pictures(self, prompts, numbers, purpose, original=Drawing.pictures):
    if purpose == "{purpose}":
        raise SrpoError("no picture of {purpose}")
    return original(self, prompts, numbers, purpose)

Drawing.pictures = pictures
"""


@pytest.mark.slow
@pytest.mark.parametrize("purpose", ["calibration", "panel"])
def test_a_process_that_cannot_draw_ends_all_with_its_own_words(two, tmp_path, purpose):
    codes, (told, _) = two(tmp_path / "run", before=("", FAILS.format(purpose=purpose)))
    assert codes == [1, 1], told
    assert f"rank 1: no picture of {purpose}" in told


def test_a_policys_rollouts_are_measured_against_pictures_of_its_own_sampler(run):
    own = ("algorithm.name=dance-grpo", "algorithm.grpo.group=2", "rollout.steps=4", "algorithm.grpo.noise_level=0.7")
    guard = guard_of(run(*own, steps=5))
    (grain,) = [watched for watched in guard["signals"] if watched["name"] == "high_frequency"]
    assert guard["series"]["count"] == [4] * 5
    assert abs(guard["series"]["high_frequency"][0] - grain["base"]) < 4 * grain["spread"] * (1 / 4 + 1 / 64) ** 0.5
    (reward,) = [watched for watched in guard["signals"] if watched["name"] == "reward"]
    assert reward["trained"]


def test_a_run_that_the_guard_ended_does_not_go_on_and_says_so(run, srpo, tmp_path):
    folder = shutil.copytree(
        run("optimizer.lr=2e-3", "evaluation.prompts=8", steps=30), tmp_path / "run", symlinks=True
    )
    outcome = srpo("train", "--resume", folder)
    assert outcome.exit_code == 0, outcome.stderr
    assert (
        "the guard has ended this run, so it does not go on; a new one with guard.action=warn would" in outcome.stderr
    )
    assert json.loads((folder / "summary.json").read_text())["steps"] < 30


def test_a_run_that_goes_on_for_longer_keeps_its_guard(run, srpo, tmp_path):
    folder = shutil.copytree(run(), tmp_path / "run", symlinks=True)
    outcome = srpo("train", "--resume", folder, "--steps", 13)
    assert outcome.exit_code == 0, outcome.stderr
    before, after = guard_of(run()), guard_of(folder)
    assert (after["plan"], after["signals"]) == (before["plan"], before["signals"])
    assert after["tests"] > before["tests"], "more checks, each held to more"
    assert [check["step"] for check in after["checks"]] == [5, 10, 13]
    assert after["series"]["step"] == list(range(13))


def test_a_run_that_was_begun_without_a_guard_goes_on_without(run, srpo, tmp_path):
    folder = shutil.copytree(run(), tmp_path / "run", symlinks=True)
    (folder / "guard.json").unlink()
    outcome = srpo("train", "--resume", folder, "--steps", 11)
    assert (outcome.exit_code, "guard: off, as this run was begun" in outcome.stderr) == (0, True), outcome.stderr
    assert not (folder / "guard.json").exists()


@pytest.mark.slow
def test_no_checkpoint_better_than_the_base_is_said_even_if_asked_to_be_quiet(srpo, tiny, tmp_path):
    own = settings("optimizer.lr=1e-12", "train.batch_size=4")
    outcome = srpo(*tiny(tmp_path / "run", *own, "--quiet", steps=10))
    assert outcome.exit_code == 0
    assert "guard: no checkpoint is clearly better than the base model by held-out evidence" in outcome.stderr


def test_an_unknown_reward_to_watch_is_refused_before_anything_runs(srpo):
    command = ("train", "--preset", "realism", "--model", "miniature", "--dry-run")
    outcome = srpo(*command, "--set=guard.rewards=[nosuch]")
    assert (outcome.exit_code, "Unknown reward" in outcome.stderr) == (2, True)
    outcome = srpo(*command, "--set=guard.rewards=[judge.py]")
    assert (outcome.exit_code, "judge.py" in outcome.stderr) == (2, True)


def test_a_guard_that_is_off_watches_no_reward():
    assert config(guard__rewards="[miniature]", guard__action="off").rewards == ["miniature"]


def test_a_trained_reward_is_not_watched(srpo, tmp_path):
    outcome = srpo(
        "train", "--preset", "realism", "--model", "miniature", "--set=guard.rewards=[miniature]", "--dry-run"
    )
    assert outcome.exit_code == 2
    assert "guard.rewards names miniature, which reward.name or reward.others optimises" in outcome.stderr
