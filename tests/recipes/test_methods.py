"""Every method in a real run on the miniature: what it learns from, what it costs, and that nothing else changes it."""

import json
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file

from srpo_cli.algorithms.alignprop import TruncationDraws
from srpo_cli.config.load import load_train_config, read_preset
from srpo_cli.config.schema import METHODS
from srpo_cli.miniature import WEIGHTS
from srpo_cli.recipes.model_card import Base, model_card
from srpo_cli.registry import ALGORITHMS
from srpo_cli.runtime.seeding import generator

pytestmark = [pytest.mark.usefixtures("on_the_cpu")]

FULL = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
SHORT = {"rollout.steps": 4, "algorithm.pairs": 2, "algorithm.target": "null", "train.batch_size": 2}
SHORT |= {"evaluation.prompts": 0, "samples.count": 0, "checkpoint.every": 1, "guard.action": "off"}
GROUPS = {"train.batch_size": 4, "algorithm.grpo.group": 2, "algorithm.grpo.fraction": 1}
OWN = {"refl": {"algorithm.refl.steps_left": "[1,3]"}}
OWN |= dict.fromkeys(("dance-grpo", "dance-grpo-relative", "flow-grpo"), GROUPS)
VARIANTS = (
    "refl",
    "draft",
    "draft-lv",
    "alignprop",
    "direct-align",
    "direct-align-relative",
    "dance-grpo",
    "dance-grpo-relative",
    "flow-grpo",
)
ALONE = ("memory.micro_batch=1", "memory.batch_branches=false")
ALIKE = ("direct-align-relative", "dance-grpo-relative")  # as the variant of that name but for what the reward is asked
UNLIKE = tuple(name for name in VARIANTS if name not in ALIKE)


def quick(*names, of=VARIANTS):
    """All of these variants, those that are not named marked as slow."""
    slow = [name for name in of if name not in names]
    return pytest.mark.parametrize("variant", [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)])


RECORD = """
import os, torch
import srpo_cli.recipes.run_prompts
from srpo_cli.algorithms.grpo import GRPO
from srpo_cli.algorithms.judging import DirectMethod
from srpo_cli.recipes.train import Run

srpo_cli.recipes.run_prompts.CALIBRATION = 8
seen = {"rollouts": [], "judged": [], "passes": []}

def compare(run, pictures, original=Run._compare):
    original(run, pictures)
    seen["rollouts"] += run.rollouts

def judge(policy, *rest, original=GRPO.judge, **options):
    rewards = original(policy, *rest, **options)
    seen["judged"].append(rewards)
    return rewards

def record(kind, original):
    def backward(algorithm, rollout, draws, *rest, weights=None, **options):
        metrics = original(algorithm, rollout, draws, *rest, weights=weights, **options)
        told = {"lot": getattr(draws[0], "lot", 0), "weights": weights, "captions": options.get("captions")}
        seen["passes"].append({**told, "prompts": rollout.prompts, **{k: v.item() for k, v in metrics.items()}})
        return metrics
    kind.backward = backward

def loop(run, *rest, original=Run.loop):
    original(run, *rest)
    seen["gaps"] = torch.cat(run.gaps)
    kept = [(r.prompts, r.eps, r.path, r.x_0, r.advantages) for r in seen["rollouts"]]
    torch.save({**seen, "rollouts": kept}, os.environ["SEEN"])

Run._compare, Run.loop, GRPO.judge = compare, loop, judge
record(GRPO, GRPO.backward)
record(DirectMethod, DirectMethod.backward)
"""


def command(variant, output, *pairs, steps=2):
    """Arguments of a short run; later pairs win."""
    given = SHORT | OWN.get(variant, {}) | dict(pair.split("=", 1) for pair in pairs)
    settings = [f"--set={key}={value}" for key, value in given.items()]
    preset = ["train", "--preset", f"baselines:{variant}", "--model", "miniature", *settings]
    return [*preset, "--steps", str(steps), "--output", str(output)]


