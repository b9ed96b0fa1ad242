"""Memory plans as arithmetic: what fits where, what it needs to the byte, and what would help. No torch."""

import re
from dataclasses import replace

import pytest

from srpo_cli.config.load import load_train_config
from srpo_cli.config.schema import TrainConfig
from srpo_cli.errors import UsageError
from srpo_cli.runtime.doctor import Device
from srpo_cli.runtime.plan import (
    GIB,
    GPUS,
    Counts,
    Machine,
    Work,
    choose,
    host_memory,
    known_machine,
    out_of_memory,
    settle,
    this_machine,
)

P = 11_901_408_320
FLUX_720 = Counts(  # FLUX.1-dev with HPSv2 at 720 x 720, as tests/recipes/test_plan.py counts them
    parameters=P,
    modulation=3_227_516_928,
    linears=8_606_711_808,
    block=339_831_296,
    matrix=56_623_104,
    lora=0,
    transformer=Work(37.28e12, 111.83e12, 149.10e12, 23_490_633_800, 933_475_784, 455_518_384, 77_936_640),
    decoder=Work(5.04e12, 10.21e12, 15.25e12, 5_897_613_840, 846_288_128, 2_786_919_168, 265_420_800),
    reward=Work(0.335e12, 0.68e12, 0.68e12, 389_662_224, 389_662_224, 0, 4_227_136),
    decoder_parameters=83_819_683,
    reward_parameters=632_076_800,
    encoder_parameters=4_885_371_136,
    prompt=4_195_840,
)
LORA_720 = replace(
    FLUX_720,
    lora=65_372_160,
    transformer=replace(FLUX_720.transformer, both=82e12, recomputed=119e12, saved=17_700_000_000),
)
REALISM = load_train_config("realism").config


def realism(**changes: object) -> TrainConfig:
    """The realism preset for FLUX.1-dev with some values changed, written ``section__key``."""
    values = REALISM.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    return TrainConfig.model_validate(values)


def method(name: str, **changes: object) -> TrainConfig:
    """The realism preset with another method, and some values changed."""
    return realism(algorithm__name=name, algorithm__schedule="sigma", rollout__guidance=3.5, **changes)


def recount(config: TrainConfig) -> Counts:
    return LORA_720 if config.train.mode == "lora" else FLUX_720


def plan(config: TrainConfig, gpu: str, gpus: int = 1, nodes: int = 1, **machine: object):
    where = replace(known_machine(gpu, gpus, nodes), **machine)
    return choose(recount(config), config, where, recount=recount)


@pytest.mark.parametrize(
    ("gpu", "gpus", "kind"),
    [
        ("h100", 1, "streamed"),
        ("h100", 2, "streamed"),
        ("h100", 4, "sharded"),
        ("h100", 8, "sharded"),
        ("a100-80", 8, "sharded"),
        ("h200", 1, "resident"),
        ("b200", 1, "resident"),
    ],
)
def test_each_machine_gets_the_plan_that_fits_it(gpu, gpus, kind):
    chosen = plan(realism(), gpu, gpus)
    assert (chosen.name, chosen.fits, chosen.advice) == (kind, True, ())
    assert chosen.total_gib <= 0.95 * GPUS[gpu].memory


def test_full_parameters_fit_one_h100_in_62_gib():
    chosen = plan(realism(), "h100")
    assert chosen.settings.gradients == "bfloat16"
    assert chosen.settings.batch_branches
    assert chosen.total_gib <= 62
    assert plan(realism(train__batch_size=32), "h100").total_gib <= 62


def test_eight_h100_share_the_model_in_58_gib():
    assert plan(realism(), "h100", 8).total_gib <= 58


@pytest.mark.parametrize(("base", "gib"), [("nf4", 20), ("float8", 20)])
def test_a_lora_fits_a_24_gb_card(base, gib):
    chosen = plan(realism(train__mode="lora", lora__base=base), "rtx-4090")
    assert (chosen.name, chosen.fits) == ("replicated+lora", True)
    assert chosen.total_gib <= gib


