"""``srpo train`` on the miniature: what a run leaves behind, what it costs, and the ways it can roll out and stop."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from srpo_cli.config.load import load_train_config

pytestmark = [pytest.mark.usefixtures("on_the_cpu")]

WORDS = ("photo_distance", "photo_rate", "caption_accuracy", "reward", "sgp_gap", "saturation", "grain")
PICTURE = Image.new("RGB", (48, 48), "red")


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


# What a run leaves behind


def test_the_run_folder_is_complete(finished):
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    pictures = {f"samples/step-00000{step}/0{i}.png" for step in (0, 2, 4) for i in (0, 1)}
    grids = {f"samples/step-00000{step}.png" for step in (0, 2, 4)}
    checkpoint = {"optimizer.pt", "state.json", "transformer/config.json"}
    checkpoint.add("transformer/diffusion_pytorch_model.safetensors")
    checkpoints = {f"checkpoints/step-00000{step}/{name}" for step in (2, 4) for name in checkpoint}
    records = {"config.yaml", "environment.json", "metrics.jsonl", "base.json", "tuned.json", "summary.json"}
    assert files == pictures | grids | checkpoints | records | {"before_after.png"}


def test_the_configuration_can_be_run_again_and_says_where_each_value_came_from(finished):
    lines = [line.split() for line in (finished / "config.yaml").read_text().splitlines()]
    assert ["batch_size:", "2", "#", "--set"] in lines
    assert ["steps:", "4", "#", "--steps"] in lines
    assert ["dtype:", "float32", "#", "preset", "realism", "(miniature)"] in lines
    assert load_train_config(finished / "config.yaml").config.train.batch_size == 2


def test_the_environment_names_what_an_exact_resume_needs(finished):
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert (environment["device"], environment["processes"]) == ("cpu", 1)


def test_the_summary_holds_every_word_with_its_interval_before_and_after(finished):
    summary = summary_of(finished)
    for side in ("base", "tuned"):
        assert summary[side] == json.loads((finished / f"{side}.json").read_text())
        for word in WORDS:
            interval = summary[side][word]
            assert set(interval) == {"mean", "low", "high"}
            assert interval["low"] <= interval["mean"] <= interval["high"]
    assert summary["base"] != summary["tuned"]
    assert (summary["steps"], summary["stopped_by"], summary["seed"]) == (4, "steps", 42)
    assert summary["seconds"] == pytest.approx(summary["ledger"]["seconds"], abs=0.1)


def test_the_ledger_holds_what_can_be_worked_out_by_hand(finished):
    ledger = summary_of(finished)["ledger"]
    assert ledger["rollouts"] == 4 * 2  # 4 steps of 2 rollouts
    assert ledger["forwards"] == 4 * 2 * 3  # each drawn in 3 steps
    assert ledger["gradient_passes"] == 4 * 2 * 2 * 2  # 2 pairs of 2 branches of each
    assert ledger["reward_calls"] == 4 * 2 * 2 + 4 * 2 * 2 * 2  # plain and augmented rollouts; every gradient pass
    assert ledger["updates"] == 4 * 2  # after every pair
    assert ledger["seconds"] > 0 and 0 < ledger["peak_memory_gib"] < 16


def test_the_metrics_have_one_record_a_step(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert set(record) == {
            "step", "reward", "sgp_gap", "photo_distance", "loss", "grad_norm", "lr", "seconds",
        }  # fmt: skip
        assert record["lr"] == 2e-5


def test_the_terminal_gets_plain_progress_and_the_table(finished):
    stderr = (finished.parent / "stderr").read_text().splitlines()
    assert stderr[0].startswith("model: the built-in miniature")
    assert stderr[1] == f"run: {finished}"
    assert stderr[2] == "measuring the base model on 8 held-out prompts"
    assert re.fullmatch(
        r"step 4/4  \d+\.\d\d s/step  eta 0 s  reward -?\d\.\d{3}  sgp_gap -?\d\.\d{3}  photo_distance \d\.\d{3}",
        stderr[-3],
    )
    assert stderr[-2:] == [
        "measuring the tuned model on 8 held-out prompts",
        f"pictures: {finished / 'before_after.png'}",
    ]
    stdout = (finished.parent / "stdout").read_text()
    for word in WORDS:
        assert word.replace("_", " ") in stdout
    assert "4 steps in" in stdout and "24 forwards, 32 gradient passes, 48 reward calls" in stdout


def test_no_library_says_anything(finished):
    for stream in ("stdout", "stderr"):
        text = (finished.parent / stream).read_text()
        assert not re.search(r"Warning|it/s|%\||Loading|Writing|\r", text)


def test_before_and_after_show_the_fixed_prompts_and_the_photographs(finished):
    sheet, grid = (Image.open(finished / name) for name in ("before_after.png", "samples/step-000004.png"))
    assert sheet.height > 2.5 * grid.height  # three rows against one
    before, after = (Image.open(finished / f"samples/step-00000{step}/00.png") for step in (0, 4))
    assert before.text.keys() == {"srpo"}
    assert json.loads(before.text["srpo"])["prompt"] == json.loads(after.text["srpo"])["prompt"]
    assert before.tobytes() != after.tobytes()


def test_training_changes_every_tensor_of_the_transformer(finished):
    first, last = (
        load_file(finished / f"checkpoints/step-00000{step}/transformer/diffusion_pytorch_model.safetensors")
        for step in (2, 4)
    )
    assert all(not torch.equal(first[name], last[name]) for name in first)


# How a run can go


def test_quiet_leaves_the_result_only(tmp_path, tiny, srpo):
    outcome = srpo(*tiny(tmp_path / "run", "--quiet", steps=1))
    assert outcome.exit_code == 0
    assert outcome.stderr.splitlines()[1:] == [f"run: {tmp_path / 'run'}"]
    assert outcome.stdout.startswith("1 steps in")


def test_a_run_without_measurement_or_grids_still_ends_with_a_summary(half):
    summary = summary_of(half)
    assert summary["base"] == summary["tuned"] == {}
    assert not (half / "before_after.png").exists()


def test_grids_need_no_evaluation(tmp_path, tiny, srpo):
    outcome = srpo(*tiny(tmp_path / "run", "--set", "samples.count=1", steps=1))
    assert outcome.exit_code == 0
    assert (tmp_path / "run" / "before_after.png").exists()
    assert not (tmp_path / "run" / "base.json").exists()


def test_evaluation_on_the_way_is_kept(tmp_path, tiny, srpo):
    arguments = tiny(tmp_path / "run", "--set", "evaluation.prompts=2", "--set", "evaluation.every=1", steps=2)
    assert srpo(*arguments).exit_code == 0
    assert json.loads((tmp_path / "run" / "evaluation-000001.json").read_text())["photo_distance"]
    assert not (tmp_path / "run" / "evaluation-000002.json").exists(), "that is tuned.json"


def test_the_target_is_measured_and_stops_the_run(tmp_path, tiny, srpo):
    settings = ["algorithm.target=auto", "algorithm.target_reach=0.001", "optimizer.lr=1e-4", "rollout.steps=2"]
    outcome = srpo(*tiny(tmp_path / "run", *(f"--set={setting}" for setting in settings), steps=30))
    assert outcome.exit_code == 0
    assert re.search(r"target: semantic gap [+-]\d\.\d{3} now, [+-]\d\.\d{3} when asked", outcome.stderr)
    summary = summary_of(tmp_path / "run")
    assert summary["stopped_by"] == "target"
    assert summary["steps"] < 30
    assert summary["ledger"]["forwards"] == 2 * 64 * 2 + summary["steps"] * 2 * 2, "the target costs 2 x 64 pictures"
    assert "stopped by target" in outcome.stdout
    checkpoint = tmp_path / "run" / f"checkpoints/step-{summary['steps']:06d}"
    prepared = json.loads((checkpoint / "state.json").read_text())["prepared"]
    assert (prepared["forwards"], prepared["rollouts"], prepared["updates"]) == (2 * 64 * 2, 2 * 64, 0)
    assert 0 < prepared["cpu_seconds"] < summary["ledger"]["cpu_seconds"]

    outcome = srpo("train", "--resume", tmp_path / "run", "--quiet")
    assert summary_of(tmp_path / "run")["steps"] == summary["steps"], "a target that was reached stays reached"


@pytest.mark.slow
def test_a_target_that_is_held_lets_the_run_go_on_to_its_last_step_and_over_a_resume(tmp_path, tiny, srpo):
    """With a gap that is reached at once the rate falls to its floor, and no step but the last ends the run."""
    settings = ["algorithm.target=auto", "algorithm.target_reach=0.001", "algorithm.at_target=hold", "rollout.steps=2"]
    given = [f"--set={setting}" for setting in [*settings, "optimizer.lr=1e-4"]]
    outcome = srpo(*tiny(tmp_path / "run", *given, steps=12))
    assert outcome.exit_code == 0, outcome.stderr
    summary = summary_of(tmp_path / "run")
    assert (summary["stopped_by"], summary["steps"]) == ("steps", 12)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert min(rates) == pytest.approx(0.02 * 1e-4)
    assert srpo("train", "--resume", tmp_path / "run", "--steps", 14, "--quiet").exit_code == 0
    assert summary_of(tmp_path / "run")["steps"] == 14


@pytest.mark.slow
def test_a_held_target_holds_captions_too_by_what_rollouts_show(tmp_path, tiny, srpo):
    """The running mean in the checkpoint is that of the logged margins, and a run in two parts is one run."""
    settings = ["algorithm.target=auto", "algorithm.at_target=hold", "rollout.steps=2", "optimizer.lr=1e-3"]
    given = [f"--set={setting}" for setting in settings]
    outcome = srpo(*tiny(tmp_path / "whole", *given, steps=4))
    assert outcome.exit_code == 0, outcome.stderr
    assert re.search(r"target: caption margin 0\.\d{3} now, 0\.\d{3} when asked", outcome.stderr)
    assert srpo(*tiny(tmp_path / "parts", *given, steps=2)).exit_code == 0
    assert srpo("train", "--resume", tmp_path / "parts", "--steps", 4, "--quiet").exit_code == 0

    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    states = [
        json.loads((tmp_path / run / "checkpoints/step-000004/state.json").read_text()) for run in ("whole", "parts")
    ]
    assert states[0]["target"] == states[1]["target"]
    captions = states[0]["target"]["captions"]
    (low, mean), (high, asked), base = captions["base"], captions["asked"], captions["base"][1]
    gap = low
    for row in rows:
        expected = base + min(max((gap - low) / (high - low), 0), 1) * min(asked - base, 0)
        missing = expected - captions["error"] * (0.2 / 1.8) ** 0.5 - mean
        assert row["captions_weight"] == pytest.approx(min(max(missing / (0.1 * base), 0), 1), abs=1e-6)
        mean = 0.8 * mean + 0.2 * row["held_margin"]
        gap = 0.7 * gap + 0.3 * row["sgp_gap"]
        faded = (states[0]["target"]["value"] - gap) / (states[0]["target"]["value"] - low)
        wanted = min(max(faded, row["captions_weight"], 0.02), 1)
        assert row["lr"] == pytest.approx(1e-3 * wanted, rel=1e-4)
    assert captions["mean"] == pytest.approx(mean, rel=1e-6)
    assert rows[0]["captions_weight"] == 0 < rows[-1]["captions_weight"], "a rate fifty times the right one spoils them"


@pytest.mark.slow
def test_a_given_gap_asks_the_base_model_for_the_word_where_captions_are_held(tmp_path, tiny, srpo):
    settings = ["algorithm.target=0.3", "algorithm.at_target=hold", "rollout.steps=2"]
    assert srpo(*tiny(tmp_path / "run", *(f"--set={setting}" for setting in settings), steps=1)).exit_code == 0
    state = json.loads((tmp_path / "run/checkpoints/step-000001/state.json").read_text())
    assert state["target"]["value"] == 0.3
    assert state["target"]["captions"]["asked"] != state["target"]["captions"]["base"]
    assert state["prepared"]["forwards"] == 2 * 64 * 2


@pytest.mark.slow
def test_what_captions_are_held_against_goes_neither_by_the_length_nor_by_the_guard(tmp_path, tiny, srpo):
    """Nor is it ever a prompt that the guard watches by; 120 rollouts are more than the calibration's pictures."""
    settings = ["algorithm.target=auto", "algorithm.at_target=hold", "rollout.steps=1", "train.batch_size=40"]
    settings += ["optimizer.lr=1e-3", "prompts.source=miniature-unlit", "memory.micro_batch=8", "checkpoint.every=3"]
    kept = {}
    for name, steps, more in (
        ("short", 3, []),
        ("long", 6, []),
        ("guarded", 3, ["guard.action=warn", "guard.share=1"]),
    ):
        given = [f"--set={setting}" for setting in [*settings, *more]]
        outcome = srpo(*tiny(tmp_path / name, *given, steps=steps))
        assert outcome.exit_code == 0, outcome.stderr
        checkpoint = tmp_path / name / "checkpoints/step-000003"
        state = json.loads((checkpoint / "state.json").read_text())
        kept[name] = (state["target"], load_file(checkpoint / "transformer/diffusion_pytorch_model.safetensors"))
    target, weights = kept.pop("short")
    assert target["captions"]["mean"] < target["captions"]["base"][1]
    for other, its_weights in kept.values():
        assert other == target
        assert all(torch.equal(weight, weights[name]) for name, weight in its_weights.items())