@pytest.fixture(scope="module")
def run(processes, tmp_path_factory):
    """Runs of a variant with some settings, each made once; what it saw lies beside it as ``seen``."""
    folders = {}

    def make(variant, *pairs, steps=2):
        key = (variant, pairs, steps)
        if key not in folders:
            folder = tmp_path_factory.mktemp(variant) / "run"
            seen = str(folder.parent / "seen")
            process = processes.start(*command(variant, folder, *pairs, steps=steps), before=RECORD, SEEN=seen)
            assert process.wait() == 0, process.stderr.read_text()
            folders[key] = folder
        return folders[key]

    return make


def weights(folder, step=2, name=FULL):
    return load_file(folder / f"checkpoints/step-{step:06d}/transformer" / name)


def ledger(folder):
    counts = json.loads((folder / "summary.json").read_text())["ledger"]
    return {name: counts[name] for name in ("forwards", "gradient_passes", "reward_calls", "updates")}


def seen_by(folder):
    return torch.load(folder.parent / "seen", weights_only=False)


def assert_close(mine, theirs, mean=2e-7):
    """Equal but for the order of sums."""
    assert mine.keys() == theirs.keys()
    assert torch.cat([(mine[name] - theirs[name]).flatten().abs() for name in mine]).mean() < mean


def test_every_variant_and_every_method_is_here():
    assert tuple(read_preset("baselines").variants) == VARIANTS
    trained = {load_train_config(f"baselines:{variant}").config.algorithm.name for variant in VARIANTS}
    assert trained | {"srpo"} == set(METHODS) == set(ALGORITHMS.names)


# --- it trains --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_the_transformer_moves_in_every_step(variant, run, read_metrics):
    base = load_file(WEIGHTS / "pipeline" / "transformer" / FULL)
    first, second = (weights(run(variant), step) for step in (1, 2))
    assert all(not torch.equal(base[name], first[name]) for name in base)
    assert all(not torch.equal(first[name], second[name]) for name in base)
    for record in read_metrics(run(variant)):
        assert record["grad_norm"] > 0


# Of 2 steps with 2 updates each on the rollouts of 4 sampler steps. Direct methods roll out 2 pictures a step, and
# judge each twice to measure it and once for every draw; policy methods roll out 4, and judge each once more.
COUNTS = {
    "refl": (2 * 2 * 4, 2 * 2 * 2, 2 * (2 * 2 + 2 * 2)),
    "draft": (2 * 2 * 4, 2 * 2 * 2 * 2, 2 * (2 * 2 + 2 * 2)),  # the last 2 steps in each update
    "draft-lv": (2 * 2 * 4, 2 * 2 * 2 * 3, 2 * (2 * 2 + 2 * 2 * 3)),  # two noises and the last step itself
    "alignprop": (2 * 2 * 4, 2 * 2 * 2 * 3, 2 * (2 * 2 + 2 * 2)),  # cut at the first of 4 steps
    "direct-align": (2 * 2 * 4, 2 * 2 * 2, 2 * (2 * 2 + 2 * 2)),
    "direct-align-relative": (2 * 2 * 4, 2 * 2 * 2, 2 * (2 * 2 + 2 * 2)),
    # 3 steps with noise: 2 train in the first update, and 1, remembered before, in the second.
    "dance-grpo": (2 * 4 * (4 + 1), 2 * 4 * 3, 2 * 4 * (2 + 1)),
    "dance-grpo-relative": (2 * 4 * (4 + 1), 2 * 4 * 3, 2 * 4 * (2 + 1)),
    "flow-grpo": (2 * 4 * (4 + 1), 2 * 4 * 3, 2 * 4 * (2 + 1)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_ledger_holds_what_can_be_worked_out_by_hand(variant, run):
    fixed = ["algorithm.alignprop.truncation=[1,1]"] if variant == "alignprop" else []
    counted = ledger(run(variant, *fixed))
    assert tuple(counted.values()) == (*COUNTS[variant], 2 * 2)


@pytest.mark.parametrize("together", [1, 2])
def test_alignprop_counts_the_calls_that_its_draws_made(together, run):
    """A micro-batch is called where any of its samples keeps its velocity, and at the last step."""
    calls = 0
    for number in range(0, 2 * 2, together):
        draws = [generator(42, "injection", each) for each in range(number, number + together)]
        for (draw,) in TruncationDraws(4, 0, 4).pairs(draws, 2):
            calls += together * (draw.kept[:, :-1].any(0).sum().item() + 1)
    folder = run("alignprop", *ALONE) if together == 1 else run("alignprop")
    assert ledger(folder)["gradient_passes"] == calls


# --- nothing else changes it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_lost_its_second_half_and_goes_on_is_the_whole_one_to_the_bit(
    variant, run, processes, tmp_path, assert_same
):
    half = shutil.copytree(run(variant), tmp_path / "half")
    shutil.rmtree(half / "checkpoints/step-000002")
    process = processes.start("train", "--resume", half, "--steps", 2)
    assert process.wait() == 0, process.stderr.read_text()
    assert_same(half, run(variant), step=2)


@quick(*UNLIKE)
def test_micro_batches_and_passes_add_up_to_the_whole_batch(variant, run, read_metrics):
    apart, together = run(variant, *ALONE), run(variant)
    assert_close(weights(apart), weights(together))
    for one, other in zip(read_metrics(apart), read_metrics(together), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    if variant != "alignprop":
        assert ledger(apart) == ledger(together)


def test_micro_batches_need_not_divide_a_group(run):
    groups = ["algorithm.grpo.group=4"]
    assert_close(weights(run("dance-grpo", *groups, "memory.micro_batch=3")), weights(run("dance-grpo", *groups)))


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "shared"), [("dance-grpo", False), ("dance-grpo", True), ("flow-grpo", False)])
def test_a_group_shares_prompt_and_noise_and_ends_in_different_pictures(variant, shared, run):
    folder = run(variant, "rollout.shared_noise=true") if shared else run(variant)
    steps = seen_by(folder)["rollouts"]
    assert len(steps) == 2
    prompts = [prompt for step in steps for prompt in step[0]]
    assert prompts[::2] == prompts[1::2]
    assert len(set(prompts[::2])) == 4  # a new one for each group, in the next step too
    for _, eps, path, x_0, advantages in steps:
        assert torch.equal(path[0], eps) and torch.equal(path[-1], x_0)
        assert torch.equal(eps[::2], eps[1::2])
        assert torch.equal(eps[0], eps[2]) is shared
        assert len({tuple(picture.flatten().tolist()) for picture in x_0}) == 4
        assert (advantages.view(2, 2).sum(1).abs() < 1e-6).all() and (advantages != 0).all()


