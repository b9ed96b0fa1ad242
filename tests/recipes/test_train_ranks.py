"""Several processes, started as torchrun starts them, train one model: equal weights, one voice, one folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from srpo_cli.config.load import load_train_config

pytestmark = [pytest.mark.usefixtures("on_the_cpu")]

RECORD = """
import os, torch
from srpo_cli.algorithms.srpo import SRPO
from srpo_cli.recipes.train import Run
from srpo_cli.runtime.trained import Trained

seen = {"noise": [], "prompts": [], "sigma": [], "loss": [], "gradient": [], "mean_gradient": []}

def roll_out(run, numbers, original=Run._roll_out):
    rollout = original(run, numbers)
    seen["noise"].append(rollout.eps.clone())
    seen["prompts"].append(list(rollout.prompts))
    return rollout

def backward(algorithm, rollout, injections, *rest, original=SRPO.backward, **options):
    metrics = original(algorithm, rollout, injections, *rest, **options)
    seen["sigma"].append(injections[0].sigma)
    seen["loss"].append(float(metrics["loss"]))
    return metrics

def average(trained, *rest, original=Trained.average):
    seen["gradient"].append(trained.parameters[0].grad.clone())
    means = original(trained, *rest)
    seen["mean_gradient"].append(trained.parameters[0].grad.clone())
    return means

def loop(run, *rest, original=Run.loop):
    original(run, *rest)
    seen["weights"] = [parameter.detach() for parameter in run.parameters]
    torch.save(seen, os.environ["SEEN"])

Run._roll_out, SRPO.backward, Trained.average, Run.loop = roll_out, backward, average, loop
"""

NO_PICTURE_FOR_RANK_1 = """
import os
from srpo_cli.errors import UsageError
from srpo_cli.recipes.train import Run

def roll_out(run, numbers, original=Run._roll_out):
    if run.step == 1 and run.ranks.rank == 1:
        raise UsageError("cannot read the picture")
    return original(run, numbers)

Run._roll_out = roll_out
"""

NO_NUMBER_IN_STEP_2 = """
from srpo_cli.recipes.train import Run
from srpo_cli.rewards.clip import ClipReward

seen = [0]

def take_step(run, original=Run.take_step):
    seen[0] = run.step + 1
    return original(run)

def scores(reward, images, *texts, original=ClipReward.scores):
    there = images.requires_grad and seen[0] == 2 and int(__import__("os").environ["RANK"]) == 1
    return tuple((float("nan") if there else 1.0) * score for score in original(reward, images, *texts))

Run.take_step, ClipReward.scores = take_step, scores
"""

NO_ROOM_FOR_PICTURES = """
from srpo_cli.errors import SrpoError
from srpo_cli.recipes.report import Report

def sample(report, step, original=Report.sample):
    if step == 1:
        raise SrpoError("the disk is full")
    original(report, step)

Report.sample = sample
"""

NO_ENCODERS_FOR_RANK_1 = """
import os
import srpo_cli.recipes.encodings as encodings
from srpo_cli.errors import MissingError

def load(*where, original=encodings.load_prompt_encoder):
    if os.environ["RANK"] == "1":
        raise MissingError("No text encoders here.")
    return original(*where)

encodings.load_prompt_encoder = load
"""


class Ended(NamedTuple):
    """How a rank ended, and what it wrote and saw."""

    exit_code: int
    stdout: str
    stderr: str
    seen: dict | None


@pytest.fixture(scope="module")
def start(processes, tmp_path_factory):
    """Starts some ranks of one run; the function that comes back waits for all."""

    def start_ranks(*arguments, before=RECORD, size=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder = tmp_path_factory.mktemp("seen")
        ranks = []
        for rank in range(size):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "SEEN": folder / str(rank)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in environment.items()}
            ranks.append(processes.start(*arguments, before=before, **environment))

        def wait():
            codes = [rank.wait() for rank in ranks]
            seen = [torch.load(folder / str(i)) if (folder / str(i)).exists() else None for i in range(size)]
            streams = [(rank.stdout.read_text(), rank.stderr.read_text()) for rank in ranks]
            return [Ended(code, *texts, saw) for code, texts, saw in zip(codes, streams, seen, strict=True)]

        return ranks, wait

    return start_ranks


class Pair(NamedTuple):
    """A run of two ranks that is over."""

    folder: Path
    ranks: list[Ended]


@pytest.fixture(scope="module")
def shared(start, tiny, tmp_path_factory):
    """Two steps of two ranks, whose rollouts share their noise."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    return Pair(folder, start(*tiny(folder, "--set", "rollout.shared_noise=true", steps=2))[1]())