@pytest.mark.slow
def test_micro_batches_hold_captions_as_one_batch_does(tmp_path, tiny, srpo):
    """Equal but for the order of sums."""
    settings = ["algorithm.target=auto", "algorithm.at_target=hold", "rollout.steps=2", "optimizer.lr=1e-3"]
    records = []
    for size in (1, 2):
        given = [f"--set={setting}" for setting in [*settings, f"memory.micro_batch={size}"]]
        assert srpo(*tiny(tmp_path / str(size), *given, steps=6)).exit_code == 0
        records.append([json.loads(line) for line in (tmp_path / str(size) / "metrics.jsonl").read_text().splitlines()])
    for alone, together in zip(*records, strict=True):
        for key in ("captions_weight", "held_margin", "loss", "grad_norm"):
            assert alone[key] == pytest.approx(together[key], rel=1e-3, abs=1e-5)
    assert records[0][-1]["captions_weight"] > 0


def test_captions_are_let_go_where_the_user_says_so(tmp_path, tiny, srpo):
    settings = ["algorithm.target=auto", "algorithm.at_target=hold", "rollout.steps=2", "algorithm.captions=free"]
    assert srpo(*tiny(tmp_path / "run", *(f"--set={setting}" for setting in settings), steps=1)).exit_code == 0
    assert "held_margin" not in json.loads((tmp_path / "run/metrics.jsonl").read_text())