@pytest.mark.parametrize("variant", ["dance-grpo", "flow-grpo"])
@pytest.mark.parametrize("alone", [False, True])
def test_the_ratio_is_exactly_1_before_the_first_update_and_not_after_it(variant, alone, run):
    passes = seen_by(run(variant, *ALONE) if alone else run(variant))["passes"]
    assert len(passes) == 2 * 2 * (4 if alone else 1)
    for each in passes:
        assert (each["policy/ratio"] == 1) == (each["lot"] == 0)
        assert each["lot"] or each["policy/clipped"] == 0


@pytest.mark.parametrize(("variant", "over"), [("dance-grpo", (1,)), ("flow-grpo", (0, 1))])
@pytest.mark.parametrize("alone", [False, True])
def test_pictures_are_compared_within_their_group_by_what_the_reward_said_of_them(variant, over, alone, run):
    """In standard deviations of the group for DanceGRPO, of all four pictures for Flow-GRPO."""
    seen = seen_by(run(variant, *ALONE) if alone else run(variant))
    judged = torch.cat(seen["judged"]).view(2, 2, 2).double()
    given = torch.cat([rollout[-1] for rollout in seen["rollouts"]]).view(2, 2, 2)
    for rewards, advantages in zip(judged, given, strict=True):
        expected = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(over, keepdim=True)
        torch.testing.assert_close(advantages.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("variant", "mix"),
    [("dance-grpo", "null"), pytest.param("flow-grpo", "null", marks=pytest.mark.slow), ("dance-grpo", "rewards")],
)
def test_of_two_rewards_advantages_are_added_in_dance_grpo_and_rewards_in_flow_grpo(variant, mix, run):
    """What is said of two rewards apart is told from what is said of their sum by its first dimension."""
    settings = ('reward.others={"miniature:clip": -0.5}', "reward.weight=2", f"algorithm.grpo.mix={mix}")
    seen = seen_by(run(variant, *settings, steps=1))
    judged, given = torch.cat(seen["judged"], -1).double(), torch.cat([rollout[-1] for rollout in seen["rollouts"]])
    apart = variant == "dance-grpo" and mix == "null"
    assert judged.shape == ((2, 4) if apart else (4,))
    over = (-2, -1) if variant == "flow-grpo" else -1
    grouped = judged.unflatten(-1, (2, 2))
    normal = (grouped - grouped.mean(-1, keepdim=True)) / grouped.std(over, keepdim=True)
    expected = (2 * normal[0] - 0.5 * normal[1] if apart else normal).flatten()
    torch.testing.assert_close(given.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("variant", "added"), [("direct-align", ""), ("dance-grpo", ", their advantages added")])
