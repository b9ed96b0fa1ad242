"""The split master: exact halves, torch's AdamW to the bit, state that comes back, updates as float32 makes them."""

import copy
import io
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.nn.utils import clip_grad_norm_, get_total_norm

from srpo_cli.errors import MissingError, SrpoError
from srpo_cli.runtime.blocks import Piece, Shelf, cut, schedule
from srpo_cli.runtime.moments import ALIGN, make_moments
from srpo_cli.runtime.split_adamw import SplitAdamW, join, split
from srpo_cli.runtime.trained import Halves

CPU = torch.device("cpu")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FORMS = ("float32", "bfloat16", "8bit")
SHAPES = ((37, 11), (300,), (64, 64), ())


def bits(tensor):
    return tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def masters(draw):
    return [0.03 * torch.randn(shape, generator=draw) for shape in SHAPES]


def twins(masters):
    """Float32 parameters and bfloat16 ones, both to start from the same masters."""
    return [nn.Parameter(m.clone()) for m in masters], [nn.Parameter(m.bfloat16()) for m in masters]


def feed(parameters, draw, scale=1e-3):
    """Backward passes that give every parameter a random gradient, which it returns; the scale varies within each."""
    gradients = [
        (scale * torch.randn(p.shape, generator=draw) * 10 ** torch.randn(p.shape, generator=draw)).bfloat16()
        for p in parameters
    ]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        (parameter * gradient.to(parameter.device)).sum().backward()
    return gradients


def train(parameters, optimizer, draw, steps):
    for _ in range(steps):
        feed(parameters, draw)
        optimizer.step()
        optimizer.zero_grad()


def assert_same_state(one, other):
    """Two optimizers' states are equal to the bit."""
    one, other = one.state_dict(), other.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for mine, theirs in zip(one["state"].values(), other["state"].values(), strict=True):
        assert mine.keys() == theirs.keys()
        for name, values in mine.items():
            assert torch.equal(values.cpu(), theirs[name].cpu()), name


# --- the halves -------------------------------------------------------------------------------------------------------


def test_halves_join_to_every_finite_number(draw):
    pattern = torch.randint(-(2**31), 2**31, (2**20,), generator=draw, dtype=torch.int64).to(torch.int32)
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    edges = torch.cat([high + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])  # every bfloat16, and around ties
    master = torch.cat([pattern, edges]).view(torch.float32)
    master = master[master.isfinite()]
    joined = join(*split(master))
    assert torch.equal(bits(joined), bits(master))


@pytest.mark.parametrize(
    ("number", "high"),
    [
        (1.0, 1.0),
        (-0.0, -0.0),
        (1 + 2**-9, 1.0),
        (1 + 2**-8, 1 + 2**-7),  # a tie goes away from zero: to even, the low half would not fit
        (-1 - 2**-8, -1 - 2**-7),
        (1 + 3 * 2**-8, 1 + 2**-6),
        (torch.finfo(torch.float32).max, float("inf")),
        (2**-140, 0.0),
        (2**-133, 2**-133),  # the smallest subnormal
    ],
)
def test_the_high_half_is_the_nearest_bfloat16(number, high):
    found, _ = split(torch.tensor([number]))
    expected = torch.tensor([high]).bfloat16()
    assert torch.equal(bits(found), bits(expected))


def test_high_halves_are_within_half_a_step(draw):
    master = torch.randn(10_000, generator=draw)
    high, low = split(master)
    ours, torchs = (high.float() - master).abs(), (master.bfloat16().float() - master).abs()
    assert torch.equal(ours, torchs)
    assert low.min() < -32000 and low.max() > 32000


def test_what_is_no_number_stays_none():
    patterns = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, 0x7F800000], dtype=torch.int32)
    high, low = split(patterns.view(torch.float32))
    assert not high.isfinite().any()
    assert not join(high, low).isfinite().any()


# --- blocks and their order -------------------------------------------------------------------------------------------