def test_streamed_state_by_hand():
    chosen = plan(realism(memory__plan="streamed", memory__adam="bfloat16", memory__gradients="float32"), "h100")
    assert chosen.memory_gib["weights"] == pytest.approx(2 * P / GIB)
    assert chosen.memory_gib["gradients"] == pytest.approx(4 * P / GIB)
    assert chosen.memory_gib["master"] == chosen.memory_gib["optimizer"] == 0
    low, moments, process = 2 * P, 4 * P, 4e9
    assert chosen.host_gib == pytest.approx((low + moments + process) / GIB)


def test_resident_state_by_hand():
    chosen = plan(realism(memory__plan="resident", memory__adam="8bit"), "b200")
    assert chosen.memory_gib["master"] == pytest.approx(2 * P / GIB)
    assert chosen.memory_gib["optimizer"] == pytest.approx(2 * (1 + 4 / 256) * P / GIB)


def test_sharded_state_by_hand():
    chosen = plan(realism(memory__transformer_checkpointing=True), "h100", 8)
    assert chosen.memory_gib["weights"] == pytest.approx(2 * P / GIB)
    assert chosen.memory_gib["master"] == pytest.approx(4 * P / 8 / GIB)
    assert chosen.memory_gib["optimizer"] == pytest.approx(8 * P / 8 / GIB)
    gathered = 8 * P  # the moments, where rank 0 writes them
    assert chosen.host_gib == pytest.approx((8 * 4e9 + gathered) / GIB)


def test_averages_and_what_is_put_aside_for_them_by_hand():
    streamed = realism(memory__plan="streamed", memory__adam="8bit")
    with_average = plan(realism(memory__plan="streamed", memory__adam="8bit", train__ema=0.999), "h100")
    assert with_average.host_gib - plan(streamed, "h100").host_gib == pytest.approx(4 * P / GIB)
    assert with_average.fits and with_average.memory_gib["average"] == 0  # put aside where the gradients were
    little = {"memory__transformer_checkpointing": True, "memory__vae_checkpointing": True}
    for kind, gpus, average in (("streamed", 1, 2 * P), ("resident", 1, (4 + 2) * P), ("sharded", 8, (4 + 4) * P / 8)):
        # Without a copy of the weights in float8 there is always a larger stage.
        config = realism(train__ema=0.999, memory__plan=kind, rollout__dtype="float8", **little)
        chosen = plan(config, "h200", gpus)
        assert (chosen.stage, chosen.memory_gib["gradients"]) == ("measuring", 0)
        assert chosen.memory_gib["average"] == pytest.approx(average / GIB)


def test_copies_are_shared_within_a_node_and_the_host_pays_for_all_its_processes():
    assert plan(realism(), "h100", 8, nodes=2).settings.shard == 8
    one, two = plan(realism(), "h100"), plan(realism(), "h100", 2)
    assert two.host_gib == pytest.approx(2 * one.host_gib)


def test_the_peak_is_a_stage_and_not_the_sum_of_stages():
    everything = realism(
        memory__plan="streamed",
        memory__gradients="bfloat16",
        memory__transformer_checkpointing=True,
        memory__vae_checkpointing=True,
        memory__batch_branches=True,
    )
    chosen = plan(everything, "h100")
    decode = 2 * (846_288_128 + 2_786_919_168) / GIB  # while the gradients of a single pass do not exist yet
    assert chosen.stage in ("backward", "update")
    assert chosen.memory_gib["decoder"] < decode


def test_sums_of_gradients_are_kept_through_the_decoding_of_a_second_pass():
    one_by_one = realism(memory__plan="streamed", memory__batch_branches=False, memory__vae_checkpointing=False)
    chosen = plan(one_by_one, "h100")
    assert chosen.stage == "judging"
    assert chosen.memory_gib["gradients"] == pytest.approx(2 * P / GIB)


def test_work_of_a_step_by_hand():
    chosen = plan(realism(memory__transformer_checkpointing=True, memory__vae_checkpointing=False), "h100")
    assert (chosen.forwards_per_step, chosen.gradient_passes_per_step) == (25, 2)
    rollout, judged = 25 * 37.28e12, 5.04e12 + 0.335e12
    assert chosen.flops_per_step == pytest.approx(rollout + judged + 2 * (149.10e12 + 10.21e12 + 0.68e12))
    assert chosen.flops_per_step == pytest.approx(1252e12, rel=0.01)  # without the judging of the rollout itself