@pytest.fixture(scope="module")
def apart(start, tiny, tmp_path_factory):
    """One step of two ranks, whose rollouts have noises of their own."""
    folder = tmp_path_factory.mktemp("apart") / "run"
    return Pair(folder, start(*tiny(folder, "--set", "rollout.shared_noise=false", steps=1))[1]())


def test_both_ranks_hold_equal_weights_afterwards(shared):
    assert [rank.exit_code for rank in shared.ranks] == [0, 0], shared.ranks[0].stderr + shared.ranks[1].stderr
    zero, one = (rank.seen["weights"] for rank in shared.ranks)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(zero, one, strict=True))


def test_gradients_and_losses_are_averaged(shared, read_metrics):
    zero, one = (rank.seen for rank in shared.ranks)
    for mine, theirs, mean in zip(zero["gradient"], one["gradient"], zero["mean_gradient"], strict=True):
        assert not torch.equal(mine, theirs)
        torch.testing.assert_close((mine + theirs) / 2, mean)
    losses = torch.tensor([zero["loss"], one["loss"]]).mean(0).view(2, 2).mean(1)  # over ranks, then over the pairs
    assert [record["loss"] for record in read_metrics(shared.folder)] == pytest.approx(losses.tolist(), rel=1e-5)


def test_ranks_take_the_prompts_of_the_global_batch_in_order(shared):
    from srpo_cli.recipes.parts import load_prompts

    config = load_train_config(shared.folder / "config.yaml").config
    prompts = load_prompts(config.prompts, "miniature", held_out=0, split="evaluation", seed=config.train.seed).train
    zero, one = (rank.seen["prompts"] for rank in shared.ranks)
    in_order = [prompt for step in range(2) for prompt in (*zero[step], *one[step])]
    assert in_order == prompts[: 2 * 2 * 2]


def test_shared_noise_is_one_for_all_samples_of_all_ranks_and_new_in_every_step(shared):
    zero, one = (rank.seen["noise"] for rank in shared.ranks)
    for step in range(2):
        noises = torch.cat([zero[step], one[step]])
        assert torch.equal(noises, noises[:1].expand_as(noises))
    assert not torch.equal(zero[0], zero[1])


def test_noise_that_is_not_shared_differs_between_ranks_and_samples(apart):
    noises = torch.cat([rank.seen["noise"][0] for rank in apart.ranks])
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == 4


def test_every_other_draw_differs_between_ranks(shared):
    zero, one = (rank.seen["sigma"] for rank in shared.ranks)
    assert not any(torch.equal(mine, theirs) for mine, theirs in zip(zero, one, strict=True))


def test_one_rank_writes_and_talks(shared, read_metrics):
    zero, one = shared.ranks
    assert (one.stdout, one.stderr) == ("", "")
    assert "step 2/2" in zero.stderr and "2 steps in" in zero.stdout
    assert [record["step"] for record in read_metrics(shared.folder)] == [1, 2]
    assert json.loads((shared.folder / "environment.json").read_text())["processes"] == 2


def test_the_ledger_counts_all_ranks(shared):
    ledger = json.loads((shared.folder / "summary.json").read_text())["ledger"]
    assert (ledger["rollouts"], ledger["forwards"], ledger["updates"]) == (8, 8 * 3, 4)
    assert (ledger["gradient_passes"], ledger["reward_calls"]) == (8 * 4, 8 * 2 + 8 * 4)


def test_two_ranks_go_on_as_if_never_stopped(start, tiny, shared, tmp_path, assert_same):
    folder = tmp_path / "run"
    assert [rank.exit_code for rank in start(*tiny(folder, steps=1))[1]()] == [0, 0]
    assert [rank.exit_code for rank in start("train", "--resume", folder, "--steps", 2)[1]()] == [0, 0]
    assert_same(folder, shared.folder, step=2)


PLANS = {
    "replicated": ["memory.plan=replicated"],
    "sharded": ["memory.plan=sharded"],
    "sharded twice": ["memory.plan=sharded", "memory.shard=1"],
    "sharded, a rollout at a time": ["memory.plan=sharded", "memory.micro_batch=1"],
    "lora": ["train.mode=lora", "lora.rank=4"],
}