def test_one_prompt_has_no_wrong_caption_to_hold_it_by(tmp_path, tiny, srpo):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cube on grass\na red cube on grass\n")
    settings = ["algorithm.target=auto", "rollout.steps=2", f"prompts.source={prompts}"]
    given = [f"--set={setting}" for setting in settings]
    outcome = srpo(*tiny(tmp_path / "a", *given, "--set=algorithm.at_target=hold", steps=1))
    assert outcome.exit_code == 0, outcome.stderr
    assert "target: the gap is held and captions are not: there is one prompt to train on" in outcome.stderr
    outcome = srpo(*tiny(tmp_path / "b", *given, "--set=algorithm.captions=hold", steps=1))
    assert outcome.exit_code == 2
    assert outcome.stderr.splitlines()[-1].endswith("set algorithm.captions=free")


def test_the_schedule_of_the_published_code_runs_on_the_miniature(tmp_path, tiny, srpo):
    arguments = tiny(tmp_path / "run", "--set", "algorithm.schedule=reference", steps=1)
    outcome = srpo(*arguments)
    assert outcome.exit_code == 0, outcome.stderr
    assert summary_of(tmp_path / "run")["ledger"]["gradient_passes"] == 2 * 2 * 2


def test_one_update_for_all_pairs_of_a_rollout(tmp_path, tiny, srpo):
    outcome = srpo(*tiny(tmp_path / "run", "--set", "algorithm.update=rollout", steps=1))
    assert outcome.exit_code == 0, outcome.stderr
    ledger = summary_of(tmp_path / "run")["ledger"]
    assert (ledger["updates"], ledger["gradient_passes"]) == (1, 8)