def grpo(**changes: object) -> TrainConfig:
    """DanceGRPO with its published settings on FLUX."""
    return method("dance-grpo", rollout__steps=16, train__batch_size=12, **{"algorithm__pairs": 4, **changes})


@pytest.mark.parametrize(
    ("config", "forwards", "calls", "judged"),
    [
        (method("direct-align"), 25, 1, 1),
        (method("direct-align", algorithm__pairs=3), 25, 3, 3),
        (method("refl"), 25, 1, 1),
        (method("draft", algorithm__draft={"last_steps": 4}), 25, 4, 1),
        (method("draft", algorithm__draft={"noises": 2}), 25, 2, 2),
        (method("draft", algorithm__draft={"noises": 2, "include_last": True}, algorithm__pairs=2), 25, 6, 6),
        (method("alignprop", algorithm__alignprop={"truncation": [0, 0]}), 25, 25, 1),
        (method("alignprop", algorithm__alignprop={"truncation": [24, 24]}), 25, 1, 1),
        # Lots of 3, 2, 2, 2 steps: those of the last three are remembered.
        (grpo(), 12 * (16 + 6), 12 * 9, 0),
        (grpo(train__mode="lora", algorithm__grpo={"kl": 0.1}), 12 * (16 + 6 + 9), 12 * 9, 0),
    ],
)
def test_work_of_a_step_by_every_method_by_hand(config, forwards, calls, judged):
    fixed = {"memory__transformer_checkpointing": True, "memory__vae_checkpointing": False}
    values = config.model_dump()
    values["memory"] |= {key.partition("__")[2]: value for key, value in fixed.items()}
    chosen, counts = plan(TrainConfig.model_validate(values), "b200"), recount(config)
    assert (chosen.forwards_per_step, chosen.gradient_passes_per_step) == (forwards, calls)
    measured = config.train.batch_size * (5.04e12 + 0.335e12)
    expected = forwards * 37.28e12 + measured + calls * counts.transformer.recomputed + judged * (10.21e12 + 0.68e12)
    assert chosen.flops_per_step == pytest.approx(expected)


def test_alignprop_is_expected_to_call_the_model_where_any_sample_of_a_pass_keeps_its_velocity():
    config = method("alignprop", rollout__steps=4, train__batch_size=4, memory__micro_batch=2)
    # Step i keeps its gradient with probability (i + 1) / 5, and the last is called in any case.
    expected = 4 * sum(1 - (1 - chance) ** 2 for chance in (1 / 5, 2 / 5, 3 / 5)) + 4
    assert plan(config, "b200").gradient_passes_per_step == pytest.approx(expected)


LORA_HELD = {"train__mode": "lora", "memory__transformer_checkpointing": True, "memory__micro_batch": 1}


def test_a_graph_of_several_calls_is_held_whole_until_the_picture_is_judged():
    held = {
        steps: plan(method("draft", algorithm__draft={"last_steps": steps}, **LORA_HELD), "b200").memory_gib
        for steps in (1, 4)
    }
    stash = LORA_720.transformer.stash / GIB
    assert held[4]["activations"] - held[1]["activations"] == pytest.approx(3 * stash)
    whole = plan(method("alignprop", **LORA_HELD), "b200").memory_gib
    assert whole["activations"] == pytest.approx(25 * stash)
    late = plan(method("alignprop", algorithm__alignprop={"truncation": [5, 20]}, **LORA_HELD), "b200").memory_gib
    assert late["activations"] == pytest.approx(20 * stash)


def test_several_noises_in_one_pass_and_not_the_branches_that_only_srpo_has():
    three = {"noises": 2, "include_last": True}
    together, apart, single = (
        plan(method("draft", algorithm__draft=draft, memory__batch_branches=batched, **LORA_HELD), "b200").memory_gib
        for draft, batched in ((three, True), (three, False), ({}, True))
    )
    stash = LORA_720.transformer.stash / GIB
    assert apart["activations"] == pytest.approx(single["activations"])
    assert together["activations"] == pytest.approx(3 * stash)
    assert single["activations"] == pytest.approx(stash)


