"""The average of weights: hand-worked numbers, float32 beside bfloat16 weights, and weights that come back exactly."""

import copy
import io

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from srpo_cli.runtime.average import WeightAverage
from srpo_cli.runtime.split_adamw import SplitAdamW


def parameter(*values, dtype=torch.float32):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def set_to(weight, *values):
    with torch.no_grad():
        weight.copy_(torch.tensor(values))


def test_the_average_by_hand():  # 1, then 0.75 * 1 + 0.25 * 3 = 1.5, then 0.75 * 1.5 + 0.25 * -1 = 0.875
    weight = parameter(1.0)
    average = WeightAverage([weight], 0.75)
    for value, expected in ((3.0, 1.5), (-1.0, 0.875)):
        set_to(weight, value)
        average.update()
        assert average.averages[0].item() == expected
    assert weight.item() == -1.0


def test_averages_of_bfloat16_weights_keep_what_bfloat16_would_round_away():
    weight = parameter(1.0, dtype=torch.bfloat16)
    average = WeightAverage([weight], 0.999)
    set_to(weight, 1.0 + 2**-7)  # one bfloat16 step
    average.update()
    assert average.averages[0].dtype == torch.float32
    assert average.averages[0].item() == pytest.approx(1 + 2**-7 / 1000, abs=1e-7)


def test_masters_are_averaged_where_the_weights_are_their_roundings():
    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    master = torch.tensor([1.0001, -2.0002, 3.0003])
    optimizer = SplitAdamW([weight], 1e-3, masters=[master])
    average = WeightAverage([weight], 0.5, optimizer.master)
    assert torch.equal(average.averages[0], master)
    weight.sum().backward()
    optimizer.step()
    average.update()
    torch.testing.assert_close(average.averages[0], (master + optimizer.master(weight)) / 2, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_averages_leave_no_trace(dtype):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(7, 5).to(dtype)), parameter(1.0, 2.0, dtype=dtype)]
    average = WeightAverage(weights, 0.9)
    set_to(weights[0], *torch.randn(7, 5).tolist())
    average.update()
    set_to(weights[1], -0.0, float("inf"))
    held = copy.deepcopy([weight.data for weight in weights])
    with pytest.raises(KeyError), average.applied():
        for weight, mean in zip(weights, average.averages, strict=True):
            assert torch.equal(weight, mean.to(dtype))
        raise KeyError
    for weight, before in zip(weights, held, strict=True):
        assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))
        assert weight.requires_grad


def test_on_the_host_averages_share_an_allocation(tmp_path):
    weights = [nn.Parameter(torch.full(shape, 2.0, dtype=torch.bfloat16)) for shape in ((7, 5), (), (3,))]
    average = WeightAverage(weights, 0.5, device="cpu")
    assert len({mean.untyped_storage().data_ptr() for mean in average.averages}) == 1
    set_to(weights[2], 4.0, 4.0, 4.0)
    average.update()
    with average.applied():
        assert weights[2].tolist() == [3.0] * 3
    assert weights[2].tolist() == [4.0] * 3
    save_file({str(i): mean for i, mean in enumerate(average.averages)}, tmp_path / "averages.safetensors")
    for name, mean in load_file(tmp_path / "averages.safetensors").items():
        assert torch.equal(mean, average.averages[int(name)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_averages_of_weights_on_cuda_are_pinned_and_waited_for_by_none():
    weights = [nn.Parameter(torch.ones(64, 3, dtype=torch.bfloat16, device="cuda"))]
    average = WeightAverage(weights, 0.5, device="cpu")
    set_to(weights[0], *[[3.0] * 3] * 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        average.update()
        with average.applied():
            applied = weights[0].detach().clone()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert average.averages[0].is_pinned()
    assert applied.unique().tolist() == [2.0] and weights[0].unique().tolist() == [3.0]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_an_average_goes_on_from_its_state(device):
    weight, other = parameter(1.0, 2.0), parameter(5.0, 5.0)
    average, resumed = (WeightAverage([each], 0.9, device=device) for each in (weight, other))
    set_to(weight, 3.0, 4.0)
    average.update()
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    set_to(other, 0.5, 0.25)
    set_to(weight, 0.5, 0.25)
    average.update()
    resumed.update()
    assert torch.equal(resumed.averages[0], average.averages[0])
    with pytest.raises(ValueError, match=r"shapes \[\(1,\)\], here they should be \[\(2,\)\]"):
        resumed.load_state_dict({"averages": [torch.zeros(1)]})


def test_a_decay_of_one_would_never_move():
    with pytest.raises(ValueError, match="decay is 1"):
        WeightAverage([parameter(1.0)], 1)


def test_shards_are_averaged_as_shards(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        weight = nn.Parameter(distribute_tensor(torch.tensor([1.0, 2.0]), mesh, [Shard(0)]))
        average = WeightAverage([weight], 0.5)
        with torch.no_grad():
            weight.mul_(3)
        average.update()
        assert isinstance(average.averages[0], DTensor)
        assert average.averages[0].full_tensor().tolist() == [2.0, 4.0]
        with average.applied():
            assert weight.full_tensor().tolist() == [2.0, 4.0]
        assert weight.full_tensor().tolist() == [3.0, 6.0]
    finally:
        dist.destroy_process_group()