@pytest.fixture(params=["folder", "list", "miniature"])
def pictures(request, tmp_path):
    """Given pictures, in each way in which they can be given."""
    if request.param == "miniature":
        return "miniature"
    folder = tmp_path / "pictures"
    folder.mkdir()
    captions = ["a red cube on grass", "a blue cone on sand, dark", "a green sphere on snow"]
    for i, caption in enumerate(captions):
        PICTURE.save(folder / f"{i}.png")
        if request.param == "folder":
            (folder / f"{i}.txt").write_text(caption)
    if request.param == "folder":
        return folder
    rows = [json.dumps({"image": f"{i}.png", "prompt": caption}) for i, caption in enumerate(captions)]
    (folder / "list.jsonl").write_text("\n".join(rows))
    return folder / "list.jsonl"


def test_given_pictures_stand_for_rollouts(pictures, tmp_path, tiny, srpo):
    source = ["--set", "rollout.source=pictures", "--set", f"rollout.pictures={pictures}"]
    outcome = srpo(*tiny(tmp_path / "run", *source, steps=1))
    assert outcome.exit_code == 0, outcome.stderr
    ledger = summary_of(tmp_path / "run")["ledger"]
    assert (ledger["rollouts"], ledger["forwards"], ledger["gradient_passes"]) == (2, 0, 8)


