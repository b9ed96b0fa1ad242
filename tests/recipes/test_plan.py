"""Counts on the meta device are those of the published table, and the plan of a real run costs no counting."""

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from srpo_cli.config.load import load_train_config
from srpo_cli.config.schema import TrainConfig
from srpo_cli.errors import MissingError, UsageError
from srpo_cli.miniature import WEIGHTS
from srpo_cli.recipes import plan as planning
from srpo_cli.recipes.plan import check_fits, count, part_config, plan_for, plan_run
from srpo_cli.registry import MINIATURE_REWARDS
from srpo_cli.runtime.plan import Counts, known_machine, this_machine

REALISM = load_train_config("realism").config
MINIATURE = load_train_config("realism", miniature=True).config


def changed(config: TrainConfig = REALISM, **changes: object) -> TrainConfig:
    """A configuration with some values changed, written ``section__key``."""
    values = config.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    return TrainConfig.model_validate(values)


@pytest.fixture(scope="module", autouse=True)
def published(tmp_path_factory):
    """Count what was published, not what this machine's Hub cache may hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture(scope="module")
def counted() -> Callable[[int], Counts]:
    sizes: dict[int, Counts] = {}

    def at(edge: int) -> Counts:
        if edge not in sizes:
            sizes[edge] = count(changed(model__size=[edge, edge]))
        return sizes[edge]

    return at


# edge: transformer forward and recomputed TFLOP, stash GB; decoder forward and both TFLOP, stash and block GB
TABLE = {
    512: (21.5, 86.0, 0.56, 2.5, 5.1, 0.43, 1.4),
    720: (37.3, 149.1, 0.93, 5.0, 10.2, 0.85, 2.8),
    1024: (74.4, 297.5, 1.70, 10.5, 21.5, 1.7, 5.6),
}


@pytest.mark.parametrize("edge", TABLE)
def test_counts_of_flux_are_those_of_the_table(counted, edge):
    transformer, decoder = counted(edge).transformer, counted(edge).decoder
    found = (transformer.forward, transformer.recomputed, decoder.forward, decoder.both)
    stash = (transformer.stash, decoder.stash, decoder.block)
    forward, recomputed, kept, decode, decode_both, decode_kept, block = TABLE[edge]
    assert [flops / 1e12 for flops in found] == pytest.approx([forward, recomputed, decode, decode_both], rel=0.015)
    assert [size / 1e9 for size in stash] == pytest.approx([kept, decode_kept, block], rel=0.015)


def test_parameters_of_flux_are_the_published_ones(counted):
    counts = counted(720)
    assert counts.parameters == 11_901_408_320
    assert counts.modulation == pytest.approx(3.25e9, rel=0.01)
    assert counts.block == 339_831_296  # a double block
    assert counts.encoder_parameters == 4_762_310_656 + 123_060_480  # T5 XXL's encoder, CLIP-L's text tower
    assert counts.prompt == 2 * (512 * 4096 + 768)
    assert counts.uncounted == ""


def test_a_reward_is_counted_by_its_tower(counted):
    assert counted(720).reward_parameters == 632_076_800  # ViT-H/14
    reward = counted(720).reward
    assert reward.forward / 1e12 == pytest.approx(0.34, abs=0.01)
    assert reward.both / 1e12 == pytest.approx(0.67, abs=0.02)


def test_recomputing_the_decoder_keeps_a_seventh(counted):
    decoder = counted(720).decoder
    assert decoder.stash / decoder.saved <= 0.15


def test_attention_is_kept_as_fused_kernels_keep_it(counted):
    """Inputs, output and a number per query are linear in the tokens; scores would be quadratic."""
    small, large = counted(512).transformer, counted(1024).transformer
    assert large.saved / small.saved == pytest.approx(4608 / 1536, rel=0.01)
    assert large.forward / small.forward > 4608 / 1536


def test_a_lora_is_counted_with_what_it_keeps():
    lora = count(changed(train__mode="lora"))
    assert lora.lora == pytest.approx(65.4e6, rel=0.01)
    assert lora.transformer.forward == pytest.approx(37.3e12, rel=0.02)
    assert lora.transformer.both < 0.75 * 111.8e12
    with pytest.raises(UsageError, match="nope"):
        count(changed(train__mode="lora", lora__targets=["nope"]))


def test_the_miniature_is_counted_from_its_own_folder():
    counts = count(MINIATURE, torch.float32)
    folder = WEIGHTS / "pipeline"
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder / "transformer"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    assert counts.parameters == sum(parameter.numel() for parameter in transformer.parameters())
    assert counts.decoder_parameters == sum(parameter.numel() for parameter in vae.parameters())
    assert counts == count(changed(MINIATURE, model__name=str(folder)), torch.float32)


def test_one_block_of_each_kind_multiplied_is_the_whole_miniature():
    _whole_is(count(MINIATURE, torch.float32), "miniature", grid=(6, 6), tokens=16, dtype=torch.float32)


@pytest.mark.slow
def test_one_block_of_each_kind_multiplied_is_the_whole_flux(counted):
    _whole_is(counted(720), "flux.1-dev", grid=(45, 45), tokens=512, dtype=torch.bfloat16)


def _whole_is(counts: Counts, name: str, grid: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    """All blocks at once are what was multiplied, and recomputing them for real costs what was added up."""
    with torch.device("meta"):
        whole = FluxTransformer2DModel.from_config(dict(part_config(name, "transformer"))).to(dtype)
    call = planning._call(whole, dtype, grid, tokens)
    blocks = [*whole.transformer_blocks, *whole.single_transformer_blocks]
    assert planning._measure(whole, call, blocks) == counts.transformer
    whole.enable_gradient_checkpointing()
    with FlopCounterMode(display=False) as flops:
        output = call()
        output.backward(torch.empty_like(output))
    assert flops.get_total_flops() == counts.transformer.recomputed


def test_a_model_whose_configuration_is_nowhere_says_what_to_fetch():
    with pytest.raises(MissingError, match=r"hf download someone/model --include"):
        count(changed(model__name="someone/model"))


def test_a_folder_without_a_configuration_says_which(tmp_path):
    with pytest.raises(MissingError, match=r"no tokenizer_2/tokenizer_config.json in"):
        count(changed(model__name=str(tmp_path)))


def test_a_size_that_the_model_cannot_make_is_refused():
    with pytest.raises(UsageError, match="multiples of 16"):
        count(changed(model__size=[728, 720]))


def test_a_reward_that_cannot_be_counted_is_said_to_be_missing_from_the_figures():
    counts = count(changed(MINIATURE, reward__name="imagereward"), torch.float32)
    assert counts.uncounted == "reward imagereward, whose network is not a CLIP"


def test_the_miniatures_rewards_are_counted_alike():
    one, other = (count(changed(MINIATURE, reward__name=name), torch.float32) for name in MINIATURE_REWARDS)
    assert one == other and one.reward_parameters > 0 and not one.uncounted


@pytest.mark.slow
def test_mixed_rewards_are_counted_together():
    others = {"clip:ViT-B-32": {"weight": 0.5}, "imagereward": {}, "aesthetic-v2.5": {}}
    mixed, one = (
        count(changed(MINIATURE, **reward), torch.float32)
        for reward in ({"reward__others": others}, {"reward__name": "clip:ViT-B-32"})
    )
    own = count(MINIATURE, torch.float32)
    assert mixed.reward_parameters == own.reward_parameters + one.reward_parameters
    for what in ("forward", "both", "recomputed", "saved", "stash"):
        assert getattr(mixed.reward, what) == getattr(own.reward, what) + getattr(one.reward, what) > 0
    assert mixed.reward.widest == max(own.reward.widest, one.reward.widest)
    assert mixed.uncounted == (
        "reward aesthetic-v2.5, whose network is not a CLIP, and reward imagereward, whose network is not a CLIP"
    )


def test_a_run_on_a_cpu_counts_nothing(monkeypatch):
    monkeypatch.setattr(planning, "count", lambda *_: pytest.fail("counted"))
    settings = plan_run(MINIATURE, torch.device("cpu"), ranks_size=2, local_size=2).settings
    assert (settings.plan, settings.micro_batch, settings.batch_branches) == ("replicated", 8, True)
    sharded = changed(MINIATURE, memory__plan="sharded")
    assert plan_run(sharded, torch.device("cpu"), 2, 2).settings.shard == 2


def test_the_plan_that_is_shown_for_a_cpu_is_the_one_that_runs():
    shown = plan_for(MINIATURE, this_machine([]))
    assert shown.settings == plan_run(MINIATURE, torch.device("cpu")).settings
    assert shown.fits
    assert (shown.forwards_per_step, shown.gradient_passes_per_step) == (80, 32)


def test_the_targets_of_memory_come_out():
    full = plan_for(REALISM, known_machine("h100"))
    assert (full.name, full.total_gib <= 62) == ("streamed", True)
    eight = plan_for(REALISM, known_machine("h100", 8))
    assert (eight.name, eight.total_gib <= 58) == ("sharded", True)
    lora = plan_for(changed(train__mode="lora", lora__base="nf4"), known_machine("rtx-4090"))
    assert (lora.name, lora.total_gib <= 20) == ("replicated+lora", True)


@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused_with_three_ways_unless_its_plan_was_named():
    card = known_machine("rtx-4090")
    with pytest.raises(MissingError, match=r"nothing fits: the closest plan needs .* can be used: try --set ") as error:
        check_fits(plan_for(REALISM, card), REALISM)
    assert str(error.value).count(" GiB)") == 3
    assert "\n" not in str(error.value)
    named = changed(memory__plan="streamed")
    check_fits(plan_for(named, card), named)
    fitting = changed(train__mode="lora", lora__base="nf4")
    check_fits(plan_for(fitting, card), fitting)