def test_blocks_hold_whole_parameters_but_for_those_larger_than_a_block():
    blocks = cut([300, 200, 512, 1100], 2 * ALIGN)
    assert blocks == [
        [Piece(0, 0, 300, 0)],  # the next would begin at 512
        [Piece(1, 0, 200, 0)],
        [Piece(2, 0, 512, 0)],
        [Piece(3, 0, 512, 0)],
        [Piece(3, 512, 1024, 0)],
        [Piece(3, 1024, 1100, 0)],
    ]
    assert cut([300, 200, 512], 4 * ALIGN) == [[Piece(0, 0, 300, 0), Piece(1, 0, 200, 512)], [Piece(2, 0, 512, 0)]]


def test_copies_run_beside_the_update_of_another_block():
    assert list(schedule(2)) == [
        (("fetch", 0), ()),
        (("fetch", 1), ()),
        (("update", 0), (("fetch", 0),)),
        (("write", 0), (("update", 0),)),
        (("update", 1), (("fetch", 1),)),
        (("write", 1), (("update", 1),)),
    ]


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 9])
def test_the_schedule_reuses_no_slot_early_and_keeps_three_lanes_busy(blocks):
    """Played with lanes that do one action per tick, as streams do, each in its own order."""
    slots = 3
    lanes = {
        lane: [entry for entry in schedule(blocks) if entry[0][0] == lane] for lane in ("fetch", "update", "write")
    }
    done, ticks = {}, 0
    while any(lanes.values()):
        ready = [lane[0] for lane in lanes.values() if lane and all(before in done for before in lane[0][1])]
        assert ready, "nothing can go on"
        for (action, block), _ in ready:
            if action == "fetch" and block >= slots:
                assert ("write", block - slots) in done
            lanes[action].pop(0)
        ticks += 1
        done |= {action: ticks for action, _ in ready}
    assert sorted(done) == sorted((action, block) for action in lanes for block in range(blocks))
    assert ticks == blocks + 2  # nothing but the first fetch and the last write is waited for


def test_a_shelf_cuts_what_was_asked_for_from_one_allocation():
    shelf = Shelf(torch.int16, 160, CPU, pinned=False)
    one, two = shelf.take(100), shelf.take(60)
    assert one.shape == (100,) and two.shape == (60,) and not two.any()
    assert one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()
    assert one.untyped_storage().nbytes() == 320


def test_pinned_allocations_of_flux_are_hardly_larger_than_what_is_in_them():
    """torch pins powers of two; one for each float32 weight would be 69.3 GiB for 44.3."""

    def pinned(storages):
        return sum(2 ** math.ceil(math.log2(bytes_)) for bytes_ in storages)

    d, mlp = 3072, 12288
    double = 2 * [6 * d * d, 6 * d, *4 * [d * d, d], 128, 128, d * mlp, mlp, mlp * d, d]
    single = [3 * d * d, 3 * d, d * mlp, mlp, (d + mlp) * d, d, *3 * [d * d, d], 128, 128]
    rest = [4096 * d, d, 64 * d, d, 256 * d, d, d * d, d, 256 * d, d, d * d, d, 768 * d, d, d * d, d]
    sizes = [*rest, *19 * double, *38 * single, 2 * d * d, 2 * d, 64 * d, 64]
    assert sum(sizes) == 11_901_408_320
    assert pinned(4 * size for size in sizes) / 2**30 == pytest.approx(69.3, abs=0.1)
    for dtype in (torch.float32, torch.bfloat16):
        shelf = Shelf(dtype, sum(sizes), torch.device("meta"), pinned=False)
        storages = {id(s): s for s in (shelf.take(size).untyped_storage() for size in sizes)}
        taken = pinned(storage.nbytes() for storage in storages.values())
        assert taken <= 1.04 * sum(sizes) * dtype.itemsize  # the last allocation is rounded up, too


def test_pinned_memory_that_is_not_there_ends_in_one_line():
    with pytest.raises(SrpoError, match=r"no 2097152\.0 GiB of pinned host memory .*: set memory.adam=8bit") as error:
        Shelf(torch.int16, 2**50, CPU, pinned=True).take(2**50)
    assert "\n" not in str(error.value)


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2**26, 512])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_steps_are_torchs_adamw_to_the_bit(masters, draw, block, weight_decay):
    references, parameters = twins(masters)
    theirs = torch.optim.AdamW(references, 1e-2, weight_decay=weight_decay)
    ours = SplitAdamW(parameters, 1e-2, weight_decay=weight_decay, masters=masters, block=block)
    for step in range(12):
        some = slice(1, None) if step % 3 == 1 else slice(None)  # torch counts steps per parameter
        for reference, gradient in zip(references[some], feed(parameters[some], draw), strict=True):
            reference.grad = gradient.float()
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
            optimizer.zero_grad()
        for reference, parameter in zip(references, parameters, strict=True):
            assert torch.equal(bits(ours.master(parameter)), bits(reference))
            assert torch.equal(parameter, split(reference.detach())[0])


