"""What a step does, counted: the gates of docs/performance.md that are the same on every machine."""

import pytest
import torch
from torch import nn

from benchmarks.counters import Counting
from benchmarks.cpu import Loops, counted_rows, help_imports_torch, memory_rows, minimum_flops
from benchmarks.scenes import miniature_config, random_config, write_random_pipeline
from benchmarks.targets import TARGETS, Row, table


def measured(config, folder):
    """Counts of a warm step, the step's rows by id, and the largest difference to the bare loop in a first one."""
    loops = Loops.of(config, folder)
    difference = loops.difference()
    counts = loops.count()
    return counts, {row.id: row for row in counted_rows("test", config, counts)}, difference


@pytest.fixture(scope="module")
def on_miniature(tmp_path_factory):
    torch.set_num_threads(1)
    config = miniature_config("prompts.limit=2", "train.batch_size=2", "rollout.steps=6")
    return config, *measured(config, tmp_path_factory.mktemp("runs") / "miniature")


@pytest.fixture(scope="module")
def on_random(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    pipeline = write_random_pipeline(folder / "pipeline", num_layers=1, num_single_layers=1)
    config = random_config(pipeline, "prompts.limit=1", "rollout.steps=12")
    return config, *measured(config, folder / "random")


@pytest.fixture(params=["miniature", "random"])
def scene(request):
    return request.getfixturevalue(f"on_{request.param}")


def test_every_rollout_is_sampled_once_for_all_of_its_pairs(scene):
    config, counts, *_ = scene
    assert counts["ours"].no_grad_samples == config.train.batch_size * config.rollout.steps


def test_both_branches_of_a_pair_are_one_call(scene):
    config, counts, *_ = scene
    assert counts["ours"].grad_calls == config.algorithm.pairs
    assert counts["ours"].grad_samples == 2 * config.algorithm.pairs * config.train.batch_size
    assert counts["upstream"].grad_calls == 2 * config.algorithm.pairs


def test_a_warm_step_reads_no_text(scene):
    config, counts, *_ = scene
    assert counts["ours"].text_encodes == 0
    assert counts["upstream"].text_encodes == 4 * config.algorithm.pairs


def test_the_host_waits_once_an_update(on_random):
    config, counts, *_ = on_random
    assert counts["ours"].syncs == config.algorithm.pairs
    assert counts["upstream"].syncs > 10


def test_the_miniatures_photo_distance_is_one_more_wait_a_step(on_miniature):
    config, counts, *_ = on_miniature
    assert counts["ours"].syncs <= config.algorithm.pairs + 1


def test_nothing_is_computed_that_need_not_be(scene):
    config, counts, rows, _ = scene
    assert counts["bare"].flops == pytest.approx(minimum_flops(config), rel=1e-9)
    assert rows["N5"].measured <= TARGETS["N5"].good


def test_there_are_few_more_operators_than_by_hand(scene):
    *_, rows, _ = scene
    assert rows["T2"].measured <= TARGETS["T2"].gate


def test_the_result_is_that_of_the_loop_written_by_hand(scene):
    assert scene[-1] <= TARGETS["E1"].gate


@pytest.mark.slow
def test_memory_is_as_planned():
    rows = list(memory_rows())
    assert {row.id for row in rows} == {"M1", "M2", "M3", "M4"}
    assert [row for row in rows if row.verdict == "missed" or "does not fit" in row.note] == []
    assert next(row for row in rows if row.id == "M1").verdict in ("good", "excellent")


def test_help_leaves_torch_alone():
    assert not help_imports_torch()


# --- the counters -----------------------------------------------------------------------------------------------------


def test_what_depends_on_a_weight_is_read_from_the_device():
    layer = nn.Linear(4, 1)
    with Counting(others=[layer]) as counts:
        drawn = torch.rand(3, 4)
        drawn.sum().item(), drawn.tolist(), bool(drawn.any())
        assert counts.syncs == 0
        output = layer(drawn)
        for read in (output.sum().item, output.tolist, output.cpu, output.detach().numpy):
            before = counts.syncs
            read()
            assert counts.syncs == before + 1
    output.sum().item()
    assert counts.syncs == 4


def test_flops_and_saved_bytes_by_hand():
    layer = nn.Linear(8, 16)
    pixels = torch.rand(4, 8)
    with Counting(others=[layer]) as counts:
        layer(pixels).sum().backward()
    assert counts.flops == 2 * 2 * 4 * 8 * 16  # forward, and the weight's gradient
    assert counts.saved_bytes == 4 * 8 * 4  # the input, and no weight
    assert counts.backwards == 1
    assert counts.operators["addmm"] == 1


def test_a_verdict_is_the_best_limit_that_is_met():
    assert [Row("T1", "", value).verdict for value in (1.0, 1.03, 1.07, 1.2)] == ["excellent", "good", "gate", "missed"]
    assert [Row("T3", "", value).verdict for value in (1.6, 1.4, 1.3, 1.0)] == ["excellent", "good", "gate", "missed"]
    assert Row("N1", "", 0.5, good=0.5).verdict == "good"
    assert "missed" in table([Row("C1", "command line", 2.0)])
