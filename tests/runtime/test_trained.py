"""However weights are held, passes compute the same, clipping is exact, and a step leaves no gradient behind."""

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel

from srpo_cli.runtime.distributed import Ranks
from srpo_cli.runtime.split_adamw import SplitAdamW
from srpo_cli.runtime.trained import Halves, Shards, Trained, make_mesh, shard

SHAPE = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
CPU = torch.device("cpu")


@pytest.fixture
def one_rank(tmp_path):
    """A process group of one, in which FSDP2 does all that it does among several."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Ranks()
    dist.destroy_process_group()


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return FluxTransformer2DModel(**SHAPE)


def inputs(dtype):
    draw = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 16, 16, generator=draw).to(dtype),
        "timestep": torch.tensor([0.9, 0.4], dtype=dtype),
        "guidance": torch.full((2,), 3.5),
        "pooled_projections": torch.randn(2, 32, generator=draw).to(dtype),
        "encoder_hidden_states": torch.randn(2, 12, 24, generator=draw).to(dtype),
        "txt_ids": torch.zeros(12, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)) * 20,
        "return_dict": False,
    }


def sharded(transformer, ranks, dtype):
    with init_empty_weights():
        empty = FluxTransformer2DModel(**SHAPE)
    blocks = [*empty.transformer_blocks, *empty.single_transformer_blocks]
    shard(empty, blocks, make_mesh(ranks, 1), dtype, dict(transformer.named_parameters()), CPU)
    parameters = dict(empty.named_parameters())
    return empty, Shards(empty, parameters, torch.optim.AdamW(parameters.values(), 1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_weights_compute_what_whole_ones_compute(dtype, one_rank, transformer):
    empty, held = sharded(transformer, one_rank, None if dtype == torch.float32 else dtype)
    whole = copy.deepcopy(transformer).to(dtype)
    with torch.no_grad():
        assert torch.equal(empty(**inputs(dtype))[0], whole(**inputs(dtype))[0])
    held.accumulate(last=True)
    for model in (empty, whole):
        output = model(**inputs(dtype))[0]
        output.float().square().mean().backward()
    mine = torch.cat([held.whole(parameter.grad).flatten() for parameter in held.parameters])
    theirs = torch.cat([parameter.grad.float().flatten() for parameter in whole.parameters()])
    assert (mine - theirs).norm() < (1e-6 if dtype == torch.float32 else 2**-8) * theirs.norm()
    assert all(parameter.dtype == torch.float32 for parameter in held.parameters)


def test_a_shard_that_is_not_kept_is_given_all_the_same_and_goes_nowhere(one_rank, transformer):
    empty, held = sharded(transformer, one_rank, None)
    empty(**inputs(torch.float32))[0].square().mean().backward()
    held.step(1e-3)
    kept, given = held.optimizer_state(), held.optimizer_state(keep=False)
    assert kept["state"].keys() == given["state"].keys()
    for index, own in given["state"].items():
        assert own["exp_avg"] is None and own["exp_avg_sq"] is None
        assert type(kept["state"][index]["exp_avg"]) is torch.Tensor


@pytest.mark.parametrize("limit", [0.1, 1e6, None])
def test_clipping_returns_the_norm_of_before_and_leaves_at_most_the_limit(limit):
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8)
    layer(torch.randn(4, 8)).square().sum().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in layer.parameters()])
    held = Trained(dict(layer.named_parameters()), torch.optim.AdamW(layer.parameters()))
    torch.testing.assert_close(held.clip(limit), gradients.norm())
    after = torch.cat([parameter.grad.flatten() for parameter in layer.parameters()]).norm()
    expected = min(gradients.norm().item(), limit or float("inf"))
    assert after.item() == pytest.approx(expected, rel=1e-5)


def moved(gradients, passes):
    """Where 20 steps take weights whose gradients come in some passes, summed in this dtype."""
    torch.manual_seed(0)
    start = 0.03 * torch.randn(64, 64)
    weight = torch.nn.Parameter(start.bfloat16())
    optimizer = SplitAdamW([weight], 5e-6, weight_decay=0.0, masters=[start], gradients=gradients)
    held = Halves({"weight": weight}, optimizer)
    draw = torch.Generator().manual_seed(1)
    target = 0.03 * torch.randn(64, 64, generator=draw)
    for _ in range(20):
        for _ in range(passes):
            x = torch.randn(16, 64, generator=draw).bfloat16()
            ((x @ weight - x @ target.bfloat16()).float().square().mean() / passes).backward()
        held.clip(0.1)
        held.step(5e-6)
    return held.master(weight) - start


def test_sums_of_many_passes_in_bfloat16_change_the_update_little():
    exact, rounded = moved(torch.float32, passes=32), moved(torch.bfloat16, passes=32)
    cosine = torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0).item()
    assert 0.9999 < cosine < 1 - 1e-7, cosine