def test_groups_keep_their_own_rates(masters, draw):
    references, parameters = twins(masters)
    theirs = torch.optim.AdamW([{"params": references[:2]}, {"params": references[2:], "lr": 1e-3}], 1e-2)
    ours = SplitAdamW([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 1e-3}], 1e-2, masters=masters)
    for reference, gradient in zip(references, feed(parameters, draw), strict=True):
        reference.grad = gradient.float()
    ours.step()
    theirs.step()
    for reference, parameter in zip(references, parameters, strict=True):
        assert torch.equal(ours.master(parameter), reference)


def test_without_masters_the_parameters_are_the_masters(masters):
    parameters = twins(masters)[1]
    before = copy.deepcopy([parameter.data for parameter in parameters])
    optimizer = SplitAdamW(parameters, 1e-3)
    for parameter, value in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(optimizer.master(parameter), value.float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16])
def test_state_on_the_host_changes_no_bit(masters, form, gradients, device):
    """Blocks of 512 elements: small parameters share one, the largest spans eight."""
    made = []
    for offload in (False, True):
        parameters = [nn.Parameter(m.bfloat16().to(device)) for m in masters]
        optimizer = SplitAdamW(
            parameters, 1e-3, masters=masters, moments=form, gradients=gradients, offload=offload, block=512
        )
        train(parameters, optimizer, torch.Generator().manual_seed(1), 5)
        made.append((parameters, optimizer))
    (resident, one), (streamed, other) = made
    for mine, theirs in zip(resident, streamed, strict=True):
        assert torch.equal(mine, theirs)
    assert_same_state(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_on_cuda_the_host_never_waits_and_updates_are_the_fused_ones(masters, form, offload):
    references = [nn.Parameter(m.cuda()) for m in masters]
    parameters = [nn.Parameter(m.bfloat16().cuda()) for m in masters]
    theirs = torch.optim.AdamW(references, 1e-3, fused=True)
    ours = SplitAdamW(parameters, 1e-3, masters=masters, moments=form, offload=offload, block=512)
    for _ in range(5):
        for reference, gradient in zip(references, feed(parameters, torch.Generator().manual_seed(1)), strict=True):
            reference.grad = gradient.float().cuda()
        theirs.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ours.zero_grad()
    for reference, parameter in zip(references, parameters, strict=True):
        assert form != "float32" or torch.equal(ours.master(parameter), reference)
    assert ours.state_dict()["state"][0]["low"].is_pinned() == offload


@pytest.mark.parametrize("form", FORMS)
def test_a_state_goes_on_exactly(masters, form):
    """Also with blocks of another size and its state elsewhere."""
    parameters = twins(masters)[1]
    optimizer = SplitAdamW(parameters, 1e-3, masters=masters, moments=form, offload=True)
    train(parameters, optimizer, torch.Generator().manual_seed(1), 3)
    optimizer.param_groups[0]["lr"] = 5e-4
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = SplitAdamW(others, 1e-3, moments=form, block=512 if form != "bfloat16" else 2**26)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for mine, theirs in ((parameters, optimizer), (others, resumed)):
        train(mine, theirs, torch.Generator().manual_seed(2), 3)
    assert_same_state(optimizer, resumed)
    for mine, theirs in zip(parameters, others, strict=True):
        assert torch.equal(optimizer.master(mine), resumed.master(theirs))


def test_a_copied_state_takes_a_step_back(masters, draw):
    parameters = twins(masters)[1]
    optimizer = SplitAdamW(parameters, 1e-2, masters=masters)
    train(parameters, optimizer, draw, 2)
    weights, state = [p.detach().clone() for p in parameters], copy.deepcopy(optimizer.state_dict())
    exact = [optimizer.master(parameter) for parameter in parameters]
    train(parameters, optimizer, draw, 1)
    assert not torch.equal(optimizer.master(parameters[0]), exact[0])
    with torch.no_grad():
        for parameter, value in zip(parameters, weights, strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(state)
    for parameter, value in zip(parameters, exact, strict=True):
        assert torch.equal(optimizer.master(parameter), value)


def test_a_foreign_state_is_refused_and_changes_nothing(masters, draw):
    parameters = twins(masters)[1]
    optimizer = SplitAdamW(parameters, 1e-2, moments="bfloat16")
    train(parameters, optimizer, draw, 1)
    before = copy.deepcopy(optimizer.state_dict())
    other = SplitAdamW(twins(masters)[1], 1e-2, moments="float32")
    smaller = SplitAdamW([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], 1e-2, moments="bfloat16")
    for foreign in (other, smaller):
        with pytest.raises(ValueError, match="the state of parameter 0 is"):
            optimizer.load_state_dict(foreign.state_dict())
    for mine, theirs in zip(before["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_add_up_in_float32_and_leave_the_parameters_free():
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = SplitAdamW([parameter], 1e-3)
    for gradient in (1.0, 2**-9):  # their sum is no bfloat16
        (parameter * torch.tensor([gradient, 0.0])).sum().backward()
        assert parameter.grad is None
    assert optimizer.accumulated()[0].tolist() == [1 + 2**-9, 0.0]
    optimizer.zero_grad(set_to_none=False)
    assert optimizer.accumulated()[0].tolist() == [0.0, 0.0]
    optimizer.zero_grad()
    assert optimizer.accumulated() == []


def test_gradients_in_bfloat16_are_the_parameters_own():
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = SplitAdamW([parameter], 1e-3, gradients=torch.bfloat16)
    (parameter * 3).sum().backward()
    assert optimizer.accumulated() == [parameter.grad]
    optimizer.zero_grad()
    assert optimizer.accumulated() == []


@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16])
def test_the_next_step_uses_what_was_made_of_the_gradients(gradients):
    made = []
    for scale in (1.0, 8.0):
        parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = SplitAdamW([parameter], 1e-2, eps=1.0, gradients=gradients)  # at this eps the scale matters
        (parameter * torch.tensor([1.0, 2.0, -2.0, 4.0]) * scale).sum().backward()
        assert get_total_norm(optimizer.accumulated()) == 5 * scale
        for gradient in optimizer.accumulated():
            gradient.div_(scale)
        optimizer.step()
        made.append(optimizer.master(parameter))
    assert torch.equal(*made)


def halves(parameters, optimizer):
    return Halves({str(i): parameter for i, parameter in enumerate(parameters)}, optimizer)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16])