def settings(*pairs):
    return [f"--set={pair}" for pair in pairs]


def weights_of(folder, step):
    (file,) = (folder / f"checkpoints/step-{step:06d}/transformer").glob("*.safetensors")
    return load_file(file)


def assert_close(mine, theirs, steps):
    """Equal but for the order of sums, which Adam may turn into a step the other way where a gradient is next to 0."""
    assert mine.keys() == theirs.keys()
    apart = torch.cat([(mine[name] - theirs[name]).flatten().abs() for name in mine])
    assert apart.max() <= 2 * steps * 2 * 2e-5  # two updates a step, each at most lr either way
    assert (apart > 2e-6).float().mean() < 1e-3
    assert apart.mean() < 1e-7


@pytest.fixture(scope="module")
def one_process(processes, tiny, tmp_path_factory):
    """Runs of one process with the global batch of two, by the settings of a plan."""
    folders = {}

    def run(*pairs, batch=4, steps=5):
        key = (*pairs, batch, steps)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("one") / "run"
            given = settings(*pairs, f"train.batch_size={batch}", "rollout.shared_noise=false")
            process = processes.start(*tiny(folders[key], *given, steps=steps))
            assert process.wait() == 0, process.stderr.read_text()
        return folders[key]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_two_ranks_train_as_one_process_with_the_same_global_batch(
    plan, start, tiny, one_process, tmp_path, read_metrics
):
    pairs = PLANS[plan]
    given = settings(*pairs, "rollout.shared_noise=false")
    ranks = start(*tiny(tmp_path / "two", *given, steps=5), before="")[1]()
    assert [rank.exit_code for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
    alone = one_process(*[pair for pair in pairs if not pair.startswith("memory")])
    assert_close(weights_of(tmp_path / "two", 5), weights_of(alone, 5), steps=5)
    for two, one in zip(read_metrics(tmp_path / "two"), read_metrics(alone), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=2e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_sharded_weights_are_gathered_before_rollouts_round_them_to_float8(
    start, tiny, one_process, tmp_path, read_metrics
):
    """One unit in the last place may round to another float8 number, so only what is measured is close."""
    given = settings("memory.plan=sharded", "rollout.dtype=float8", "rollout.shared_noise=false")
    ranks = start(*tiny(tmp_path / "two", *given, steps=2), before="")[1]()
    assert [rank.exit_code for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
    alone = read_metrics(one_process("rollout.dtype=float8", steps=2))
    for two, one in zip(read_metrics(tmp_path / "two"), alone, strict=True):
        assert two["reward"] == pytest.approx(one["reward"], abs=0.01)
        assert two["sgp_gap"] == pytest.approx(one["sgp_gap"], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["replicated", "sharded", "sharded, a rollout at a time"])
@pytest.mark.parametrize("size", [1, 3])
def test_what_two_ranks_saved_goes_on_with_another_number(plan, size, start, tiny, one_process, tmp_path):
    given = settings(*PLANS[plan], "rollout.shared_noise=false")
    assert [rank.exit_code for rank in start(*tiny(tmp_path / "run", *given, steps=2), before="")[1]()] == [0, 0]
    ended = start("train", "--resume", tmp_path / "run", "--steps", 5, before="", size=size)[1]()
    assert [rank.exit_code for rank in ended] == [0] * size, ended[0].stderr
    assert_close(weights_of(tmp_path / "run", 5), weights_of(one_process(), 5), steps=5)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ledger"]["rollouts"] == 5 * 4


def test_more_processes_than_rollouts_are_refused(start, shared):
    ended = start("train", "--resume", shared.folder, "--steps", 4, size=5)[1]()
    assert [rank.exit_code for rank in ended] == [2] * 5
    assert "has 4 rollout(s), here are 5 processes: start 4 at most" in ended[0].stderr
    assert not any(rank.stderr for rank in ended[1:])


def test_a_signal_to_any_rank_stops_all_at_the_same_step(start, tiny, tmp_path):
    folder = tmp_path / "run"
    (_, one), wait = start(*tiny(folder, steps=50))
    end = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    one.send(signal.SIGTERM)
    zero, one = wait()
    assert (zero.exit_code, one.exit_code) == (143, 143)
    assert len(zero.seen["noise"]) == len(one.seen["noise"]) < 50
    step = len(zero.seen["noise"])
    assert zero.stderr.splitlines()[-1].startswith(f"stopped by SIGTERM after step {step}; go on with: srpo train")
    assert (folder / f"checkpoints/step-{step:06d}").is_dir()
    assert one.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --preset nope", "Unknown preset 'nope'"),
        ("train --preset realism --model miniature --set prompts.source=/nowhere", "cannot read prompts"),
    ],
)
def test_a_mistake_of_all_is_told_once(start, tmp_path, arguments, message):
    zero, one = start(*arguments.split(), "--output", tmp_path / "run")[1]()
    assert (zero.exit_code, one.exit_code) == (2, 2)
    assert message in zero.stderr.splitlines()[-1]
    assert one.stderr == ""


def test_a_folder_that_is_taken_is_told_once(start, tiny, shared):
    zero, one = start(*tiny(shared.folder))[1]()
    assert (zero.exit_code, one.exit_code) == (2, 2)
    assert "holds another run" in zero.stderr.splitlines()[-1]
    assert one.stderr == ""


@pytest.mark.parametrize(("plan", "saved"), [("replicated", ["step-000001"]), ("sharded", [])])
def test_a_mistake_of_one_rank_is_told_by_it_and_the_others_save_if_they_can(plan, saved, start, tiny, tmp_path):
    given = settings(f"memory.plan={plan}", "checkpoint.every=0")
    zero, one = start(*tiny(tmp_path / "run", *given), before=NO_PICTURE_FOR_RANK_1)[1]()
    assert one.exit_code == 2 and one.stderr.splitlines() == ["error: cannot read the picture"]
    assert "Traceback" not in zero.stderr or plan == "sharded"  # FSDP's own exchanges are broken off
    assert zero.exit_code != 0
    if plan == "replicated":
        assert zero.stderr.splitlines()[-1] == "error: another process of this run has ended; what it said is above"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == saved


@pytest.mark.parametrize("plan", ["replicated", "sharded"])
def test_a_loss_that_is_not_finite_on_one_rank_ends_all_and_keeps_every_completed_step(plan, start, tiny, tmp_path):
    given = settings(f"memory.plan={plan}", "checkpoint.every=0")
    zero, one = start(*tiny(tmp_path / "run", *given), before=NO_NUMBER_IN_STEP_2)[1]()
    assert (zero.exit_code, one.exit_code) == (1, 1), zero.stderr + one.stderr
    assert "loss nan with gradient norm nan at step 2: the 1 before it are saved" in zero.stderr.splitlines()[-1]
    assert one.stderr == ""
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize("plan", ["replicated", "sharded"])
def test_a_measurement_that_fails_on_rank_0_ends_all_with_its_message(plan, start, tiny, tmp_path):
    given = settings(f"memory.plan={plan}", "samples.every=1", "samples.count=1")
    zero, one = start(*tiny(tmp_path / "run"), *given, before=NO_ROOM_FOR_PICTURES)[1]()
    assert (zero.exit_code, one.exit_code) == (1, 1), zero.stderr + one.stderr
    assert zero.stderr.splitlines()[-1] == "error: the disk is full"
    assert one.stderr == ""
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]


def test_encoders_that_one_rank_lacks_are_told_by_rank_0(start, tiny, tmp_path):
    given = settings(f"prompts.cache={tmp_path / 'cache'}")
    zero, one = start(*tiny(tmp_path / "run", *given), before=NO_ENCODERS_FOR_RANK_1)[1]()
    assert (zero.exit_code, one.exit_code) == (4, 4), zero.stderr + one.stderr
    assert zero.stderr.splitlines()[-1] == "error: rank 1: No text encoders here."
    assert one.stderr == ""
    assert not (tmp_path / "run").exists()


def test_a_cluster_that_sets_half_of_torchruns_environment_is_told_so(tiny, tmp_path, srpo, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = srpo(*tiny(tmp_path / "run"))
    assert outcome.exit_code == 2
    assert "WORLD_SIZE is 2 and RANK is not set" in outcome.stderr


@pytest.mark.slow
def test_torchrun_does_the_same(shared, tiny, tmp_path, assert_same):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "srpo_cli", *tiny(tmp_path / "run", steps=2)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("2 steps in") == 1
    assert process.stderr.count("run: ") == 1
    assert_same(tmp_path / "run", shared.folder, step=2)