def test_rewards_that_are_trained_together_are_told(variant, added, srpo, tmp_path):
    settings = ('reward.others={"miniature:clip": 0.5}', "rollout.steps=2", "algorithm.pairs=1")
    outcome = srpo(*command(variant, tmp_path / "run", *settings, steps=1))
    assert f"reward: miniature + 0.5 miniature:clip{added}" in outcome.stderr.splitlines()


def test_updates_once_for_all_of_a_rollout_never_leave_the_policy_that_made_it(run):
    passes = seen_by(run("dance-grpo", "algorithm.update=rollout"))["passes"]
    assert [each["lot"] for each in passes] == [0, 1, 0, 1]
    assert [each["policy/ratio"] for each in passes] == [1] * 4


# --- targets ----------------------------------------------------------------------------------------------------------


@quick("alignprop", "dance-grpo", of=UNLIKE)
def test_the_weights_of_an_automatic_target_reach_the_method(variant, run):
    folder = run(variant, "algorithm.target=auto", "algorithm.target_reach=1.35", steps=1)
    target = json.loads((folder / "checkpoints/step-000001/state.json").read_text())["target"]
    seen = seen_by(folder)
    expected = ((target["value"] - seen["gaps"]) / (target["value"] - target["base"])).clamp(-1, 1)
    assert len(set(expected.tolist())) > 1
    for each in seen["passes"]:
        torch.testing.assert_close(each["weights"], expected)


@quick("alignprop", of=("refl", "draft", "alignprop", "direct-align"))
def test_captions_reach_a_method_whose_target_is_held_once_they_are_lost(variant, run):
    """A rate that spoils pictures at once: some steps later so much is lost that it is no chance."""
    settings = ["algorithm.target=auto", "algorithm.at_target=hold", "optimizer.lr=1e-3", "algorithm.pairs=1"]
    folder = run(variant, *settings, steps=6)
    target = json.loads((folder / "checkpoints/step-000005/state.json").read_text())["target"]
    first, *_, last = seen_by(folder)["passes"]
    assert first["captions"] is None, "nothing is lost before the first update"
    captions = target["captions"]
    (low, margin), (high, asked) = captions["base"], captions["asked"]
    expected = margin + min(max((target["mean_gap"] - low) / (high - low), 0), 1) * (asked - margin)
    missing = expected - captions["error"] / 3 - captions["mean"]
    assert last["captions"].weight == pytest.approx(min(missing / (0.1 * margin), 1))
    assert last["captions"].weight > 0
    for texts in zip(last["prompts"], *last["captions"].wrong, strict=True):
        assert len(set(texts)) == 1 + 3


# --- LoRA and memory plans --------------------------------------------------------------------------------------------


@quick("alignprop", "flow-grpo")
def test_a_lora_trains_by_every_method_and_a_policy_can_be_held_to_the_model_beneath(variant, run):
    policy = "grpo" in variant
    held = ["algorithm.grpo.kl=0.1"] if policy else []
    folder = run(variant, "train.mode=lora", "lora.rank=4", *held)
    first, second = (weights(folder, step, LORA) for step in (1, 2))
    assert all("lora_A" in name or "lora_B" in name for name in first)
    moved = [name for name in first if not torch.equal(first[name], second[name])]
    assert len(moved) == len(first)
    if policy:
        passes = seen_by(folder)["passes"]
        assert passes[0]["policy/kl"] == 0 and all(each["policy/kl"] > 0 for each in passes[1:])
        forwards, gradient_passes, *rest = COUNTS[variant]
        told = (forwards + gradient_passes, gradient_passes, *rest)  # the model beneath is asked at each of them
        assert tuple(ledger(folder).values()) == (*told, 2 * 2)