def test_the_offline_preset_draws_nothing_and_trains_on_photographs(tmp_path, srpo):
    few = ["--set", "train.batch_size=2", "--set", "evaluation.prompts=0", "--set", "samples.count=0", "--steps", 1]
    outcome = srpo("train", "--preset", "realism:offline", "--model", "miniature", *few, "--output", tmp_path / "run")
    assert outcome.exit_code == 0, outcome.stderr
    ledger = summary_of(tmp_path / "run")["ledger"]
    assert (ledger["forwards"], ledger["gradient_passes"], ledger["updates"]) == (0, 8, 2)


def test_prompts_come_from_a_file_of_which_every_eighth_is_held_out(tmp_path, tiny, srpo):
    prompts = [
        f"a {colour} {shape} on snow" for colour in ("red", "blue", "green") for shape in ("cube", "cone", "sphere")
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    source = ["--set", f"prompts.source={tmp_path / 'prompts.txt'}", "--set", "samples.count=8"]
    assert srpo(*tiny(tmp_path / "run", *source, steps=1)).exit_code == 0
    drawn = [Image.open(path).text["srpo"] for path in sorted((tmp_path / "run" / "samples/step-000000").iterdir())]
    assert [json.loads(text)["prompt"] for text in drawn] == [prompts[0], prompts[8]]


@pytest.fixture
def lora(tmp_path):
    """A LoRA of the miniature in the file that diffusers writes."""
    transformer = load_file_of_the_miniature()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in transformer.items():
        if name.endswith(("attn.to_q.weight", "attn.to_k.weight")):
            module = name.removesuffix(".weight")
            tensors[f"transformer.{module}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=generator)
            tensors[f"transformer.{module}.lora_B.weight"] = torch.zeros(weight.shape[0], 2)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    return tmp_path / "pytorch_lora_weights.safetensors"


def load_file_of_the_miniature():
    from srpo_cli.miniature import WEIGHTS

    return load_file(next((WEIGHTS / "pipeline" / "transformer").glob("*.safetensors")))


def test_a_lora_is_trained_saved_and_gone_on_with_alone(lora, tmp_path, tiny, srpo, assert_same):
    weights = ["--set", "train.mode=lora", "--set", f"model.weights={lora}"]
    assert srpo(*tiny(tmp_path / "whole", *weights)).exit_code == 0
    assert srpo(*tiny(tmp_path / "half", *weights, steps=2)).exit_code == 0
    trained = load_file(tmp_path / "half/checkpoints/step-000002/transformer/pytorch_lora_weights.safetensors")
    assert trained.keys() == load_file(lora).keys()
    assert all(tensor.any() for tensor in trained.values())
    shutil.rmtree(tmp_path / "half" / "samples")
    assert srpo("train", "--resume", tmp_path / "half", "--steps", "4").exit_code == 0
    assert_same(tmp_path / "half", tmp_path / "whole")