def test_a_policy_keeps_no_graph_of_decoder_and_reward():
    config = grpo(memory__batch_branches=False, **LORA_HELD)
    chosen = plan(config, "b200")
    assert chosen.stage == "backward"
    assert chosen.memory_gib["decoder"] == pytest.approx(2 * FLUX_720.decoder_parameters / GIB)
    assert chosen.memory_gib["reward"] == pytest.approx(2 * FLUX_720.reward_parameters / GIB)
    work = FLUX_720.transformer
    assert chosen.memory_gib["activations"] == pytest.approx((work.stash + work.block + 2 * work.widest) / GIB)
    lot = plan(grpo(memory__batch_branches=True, **LORA_HELD), "b200").memory_gib["activations"]
    assert lot == pytest.approx(3 * chosen.memory_gib["activations"])


SEVERAL_CALLS = [method("draft", algorithm__draft={"last_steps": 2}), method("alignprop")]


@pytest.mark.parametrize("config", [method("draft"), method("refl"), grpo(), *SEVERAL_CALLS])
def test_every_method_is_sharded_where_several_processes_train_it(config):
    assert plan(config, "h100", 8).name == "sharded"


def test_replayed_rollouts_and_given_pictures_cost_no_forwards():
    assert plan(realism(rollout__replay=4), "h100").forwards_per_step == 5
    pictures = realism(rollout__source="pictures", rollout__pictures="pictures.csv")
    assert plan(pictures, "h100").forwards_per_step == 0
    assert plan(pictures, "h100").flops_per_step < 0.30 * plan(realism(), "h100").flops_per_step


def test_seconds_are_estimated_for_every_gpu_that_holds_the_plan():
    chosen = plan(realism(), "h100")
    assert {"h100", "h200", "a100-80"} <= chosen.seconds_per_step.keys()
    assert "rtx-4090" not in chosen.seconds_per_step
    assert 2.4 <= chosen.seconds_per_step["h100"] <= 4.2  # 2.4 s is excellent, 4.2 s is eager


def test_checkpoints_on_disk_by_hand():
    chosen = plan(realism(memory__plan="streamed", memory__adam="bfloat16", checkpoint__keep=2), "h100")
    prompts = 20 + 32  # of 20 steps, and held out
    kept_and_written = 2 + 1 + 1  # the oldest goes when the newest is whole, and the best one stays
    assert chosen.disk_gib == pytest.approx((kept_and_written * (4 + 2 + 4) * P + prompts * 4_195_840) / GIB)


def test_without_a_guard_no_best_checkpoint_is_kept():
    watched, alone = (plan(realism(guard__action=action), "h100").disk_gib for action in ("warn", "off"))
    assert watched > alone


def test_a_group_has_one_prompt_to_keep():
    chosen = plan(grpo(train__mode="lora", prompts__limit=None), "h200")
    checkpoints = (2 + 1 + 1) * (4 + 8) * LORA_720.lora
    assert chosen.disk_gib == pytest.approx((checkpoints + (20 + 32) * 4_195_840) / GIB)


@pytest.mark.parametrize(
    "fixed",
    [
        {"adam": "float32"},
        {"gradients": "float32"},
        {"batch_branches": False},
        {"transformer_checkpointing": False},
        {"vae_checkpointing": True},
        {"micro_batch": 1},
    ],
)
def test_what_the_user_fixed_is_obeyed(fixed):
    config = realism(train__batch_size=2, **{f"memory__{key}": value for key, value in fixed.items()})
    settings = plan(config, "b200").settings
    assert {key: getattr(settings, key) for key in fixed} == fixed


def test_eight_bit_moments_are_not_chosen_where_their_library_is_missing():
    assert plan(realism(), "h100").settings.adam == "8bit"
    assert plan(realism(), "h100", eight_bit=False).settings.adam == "bfloat16"


def test_one_pass_needs_no_wider_sum_and_several_get_one_where_there_is_room():
    assert plan(realism(), "b200").settings.gradients == "bfloat16"
    several = realism(train__batch_size=4, memory__micro_batch=1)
    assert plan(several, "b200").settings.gradients == "float32"
    assert plan(several, "h100").settings.gradients == "bfloat16"