def test_clipped_steps_are_torchs_on_the_same_gradients_clipped_in_float32(masters, draw, gradients, offload):
    references, parameters = twins(masters)
    theirs = torch.optim.AdamW(references, 1e-2, eps=1e-3)  # at this eps the scale matters
    ours = SplitAdamW(parameters, 1e-2, eps=1e-3, masters=masters, gradients=gradients, offload=offload, block=512)
    for step in range(6):
        limit = 1e9 if step == 3 else 0.1
        for reference, gradient in zip(references, feed(parameters, draw), strict=True):
            reference.grad = gradient.float()
        norm = halves(parameters, ours).clip(limit)
        assert norm.dtype == torch.float32
        assert torch.equal(norm, clip_grad_norm_(references, limit)) and norm > 0.2
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        for reference, parameter in zip(references, parameters, strict=True):
            assert torch.equal(bits(ours.master(parameter)), bits(reference))


def test_a_factor_is_used_once_and_leaves_the_gradients_alone():
    made = []
    for factors in ((0.5, 0.25), (0.125,), ()):
        parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = SplitAdamW([parameter], 1e-2, eps=1.0)
        for forgotten in (True, False):
            (parameter * torch.tensor([1.0, 2.0, -2.0, 4.0])).sum().backward()
            for factor in (*factors, *((1 / 7,) if forgotten else ())):
                optimizer.scale_gradients(torch.tensor(factor))
            assert optimizer.accumulated()[0].tolist() == [1.0, 2.0, -2.0, 4.0]
            if forgotten:
                optimizer.zero_grad()
        optimizer.step()
        optimizer.step()  # the same gradients, no longer scaled
        made.append(optimizer.master(parameter))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("form", ["float32", "8bit"])