@pytest.mark.slow
def test_blocks_that_are_recomputed_after_the_model_beneath_was_asked_have_their_lora(run):
    held = ("train.mode=lora", "lora.rank=4", "algorithm.grpo.kl=0.1")
    recomputed, kept = run("flow-grpo", *held, "memory.transformer_checkpointing=true"), run("flow-grpo", *held)
    assert_close(weights(recomputed, name=LORA), weights(kept, name=LORA), mean=1e-9)


@quick("alignprop")
def test_weights_in_halves_train_and_what_streams_is_what_stays(variant, run, read_metrics, assert_same):
    moments = "memory.adam=bfloat16"
    resident = run(variant, "memory.plan=resident", moments)
    assert_same(run(variant, "memory.plan=streamed", moments), resident, step=2)
    for halves, whole in zip(read_metrics(resident), read_metrics(run(variant)), strict=True):
        assert halves["grad_norm"] > 0
        assert halves["reward"] == pytest.approx(whole["reward"], abs=0.05)


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def two_ranks(processes):
    """Runs some ranks of one run to its end."""

    def start(*arguments, size=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
        ranks = [
            processes.start(*arguments, before="", RANK=str(rank), LOCAL_RANK=str(rank), **where)
            for rank in range(size)
        ]
        codes = [rank.wait() for rank in ranks]
        assert codes == [0] * size, "".join(rank.stderr.read_text() for rank in ranks)

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "pairs"),
    [
        ("refl", []),
        ("refl", ["memory.plan=sharded"]),
        ("draft", []),
        ("draft", ["memory.plan=sharded"]),
        ("draft", ["memory.plan=sharded", "memory.shard=1", "memory.transformer_checkpointing=true"]),
        ("alignprop", []),
        ("alignprop", ["memory.plan=sharded"]),  # its ranks draw which steps they keep
        ("dance-grpo", []),
        ("dance-grpo", ["memory.plan=sharded", "memory.batch_branches=false"]),
        ("flow-grpo", ["train.mode=lora", "lora.rank=4", "algorithm.grpo.kl=0.1"]),
    ],
)
def test_two_ranks_train_as_one_process_with_the_same_global_batch(
    variant, pairs, run, two_ranks, tmp_path, read_metrics
):
    batch = 2 if "grpo" in variant else 1
    two_ranks(*command(variant, tmp_path / "two", *pairs, f"train.batch_size={batch}"))
    alone = run(variant, *[pair for pair in pairs if not pair.startswith("memory")])
    name = LORA if "train.mode=lora" in pairs else FULL
    assert_close(weights(tmp_path / "two", name=name), weights(alone, name=name))
    for two, one in zip(read_metrics(tmp_path / "two"), read_metrics(alone), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=2e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    if variant != "alignprop":
        assert ledger(tmp_path / "two") == ledger(alone)


@pytest.mark.slow
def test_alignprop_counts_the_calls_of_all_ranks(run, two_ranks, tmp_path):
    two_ranks(*command("alignprop", tmp_path / "two", "train.batch_size=1"))
    alone = run("alignprop", "memory.micro_batch=1")
    assert ledger(tmp_path / "two") == ledger(alone)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["replicated", "sharded"])
def test_a_group_may_lie_across_ranks_and_one_have_more_of_it_than_another(plan, run, two_ranks, tmp_path):
    groups = ["algorithm.grpo.group=4"]
    half = shutil.copytree(run("dance-grpo", *groups, f"memory.plan={plan}", *ALONE), tmp_path / "half")
    shutil.rmtree(half / "checkpoints/step-000002")
    two_ranks("train", "--resume", half, "--steps", 2, size=3)
    assert_close(weights(half), weights(run("dance-grpo", *groups)))


# --- what cannot be, and what it would be -----------------------------------------------------------------------------

