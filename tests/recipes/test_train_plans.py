"""Where a run keeps its state changes nothing about what it computes; what does change it says so."""

import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from srpo_cli.recipes import train as recipe
from srpo_cli.runtime.tensor_cache import TensorCache

pytestmark = [pytest.mark.usefixtures("on_the_cpu")]

FULL = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


def settings(*pairs):
    return [f"--set={pair}" for pair in pairs]


def weights(folder, step=4, part="transformer", name=FULL):
    return load_file(folder / f"checkpoints/step-{step:06d}" / part / name)


@pytest.fixture(scope="module")
def run(processes, tiny, tmp_path_factory):
    """Runs of some settings, each made once."""
    folders = {}

    def make(*pairs, steps=4):
        if (pairs, steps) not in folders:
            folders[pairs, steps] = folder = tmp_path_factory.mktemp("run") / "run"
            process = processes.start(*tiny(folder, *settings(*pairs), steps=steps))
            assert process.wait() == 0, process.stderr.read_text()
        return folders[pairs, steps]

    return make


@pytest.fixture
def goes_on(run, srpo, tmp_path, assert_same):
    """Asserts that half a run that is gone on with is the whole one, to the bit."""

    def check(*pairs, steps=4):
        half = shutil.copytree(run(*pairs, steps=steps // 2), tmp_path / "half")
        assert srpo("train", "--resume", half, "--steps", steps).exit_code == 0
        assert_same(half, run(*pairs, steps=steps), step=steps)

    return check


def assert_close(mine, theirs, mean=2e-7):
    """Equal but for the order of sums."""
    assert mine.keys() == theirs.keys()
    apart = torch.cat([(mine[name] - theirs[name]).flatten().abs() for name in mine])
    assert apart.mean() < mean


# --- memory plans -------------------------------------------------------------------------------------------------


def test_what_is_streamed_through_the_host_is_what_stays_on_the_device(run, assert_same):
    moments = "memory.adam=bfloat16"
    assert_same(run("memory.plan=streamed", moments), run("memory.plan=resident", moments))


def test_halves_save_a_float32_master_that_bfloat16_could_not_hold(run):
    saved = weights(run("memory.plan=resident"))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    lost = [name for name, tensor in saved.items() if not torch.equal(tensor, tensor.bfloat16().float())]
    assert len(lost) > 0.9 * len(saved)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_halves_go_on_to_the_bit(moments, goes_on):
    goes_on("memory.plan=resident", f"memory.adam={moments}")


def test_plans_of_another_layout_do_not_go_on(run, tmp_path, one_line_error):
    folder = shutil.copytree(run("memory.plan=resident", steps=2), tmp_path / "run")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("plan: resident", "plan: replicated"))
    error = one_line_error(2, "train", "--resume", folder, "--steps", "4")
    assert "was written under plan resident or streamed, and what fits here is replicated or sharded" in error


def test_one_process_holds_the_only_shard(run, assert_same):
    assert_same(run("memory.plan=sharded"), run())


def test_micro_batches_and_passes_add_up_to_the_whole_batch(run, read_metrics):
    apart = run("memory.micro_batch=1", "memory.batch_branches=false")
    together = run()
    assert_close(weights(apart), weights(together))
    for one, other in zip(read_metrics(apart), read_metrics(together), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
        assert one["sgp_gap"] == pytest.approx(other["sgp_gap"], abs=2e-4)
    costs = [json.loads((folder / "summary.json").read_text())["ledger"] for folder in (apart, together)]
    for cost in costs:
        del cost["seconds"], cost["cpu_seconds"], cost["peak_memory_gib"]
    assert costs[0] == costs[1]


def test_recomputed_blocks_give_the_same_weights(run):
    recomputed = run("memory.transformer_checkpointing=true", "memory.vae_checkpointing=true")
    assert_close(weights(recomputed), weights(run()), mean=1e-9)


def test_a_bfloat16_master_is_refused_where_it_would_freeze(tmp_path, tiny, one_line_error):
    error = one_line_error(2, *tiny(tmp_path / "run", *settings("memory.master=bfloat16")))
    assert error.startswith("error: memory.master bfloat16 cannot hold updates of optimizer.lr 2e-05: ")
    assert error.endswith("% of the weights, which would never move; use memory.master=float32 or a higher rate")
    assert not (tmp_path / "run").exists()


def test_no_memory_at_run_time_ends_in_one_line_with_what_would_need_less(tmp_path, tiny, one_line_error, monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(recipe.Run, "_accumulate", no_memory)
    error = one_line_error(1, *tiny(tmp_path / "run", "--quiet"))
    assert error.startswith("error: out of memory in plan replicated")
    assert error.count("--set") >= 3


@pytest.fixture
def one_line_error(srpo):
    """Runs a command that is to fail, and returns the one line that is its error."""

    def fail(exit_code, *arguments):
        outcome = srpo(*arguments)
        errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
        assert (outcome.exit_code, len(errors)) == (exit_code, 1), outcome.stderr
        assert "Traceback" not in outcome.stderr
        return errors[0]

    return fail


# --- LoRA and averages ---------------------------------------------------------------------------------------------


def test_a_lora_leaves_the_base_alone_and_goes_on_to_the_bit(run, goes_on):
    goes_on("train.mode=lora", "lora.rank=4", "train.ema=0.5")
    saved = weights(run("train.mode=lora", "lora.rank=4", "train.ema=0.5"), name=LORA)
    assert all("lora_A" in name or "lora_B" in name for name in saved)
    assert {tensor.shape[0] for name, tensor in saved.items() if "lora_A" in name} == {4}
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    assert not any("norm" in name for name in saved)  # the modulation has none


def test_a_lora_over_tuned_weights_goes_on_over_them(run, goes_on):
    tuned = run() / "checkpoints/step-000004/transformer"
    goes_on("train.mode=lora", "lora.rank=4", f"model.weights={tuned}")


@pytest.mark.parametrize("base", ["int8", "float8", "nf4"])
def test_a_lora_trains_over_a_quantised_base(base, run):
    saved = weights(run("train.mode=lora", "lora.rank=4", f"lora.base={base}"), name=LORA)
    assert all(tensor.any() and tensor.dtype == torch.float32 for tensor in saved.values())


def test_the_average_is_worked_out_from_the_weights_of_every_update(run, tmp_path, tiny, processes):
    folder = tmp_path / "run"
    given = settings("train.ema=0.5", "algorithm.pairs=1", "checkpoint.every=1", "checkpoint.keep=9")
    process = processes.start(*tiny(folder, *given, steps=3))
    assert process.wait() == 0, process.stderr.read_text()
    base = load_file(recipe_base())
    average = dict(base)
    for step in (1, 2, 3):
        average = {name: (average[name] + tensor) / 2 for name, tensor in weights(folder, step).items()}
    torch.testing.assert_close(weights(folder, 3, "ema"), average, rtol=1e-6, atol=1e-8)


def recipe_base():
    from srpo_cli.miniature import WEIGHTS

    return WEIGHTS / "pipeline/transformer/diffusion_pytorch_model.safetensors"


def test_an_average_goes_on_to_the_bit(goes_on, run):
    goes_on("train.ema=0.5", "memory.plan=resident")
    whole = run("train.ema=0.5", "memory.plan=resident")
    assert {tensor.dtype for tensor in weights(whole, part="ema").values()} == {torch.float32}


# --- what is encoded once ------------------------------------------------------------------------------------------


def test_encoded_prompts_from_the_disk_train_the_same_weights(run, tmp_path_factory, assert_same, processes, tiny):
    cache, folder = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("run") / "run"
    process = processes.start(*tiny(folder, *settings(f"prompts.cache={cache}")))
    assert process.wait() == 0, process.stderr.read_text()
    mine, theirs = weights(folder), weights(run())
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert len(list(cache.rglob("*.safetensors"))) == 8  # two prompts a step, none that is not asked for
    assert TensorCache(cache / "prompts").size() > 0
    assert f"encoding 8 prompts into {cache / 'prompts'}" in process.stderr.read_text()


def test_prompts_of_standard_input_are_kept_for_going_on(run, tmp_path, tiny, srpo, monkeypatch):
    lines = "\n".join(f"a {colour} sphere on sand" for colour in ("red", "blue", "green", "yellow"))
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    folder = tmp_path / "run"
    assert srpo(*tiny(folder, *settings("prompts.source='-'"), steps=1)).exit_code == 0
    assert len((folder / "prompts.jsonl").read_text().splitlines()) == 4
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert srpo("train", "--resume", folder, "--steps", "2").exit_code == 0


# --- what changes the distribution ---------------------------------------------------------------------------------


def test_a_replayed_rollout_costs_no_forward_and_goes_on_to_the_bit(run, goes_on, read_metrics):
    goes_on("rollout.replay=2")  # the second step of three on the same rollouts is where it is cut
    ledger = json.loads((run("rollout.replay=2") / "summary.json").read_text())["ledger"]
    assert ledger["rollouts"] == 2 * 2 and ledger["forwards"] == 2 * 2 * 3
    records = read_metrics(run("rollout.replay=2"))
    assert [record["reward"] is None for record in records] == [False, True, True, False]


def test_float8_rollouts_are_others_but_not_far(run, read_metrics):
    quick, exact = read_metrics(run("rollout.dtype=float8")), read_metrics(run())
    assert quick[0]["sgp_gap"] != exact[0]["sgp_gap"]
    assert quick[0]["sgp_gap"] == pytest.approx(exact[0]["sgp_gap"], abs=0.1)