def test_a_step_reads_nothing_back_from_the_device(masters, form):
    """On the meta device, where there is nothing to read."""
    parameters = [nn.Parameter(m.bfloat16().to("meta")) for m in masters]
    optimizer = SplitAdamW(parameters, 1e-3, moments=form)
    for _ in range(2):
        sum(parameter.sum() for parameter in parameters).backward()
        halves(parameters, optimizer).clip(0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state_dict()["state"][0]["step"] == 2


# --- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_moments_that_are_nothing_stay_nothing(form):
    moments = make_moments(form, CPU)
    stored = {name: torch.zeros(512 // share, dtype=dtype) for name, (dtype, share) in moments.layout.items()}
    for _ in range(3):
        first, second = moments.load(stored)
        assert not first.any() and not second.any()
        moments.store(stored, first, second, seed=0)


def test_rounding_second_moments_to_bfloat16_is_unbiased_and_leaves_bfloat16_alone(draw):
    moments = make_moments("bfloat16", CPU)
    stored = {name: torch.zeros(2**16, dtype=dtype) for name, (dtype, _) in moments.layout.items()}
    moments.store(stored, torch.zeros(2**16), torch.full((2**16,), 1 + 2**-9), seed=3)  # a quarter of a step
    rounded = stored["exp_avg_sq"].clone()
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert rounded.float().mean().item() == pytest.approx(1 + 2**-9, abs=1e-4)
    moments.store(stored, *moments.load(stored), seed=4)
    assert torch.equal(stored["exp_avg_sq"], rounded)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_moment_that_8_bits_cannot_tell_from_0_explodes_nothing(form):
    """After a spike beside it of 1e3, which its block's scale remembers, a gradient of 1e-6 is divided by its root.

    A root of 0 would leave eps alone to divide by, and the update be a hundred times the learning rate.
    """
    weight = nn.Parameter(torch.zeros(ALIGN, dtype=torch.bfloat16))
    optimizer = SplitAdamW([weight], 1e-3, weight_decay=0, moments=form)
    gradient = torch.full((ALIGN,), 1e-6)
    gradient[0] = 1e3
    before = optimizer.master(weight)
    for _ in range(200):
        (weight * gradient).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        after = optimizer.master(weight)
        assert (after - before).abs().max() <= 1.2e-3
        before, gradient[0] = after, 0


@pytest.mark.parametrize("device", DEVICES)
def test_8_bit_codes_are_the_nearest_down_to_zero(device):
    moments = make_moments("8bit", torch.device(device))
    values = torch.logspace(-9, 2, ALIGN, device=device)
    values[::3] *= -1
    values[7] = 0
    for codes, numbers in ((moments.codes["exp_avg"], values), (moments.codes["exp_avg_sq"], values.abs())):
        found, largest = moments.quantise(numbers, codes)
        distances = (numbers[:, None] / largest - codes).abs()
        torch.testing.assert_close(codes[found.long()], codes[distances.argmin(1)])
        assert codes[found[7].long()] == 0


@pytest.mark.parametrize("form", FORMS)
def test_weights_without_a_gradient_stay_where_they_are(form):
    weight = nn.Parameter(torch.ones(ALIGN, dtype=torch.bfloat16))
    optimizer = SplitAdamW([weight], 1e-3, weight_decay=0, moments=form)
    for _ in range(5):
        (weight[:100] * torch.logspace(-3, 3, 100)).sum().backward()
        optimizer.step()
    assert torch.equal(optimizer.master(weight)[100:], torch.ones(ALIGN - 100))


def test_8_bit_moments_without_their_library_say_what_to_do(masters, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingError, match="pip install bitsandbytes"):
        SplitAdamW(twins(masters)[1], 1e-3, moments="8bit")


# --- what is held -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "bytes_each"), [("float32", 8), ("bfloat16", 4), ("8bit", 2 + 2 * 4 / 256)])
@pytest.mark.parametrize("offload", [False, True])
def test_memory_is_what_is_held(form, bytes_each, offload):
    size = 4096
    parameters = [nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for _ in range(3)]
    optimizer = SplitAdamW(parameters, 1e-3, moments=form, offload=offload, block=size)
    sum(parameter.sum() for parameter in parameters).backward()
    held = optimizer.memory()
    kept = {"low": 3 * 2 * size, "moments": 3 * bytes_each * size}
    working = size * (8 if form == "float32" else 16)
    moving = 3 * (2 + bytes_each) * size if offload else 0
    device = {"weights": 3 * 2 * size, "gradients": 3 * 4 * size, "buffers": working + moving}
    assert held == ({"device": device, "host": kept} if offload else {"device": device | kept, "host": {}})


@pytest.mark.parametrize("offload", [False, True])
def test_memory_can_be_counted_without_having_it(offload):
    def make(device):
        parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=device)) for shape in SHAPES]
        return SplitAdamW(parameters, 1e-3, offload=offload, block=512).memory()

    assert make("meta") == make("cpu")