JUDGE = """import torch
from srpo_cli.rewards.plugins import reward
@reward(unit="", reads_text={}, differentiable=False)
def load(images, prompts):
    return torch.tensor([image.std().item() for image in images])
"""


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Writes a reward without a gradient, trusted."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("srpo_cli.trust._this_process", set())

    def write(reads_text):
        (tmp_path / "judge.py").write_text(JUDGE.format(reads_text))
        return ["--reward", tmp_path / "judge.py", "--trust", "--quiet"]

    return write


def test_a_policy_method_trains_on_a_judge_without_gradient_or_text(judge, srpo, tmp_path, read_metrics):
    outcome = srpo(*command("dance-grpo", tmp_path / "run", steps=1), *judge(reads_text=False))
    assert outcome.exit_code == 0, outcome.stderr
    (record,) = read_metrics(tmp_path / "run")
    assert record["grad_norm"] > 0 and record["sgp_gap"] == 0


@pytest.mark.parametrize(
    ("variant", "reads_text", "message"),
    [
        ("refl", True, "has no gradient"),
        ("direct-align", False, "has no gradient"),
        ("dance-grpo-relative", False, "reads no text, so control words cannot move it: add --set reward.pair=picture"),
    ],
)
def test_a_judge_that_a_method_cannot_learn_from_is_one_line(variant, reads_text, message, judge, srpo, tmp_path):
    outcome = srpo(*command(variant, tmp_path / "run", steps=1), *judge(reads_text))
    assert outcome.exit_code == 2
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dry_run_tells_what_a_step_costs_as_the_ledger_then_counts_it(variant, srpo, run, tmp_path):
    fixed = ["algorithm.alignprop.truncation=[1,1]"] if variant == "alignprop" else []
    outcome = srpo(*command(variant, tmp_path / "run", *fixed), "--dry-run", "--format", "json")
    assert outcome.exit_code == 0, outcome.stderr
    plan, counted = json.loads(outcome.stdout), ledger(run(variant, *fixed))
    assert plan["forwards_per_step"] == counted["forwards"] / 2
    assert plan["gradient_passes_per_step"] == counted["gradient_passes"] / 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_a_plan_for_flux(variant, srpo):
    outcome = srpo("train", "--preset", f"baselines:{variant}", "--model", "flux.1-dev", "--on", "h200", "--dry-run")
    assert outcome.exit_code == 0, outcome.stderr
    assert "memory plan: " in outcome.stdout and "DOES NOT FIT" not in outcome.stdout


@pytest.mark.parametrize(
    ("variant", "method"),
    [
        ("refl", "ReFL (arXiv:2304.05977), on the plain reward"),
        ("draft", "DRaFT-2 (arXiv:2309.17400), on the plain reward"),
        ("draft-lv", "DRaFT-LV (arXiv:2309.17400), on the plain reward"),
        ("alignprop", "AlignProp (arXiv:2310.03739), on the plain reward"),
        ("direct-align", "Direct-Align (arXiv:2509.06942), schedule sigma, on the plain reward"),
        (
            "direct-align-relative",
            "Direct-Align (arXiv:2509.06942), schedule sigma, on the semantic-relative reward (arXiv:2509.06942)",
        ),
        ("dance-grpo", "DanceGRPO (arXiv:2505.07818), on the plain reward"),
        (
            "dance-grpo-relative",
            "DanceGRPO (arXiv:2505.07818), on the semantic-relative reward (arXiv:2509.06942)",
        ),
        ("flow-grpo", "Flow-GRPO (arXiv:2505.05470), on the plain reward"),
    ],
)
def test_the_card_names_the_method_and_its_paper_and_no_other(variant, method):
    config = load_train_config(f"baselines:{variant}").config
    card = model_card(
        config=config,
        base=Base.of(config.model.name),
        result={"format": "full", "output": "out", "step": 1, "weights": "raw", "dtype": "float32"},
        commands=[],
        environment={"packages": {}},
        summary=None,
    )
    assert f"| method | {method} |" in card
    assert f"aligned by {method.split(' (')[0]}\n" in card
    assert f"- {config.algorithm.name}\n" in card
    assert "SRPO" not in card.replace(config.description, "")
    assert ("Realistic photo" in card) == config.algorithm.relative