def test_where_nothing_fits_three_settings_would_make_it_fit():
    chosen = plan(realism(), "rtx-4090")
    assert not chosen.fits
    assert chosen.why.startswith("nothing fits: the closest plan needs")
    assert len(chosen.advice) == 3
    for advice in chosen.advice:
        assert advice.fits
        changes = dict(re.findall(r"--set (\w+\.\w+)=(\S+)", advice.settings))
        changed = realism(train__mode="lora", lora__base=changes["lora.base"])
        if "model.size" not in changes:
            assert plan(changed, "rtx-4090").total_gib == pytest.approx(advice.total_gib, abs=0.06)


def test_more_gpus_are_advised_where_they_would_do():
    config = realism(memory__plan="sharded")
    advice = plan(config, "h100").advice
    assert any(one.settings == "--gpus 4" and one.fits for one in advice)
    assert plan(config, "h100", 4).fits


def test_a_host_that_is_too_small_is_named():
    chosen = plan(realism(memory__plan="streamed"), "h100", host_memory=32 * GIB)
    assert not chosen.fits
    assert "of host memory" in chosen.why


def test_running_out_of_memory_ends_with_what_needs_less():
    config = realism()
    line = out_of_memory(plan(config, "h100"), config)
    assert "\n" not in line
    assert re.match(r"out of memory in plan streamed, which was to need \d\d\.\d of 79\.0 GiB: try --set ", line)


def test_a_cpu_needs_no_counting():
    def must_not_be_called() -> Counts:
        raise AssertionError

    config = load_train_config("realism", miniature=True).config
    settings = settle(config, this_machine([], 2), must_not_be_called).settings
    assert settings.plan == "replicated"
    assert settings.batch_branches
    assert settings.micro_batch == config.train.batch_size == 8
    assert not settings.transformer_checkpointing and not settings.vae_checkpointing
    line = out_of_memory(settle(config, this_machine([]), must_not_be_called), config)
    assert line.startswith("out of memory in plan replicated: try --set train.batch_size=4")


def test_a_small_model_is_replicated_on_an_accelerator_too():
    work = Work(1e9, 3e9, 4e9, 5_000_000, 500_000, 1_000_000, 300_000)
    small = replace(FLUX_720, parameters=2_000_000, transformer=work, decoder=work, reward=work)
    config = load_train_config("realism", miniature=True).config
    chosen = choose(small, config, known_machine("h100"))
    assert (chosen.name, chosen.settings.micro_batch) == ("replicated", 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory__plan": "streamed", "train__mode": "lora"}, "memory.plan is streamed and train.mode is lora"),
        ({"memory__plan": "resident", "model__dtype": "float32"}, "model.dtype is float32"),
        ({"memory__shard": 3}, "memory.shard is 3, and the run has 8 process(es)"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(changes, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        plan(realism(**changes), "h100", 8)


def test_this_machine_is_known_by_its_devices_name():
    machine = this_machine([Device("cuda:0", "NVIDIA H100 80GB HBM3", 79 * GIB)] * 8, 8)
    assert (machine.gpus, machine.ranks, machine.gpu_memory) == (8, 8, 79 * GIB)
    assert machine.known is GPUS["h100"]
    assert this_machine([Device("cuda:0", "NVIDIA GeForce RTX 4090", 24 * GIB)]).known is GPUS["rtx-4090"]
    assert Machine("Some other GPU", GIB, GIB).known is None


@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_container_has_the_memory_that_it_is_limited_to(tmp_path, file):
    limit = tmp_path / file
    limit.parent.mkdir(exist_ok=True)
    physical = host_memory(tmp_path)
    assert physical > 2**20
    for text, expected in (("1048576\n", 2**20), ("max\n", physical), ("9223372036854771712\n", physical)):
        limit.write_text(text)
        assert host_memory(tmp_path) == expected
    limit.unlink()
    limit.mkdir()  # cannot be read
    assert host_memory(tmp_path) == physical


def test_an_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"Unknown GPU 'h101'. Did you mean 'h100'\?"):
        known_machine("h101")


def test_the_same_question_has_the_same_answer():
    assert plan(realism(), "l40s") == plan(realism(), "l40s")