def test_parameters_of_another_kind_are_refused():
    for parameter in (torch.zeros(3), torch.zeros(3, 2, dtype=torch.bfloat16).T):
        with pytest.raises(ValueError, match="contiguous bfloat16"):
            SplitAdamW([nn.Parameter(parameter)], 1e-3)
    with pytest.raises(ValueError, match=r"a master is \(2,\), its parameter \(3,\)"):
        SplitAdamW([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], 1e-3, masters=[torch.zeros(2)])


# --- fidelity ---------------------------------------------------------------------------------------------------------


def network():
    """Two layers with weights like those of a large transformer, N(0, 0.03)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.03)
    return model


def descend(call, clip_them, optimizer, steps=50):
    """Steps at 5e-6 towards a random linear map, each clipped to a global norm of 0.1."""
    draw = torch.Generator().manual_seed(1)
    goal = torch.randn(64, 64, generator=draw)
    for _ in range(steps):
        inputs = torch.randn(32, 64, generator=draw)
        (call(inputs.bfloat16()).float() - inputs @ goal).square().mean().backward()
        clip_them()
        optimizer.step()
        optimizer.zero_grad()


def movement(weights):
    """The way of all weights from where they began."""
    pairs = zip(weights, network().parameters(), strict=True)
    return torch.cat([(weight.detach() - start.detach()).double().flatten() for weight, start in pairs])


@pytest.fixture(scope="module")
def way():
    """The way that float32 weights, which the model sees in bfloat16, take in 50 steps of torch's AdamW."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-6, weight_decay=1e-4)

    def call(inputs):
        return torch.func.functional_call(model, {n: p.bfloat16() for n, p in model.named_parameters()}, (inputs,))

    descend(call, lambda: clip_grad_norm_(model.parameters(), 0.1), optimizer)
    return movement(model.parameters())


@pytest.mark.parametrize(
    ("form", "gradients", "lost"),
    [
        ("float32", torch.float32, 1e-6),
        ("bfloat16", torch.float32, 1e-3),
        ("bfloat16", torch.bfloat16, 1e-3),
        ("8bit", torch.float32, 1e-3),
    ],
)
def test_50_small_steps_go_the_way_of_float32(way, form, gradients, lost):
    """Measured: a cosine of 1 - 1e-9 with float32 moments, 1 - 4e-6 with bfloat16, 1 - 1.2e-4 with 8 bit."""
    masters, model = list(network().parameters()), network().bfloat16()
    optimizer = SplitAdamW(
        model.parameters(), 5e-6, weight_decay=1e-4, masters=masters, moments=form, gradients=gradients
    )
    descend(model, lambda: halves(model.parameters(), optimizer).clip(0.1), optimizer)
    ours = movement([optimizer.master(parameter) for parameter in model.parameters()])
    assert cosine_similarity(ours, way, dim=0) >= 1 - lost
    assert ours.norm() / way.norm() == pytest.approx(1, abs=2e-3)


def test_bfloat16_weights_without_a_master_do_not(way):
    """Measured: a cosine of 0.2, and a fifth of the way."""
    model = network().bfloat16()
    start = torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])
    optimizer = torch.optim.AdamW(model.parameters(), 5e-6, weight_decay=1e-4)
    descend(model, lambda: clip_grad_norm_(model.parameters(), 0.1), optimizer)
    ours = torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()]) - start
    assert cosine_similarity(ours, way, dim=0) < 0.5
