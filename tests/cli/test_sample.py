"""``srpo sample`` as it is typed: every way to give prompts and models, what it leaves behind, and what it refuses."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from srpo_cli.config.load import dump_yaml, load_train_config
from srpo_cli.miniature import WEIGHTS
from srpo_cli.recipes import sample as recipe
from srpo_cli.runtime.pictures import read_metadata

RED, BLUE = "a red sphere on a wooden table", "a blue cone on snow, dark"
QUICK = ("--steps", "2")
TRANSFORMER = WEIGHTS / "pipeline" / "transformer"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test types its commands in an empty folder, on a machine without an accelerator."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("srpo_cli.runtime.devices.has_accelerator", lambda: False)
    monkeypatch.setattr(recipe, "best_device", lambda: torch.device("cpu"))
    return tmp_path


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A run folder with one checkpoint, whose transformer is the miniature's with every weight 2 % larger."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    checkpoint = run / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    resolved = load_train_config("realism", flags={"model.name": "miniature"}, miniature=True)
    (run / "config.yaml").write_text(dump_yaml(resolved))
    (checkpoint / "state.json").write_text('{"step": 2}')
    transformer = FluxTransformer2DModel.from_pretrained(TRANSFORMER, dtype=torch.float32)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.02)
    transformer.save_pretrained(checkpoint / "transformer")
    return run


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """A LoRA file, made by peft and written by diffusers."""
    transformer = FluxTransformer2DModel.from_pretrained(TRANSFORMER, dtype=torch.float32)
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    torch.manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("lora")
    FluxPipeline.save_lora_weights(folder, get_peft_model_state_dict(transformer))
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture
def draws(monkeypatch) -> list[int]:
    """How many pictures each call of the model drew."""
    calls, draw = [], recipe.draw_pictures

    def counted(model, prompts, *rest):
        calls.append(len(prompts))
        return draw(model, prompts, *rest)

    monkeypatch.setattr(recipe, "draw_pictures", counted)
    return calls


def rows_of(outcome) -> list[dict]:
    assert outcome.exit_code == 0, outcome.stderr
    return [json.loads(line) for line in outcome.stdout.splitlines()]


def pixels(path: str | Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


def whole_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder; every file in it must be a whole one or samples.jsonl."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != recipe.SAMPLES]
    for path in files:
        Image.open(path).load()
    return [path for path in files if read_metadata(path)]


# --- what it draws ------------------------------------------------------------------------------------------------


def test_prompts_as_arguments_leave_pictures_a_grid_and_rows(srpo, elsewhere):
    rows = rows_of(srpo("sample", RED, BLUE, "--num-images", 2, "--seed", 5, *QUICK, "--output", "out"))
    assert [(row["prompt"], row["seed"]) for row in rows] == [(RED, 5), (RED, 6), (BLUE, 5), (BLUE, 6)]
    for row in rows:
        assert Image.open(row["file"]).size == (48, 48)
        assert read_metadata(row["file"]) == {**row, "file": Path(row["file"]).name}
        assert (row["model"], row["weights"], row["steps"], row["guidance"]) == ("miniature", None, 2, 3.5)
    assert len({pixels(row["file"]).tobytes() for row in rows}) == 4
    listed = [json.loads(line) for line in (elsewhere / "out" / "samples.jsonl").read_text().splitlines()]
    assert listed == [read_metadata(row["file"]) for row in rows]
    assert (elsewhere / "out" / "grid.png").is_file()


def test_without_a_folder_they_go_to_samples(srpo, elsewhere):
    outcome = srpo("sample", RED, *QUICK)
    assert rows_of(outcome)[0]["file"].startswith("samples/a-red-sphere-on-a-wooden-table-seed0-")
    assert "built-in miniature" in outcome.stderr and "samples/grid.png" in outcome.stderr


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", f"{RED}\n\n{BLUE}\n"),
        ("p.jsonl", "".join(json.dumps({"id": 1, "prompt": prompt}) + "\n" for prompt in (RED, BLUE))),
        ("p.csv", f'id,prompt\n1,{RED}\n2,"{BLUE}"\n'),
    ],
)
def test_prompts_come_from_a_file_or_from_stdin(srpo, elsewhere, monkeypatch, name, text):
    (elsewhere / name).write_text(text)
    assert [row["prompt"] for row in rows_of(srpo("sample", "--prompts", name, *QUICK))] == [RED, BLUE]
    if name != "p.csv":
        with open(elsewhere / name) as file:
            monkeypatch.setattr("sys.stdin", file)
            rows = rows_of(srpo("sample", "a green cube", "--prompts", "-", *QUICK))
        assert [row["prompt"] for row in rows] == ["a green cube", RED, BLUE]


def test_rows_of_one_call_are_prompts_of_the_next(srpo, elsewhere):
    (elsewhere / "rows.jsonl").write_text(srpo("sample", RED, BLUE, *QUICK).stdout)
    rows = rows_of(srpo("sample", "--prompts", "rows.jsonl", "--seed", 1, *QUICK))
    assert [(row["prompt"], row["seed"]) for row in rows] == [(RED, 1), (BLUE, 1)]


def test_a_prompt_given_twice_is_drawn_once(srpo, draws):
    assert len(rows_of(srpo("sample", RED, BLUE, RED, *QUICK))) == 2
    assert draws == [2]


def test_every_kind_of_weights_is_found(srpo, tuned, lora, elsewhere):
    checkpoint = tuned / "checkpoints" / "step-000002"
    bare = elsewhere / "bare"
    shutil.copytree(checkpoint / "transformer", bare)
    shutil.copytree(WEIGHTS / "pipeline", elsewhere / "pipeline")
    base = rows_of(srpo("sample", RED, *QUICK))[0]
    same_as_base = rows_of(srpo("sample", RED, "--model", "pipeline", *QUICK))[0]
    assert Path(same_as_base["file"]) == Path(base["file"])
    named = [
        rows_of(srpo("sample", RED, "--model", name, *QUICK, *more))[0]
        for name, more in (
            (tuned, ()),
            (checkpoint, ()),
            (checkpoint / "transformer", ()),
            (bare, ("--base", "miniature")),
        )
    ]
    assert len({row["file"] for row in named}) == 1, "the same weights give the same picture"
    on_lora = rows_of(srpo("sample", RED, "--model", lora, "--base", "miniature", *QUICK))[0]
    assert on_lora["weights"] == str(lora)
    difference = [np.abs(pixels(row["file"]) - pixels(base["file"])).max() for row in (named[0], on_lora)]
    assert min(difference) > 8


def test_a_run_is_drawn_at_its_best_and_the_rows_say_which_checkpoint_that_is(srpo, tuned, elsewhere):
    run = shutil.copytree(tuned, elsewhere / "run")
    newer = shutil.copytree(run / "checkpoints" / "step-000002", run / "checkpoints" / "step-000003")
    (newer / "state.json").write_text('{"step": 3}')

    def drawn_with(name):
        return Path(rows_of(srpo("sample", RED, "--model", name, *QUICK))[0]["weights"])

    assert drawn_with("run") == newer / "transformer"
    (run / "best").symlink_to("checkpoints/step-000002")
    for name in ("run", "run/best"):
        assert drawn_with(name) == run / "checkpoints" / "step-000002" / "transformer"
    assert drawn_with("run/checkpoints/step-000003") == newer / "transformer"


def test_a_checkpoint_is_found_from_inside(srpo, tuned, monkeypatch, elsewhere):
    monkeypatch.chdir(tuned / "checkpoints" / "step-000002")
    assert rows_of(srpo("sample", RED, "--model", ".", "--output", elsewhere / "out", *QUICK))


@pytest.mark.parametrize(
    "change", [("--seed", "1"), ("--steps", "3"), ("--guidance", "1.5"), ("--size", "32x64")], ids=lambda c: c[0]
)
def test_a_changed_setting_draws_anew_beside_the_old(srpo, draws, change):
    model = ("--model", WEIGHTS / "pipeline")  # by its folder, because the miniature itself has one size
    first = rows_of(srpo("sample", RED, *model, *QUICK))[0]
    second = rows_of(srpo("sample", RED, *model, *QUICK, *change))[0]
    assert draws == [1, 1]
    assert second["file"] != first["file"] and Path(first["file"]).is_file()
    old, new = pixels(first["file"]), pixels(second["file"])
    assert new.shape == ((32, 64, 3) if change[0] == "--size" else (48, 48, 3))
    assert old.shape != new.shape or np.abs(old - new).max() > 0
    assert read_metadata(second["file"])["size"] == list(new.shape[:2])


def test_what_exists_is_not_drawn_again(srpo, draws):
    once = rows_of(srpo("sample", RED, BLUE, *QUICK))
    times = [os.stat(row["file"]).st_mtime_ns for row in once]
    again = rows_of(srpo("sample", RED, BLUE, *QUICK))
    assert again == once
    assert [os.stat(row["file"]).st_mtime_ns for row in once] == times
    more = rows_of(srpo("sample", RED, BLUE, "--num-images", 2, *QUICK))
    assert draws == [2, 2] and [more[0], more[2]] == once


def test_a_cut_off_picture_is_drawn_again(srpo, draws):
    file = Path(rows_of(srpo("sample", RED, *QUICK))[0]["file"])
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 2 // 3])
    rows_of(srpo("sample", RED, *QUICK))
    assert draws == [1, 1] and file.read_bytes() == whole


def test_other_weights_at_the_same_path_draw_anew(srpo, tuned, elsewhere):
    bare = elsewhere / "bare"
    shutil.copytree(tuned / "checkpoints" / "step-000002" / "transformer", bare)
    first = rows_of(srpo("sample", RED, "--model", bare, *QUICK))[0]
    shutil.rmtree(bare)
    shutil.copytree(TRANSFORMER, bare)
    second = rows_of(srpo("sample", RED, "--model", bare, *QUICK))[0]
    assert first["weights"] == second["weights"] and first["file"] != second["file"]


def test_samples_jsonl_lists_what_is_there(srpo, elsewhere):
    def listed() -> list[str]:
        lines = (elsewhere / "samples" / "samples.jsonl").read_text().splitlines()
        return [json.loads(line)["prompt"] for line in lines]

    first = rows_of(srpo("sample", RED, *QUICK))[0]
    rows_of(srpo("sample", BLUE, *QUICK))
    assert listed() == [RED, BLUE]
    with open(elsewhere / "samples" / "samples.jsonl", "a") as file:
        file.write('{"file": "cut')
    Path(first["file"]).unlink()
    rows_of(srpo("sample", "a green cube", *QUICK))
    assert listed() == [BLUE, "a green cube"]


def test_compare_draws_the_same_seeds_side_by_side(srpo, tuned, elsewhere):
    outcome = srpo("sample", RED, BLUE, "--compare", "miniature", "--compare", f"after={tuned}", "-n", 2, *QUICK)
    rows = rows_of(outcome)
    made = [(row["label"], row["prompt"], row["seed"]) for row in rows]
    assert made == [(label, p, seed) for label in ("miniature", "after") for p in (RED, BLUE) for seed in (0, 1)]
    assert all(Path(row["file"]).parent == Path("samples") / row["label"] for row in rows)
    assert "samples/compare.png" in outcome.stderr
    sheet = pixels("samples/compare.png")
    # Each picture stands in the sheet as it is, three times as large: four columns, a row for each model.
    left = sheet.shape[1] - 4 * 148 - 4
    for i, row in enumerate(rows):
        y, x = 4 + i // 4 * 148, left + 4 + i % 4 * 148
        assert (sheet[y : y + 144 : 3, x : x + 144 : 3] == pixels(row["file"])).all()


def test_a_label_comes_from_the_folder_even_with_an_equals_sign_in_it(srpo, tuned, elsewhere):
    odd = elsewhere / "runs" / "lr=1e-5"
    shutil.copytree(tuned, odd)
    rows = rows_of(srpo("sample", RED, "--compare", "miniature", "--compare", "runs/lr=1e-5", *QUICK))
    assert [row["label"] for row in rows] == ["miniature", "lr-1e-5"]


def test_a_lora_scale_draws_anew_beside_the_old_and_1_is_what_was_there(srpo, lora, draws):
    model = ("--model", lora, "--base", "miniature")
    trained = rows_of(srpo("sample", RED, *model, *QUICK))
    assert rows_of(srpo("sample", RED, *model, "--lora-scale", 1, *QUICK)) == trained and draws == [1]
    (half,) = rows_of(srpo("sample", RED, *model, "--lora-scale", "0.5", *QUICK))
    assert rows_of(srpo("sample", RED, *model, "--lora-scale", ".50", *QUICK)) == [half] and draws == [1, 1]
    assert (half["lora_scale"], trained[0]["lora_scale"]) == (0.5, 1)
    assert half["file"] != trained[0]["file"] and (pixels(half["file"]) != pixels(trained[0]["file"])).any()


def test_several_lora_scales_are_drawn_side_by_side(srpo, lora, elsewhere):
    command = ("sample", RED, BLUE, "--model", lora, "--base", "miniature", "--lora-scale", "0,0.5,1.0", *QUICK)
    outcome = srpo(*command)
    rows = rows_of(outcome)
    made = [(row["label"], row["lora_scale"], row["prompt"]) for row in rows]
    assert made == [
        (f"scale-{name}", scale, p) for name, scale in (("0", 0), ("0.5", 0.5), ("1", 1)) for p in (RED, BLUE)
    ]
    assert all(Path(row["file"]).parent == Path("samples") / row["label"] for row in rows)
    assert "samples/compare.png" in outcome.stderr
    base = rows_of(srpo("sample", RED, BLUE, "--model", "miniature", "--output", "base", *QUICK))
    assert all((pixels(row["file"]) == pixels(plain["file"])).all() for row, plain in zip(rows[:2], base, strict=True))
    sheet = pixels("samples/compare.png")
    left = sheet.shape[1] - 2 * 148 - 4  # as for models: two columns, a row for each scale
    for i, row in enumerate(rows):
        y, x = 4 + i // 2 * 148, left + 4 + i % 2 * 148
        assert (sheet[y : y + 144 : 3, x : x + 144 : 3] == pixels(row["file"])).all()


@pytest.mark.parametrize("place", ["run", "checkpoint"])
def test_of_a_run_the_lora_is_scaled_and_not_what_it_was_trained_on(srpo, tuned, lora, elsewhere, place):
    beneath = tuned / "checkpoints" / "step-000002" / "transformer"
    flags = {"model.name": "miniature", "model.weights": str(beneath), "train.mode": "lora"}
    checkpoint = elsewhere / "run" / "checkpoints" / "step-000004"
    (checkpoint / "transformer").mkdir(parents=True)
    shutil.copy(lora, checkpoint / "transformer")
    (checkpoint / "state.json").write_text('{"step": 4}')
    (elsewhere / "run" / "config.yaml").write_text(dump_yaml(load_train_config("realism", flags=flags, miniature=True)))
    model = elsewhere / "run" if place == "run" else checkpoint
    (nothing,) = rows_of(srpo("sample", RED, "--model", model, "--lora-scale", 0, *QUICK))
    (whole,) = rows_of(srpo("sample", RED, "--model", model, *QUICK))
    (alone,) = rows_of(srpo("sample", RED, "--model", tuned, *QUICK))
    assert (pixels(nothing["file"]) == pixels(alone["file"])).all()
    assert np.abs(pixels(whole["file"]) - pixels(alone["file"])).max() > 8


# --- what it refuses ----------------------------------------------------------------------------------------------


def refusal(outcome, exit_code: int) -> str:
    """The one line of an error, after what was said of the device."""
    assert outcome.exit_code == exit_code, outcome
    assert outcome.stdout == ""
    *before, line = outcome.stderr.splitlines()
    assert all("built-in miniature" in other for other in before)
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs a prompt"),
        (("",), "needs a prompt"),
        (("--prompts", "empty.txt"), "empty.txt holds no prompt"),
        (("--prompts", "nope.txt"), "cannot read prompts from nope.txt"),
        (("a cat on a sofa",), "cannot draw 'a cat on a sofa'"),
        ((RED, "--size", "64x48"), "size 64x48: the miniature draws 48x48 and no other"),
        ((RED, "--size", "50", "--model", WEIGHTS / "pipeline"), "cannot make 50x50 px: both sides must be multiples"),
        ((RED, "--size", "48 48"), "--size 48 48: give one number"),
        ((RED, "--size", "0"), "--size 0"),
        ((RED, "--seed", str(2**60)), "too large"),
        ((RED, "--compare", "miniature"), "alone compares nothing"),
        ((RED, "--compare", "miniature", "--compare", "miniature"), "a label of its own"),
        ((RED, "--compare", "..=miniature", "--compare", "miniature"), "a label of its own"),
        ((RED, "--compare", "miniature", "--compare", "b=x", "--model", "y"), "cannot be used together"),
        ((RED, "--model", "flux.1-dv"), "Did you mean 'flux.1-dev'?"),
        ((RED, "--base", "miniture"), "Did you mean 'miniature'?"),
        ((RED, "--base", "runs", "--model", "empty.txt"), "--base runs is no base model"),
        ((RED, "--model", "runs/nope"), "runs/nope does not exist"),
        ((RED, "--model", "nope.safetensors"), "nope.safetensors does not exist"),
        ((RED, "--model", "runs"), "runs is no run, checkpoint, pipeline, transformer or LoRA"),
        ((RED, "--lora-scale", "-0.5"), "--lora-scale -0.5: give numbers from 0 to 10"),
        ((RED, "--lora-scale", "nan"), "--lora-scale nan: give numbers"),
        ((RED, "--lora-scale", "inf"), "--lora-scale inf: give numbers"),
        ((RED, "--lora-scale", "10.5"), "--lora-scale 10.5: give numbers"),
        ((RED, "--lora-scale", "1,-0.5"), "--lora-scale 1,-0.5: give numbers"),
        ((RED, "--lora-scale", "0,,1"), "--lora-scale 0,,1: give numbers"),
        ((RED, "--lora-scale", ""), "as in 0.5 or 0,0.5,1"),
        ((RED, "--lora-scale", "0.5"), "lora scale 0.5: miniature has no LoRA to scale"),
        ((RED, "--lora-scale", "1"), "lora scale 1: miniature has no LoRA to scale"),
        ((RED, "--lora-scale", "1,2", "--compare", "miniature", "--compare", "b=x"), "cannot be used together"),
        ((RED, "--output", "empty.txt"), "cannot write to empty.txt"),
        ((RED, "--output", "empty.txt/below"), "choose another --output"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(srpo, elsewhere, arguments, message):
    (elsewhere / "empty.txt").write_text(" \n\n")
    (elsewhere / "runs").mkdir()
    assert message in refusal(srpo("sample", *arguments), 2)
    assert not list(elsewhere.rglob("*.png"))


def test_a_base_that_is_not_needed_is_refused(srpo, tuned):
    assert "of no use" in refusal(srpo("sample", RED, "--model", tuned, "--base", "flux.1-dev"), 2)


def test_a_fine_tune_of_all_weights_has_no_lora_to_scale(srpo, tuned, elsewhere):
    line = refusal(srpo("sample", RED, "--model", tuned, "--lora-scale", "0,1"), 2)
    assert "step-000002/transformer has no LoRA to scale" in line and "srpo export RUN --format extract" in line
    assert not (elsewhere / "samples").exists()


def test_a_run_without_a_checkpoint_is_refused(srpo, tuned, elsewhere):
    (elsewhere / "begun").mkdir()
    shutil.copy(tuned / "config.yaml", "begun")
    assert "holds no checkpoint" in refusal(srpo("sample", RED, "--model", "begun"), 2)


def test_missing_weights_come_with_the_command_that_fetches_them(srpo, monkeypatch, elsewhere):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(elsewhere / "hub"))
    line = refusal(srpo("sample", RED, "--model", "flux.1-dev"), 4)
    assert "hf download black-forest-labs/FLUX.1-dev" in line


@pytest.mark.parametrize("damage", ["cut off", "not tensors", "of another model", "a pickle"])
def test_damaged_and_foreign_weights_are_named(srpo, tuned, elsewhere, damage):
    bare = elsewhere / "bare"
    shutil.copytree(tuned / "checkpoints" / "step-000002" / "transformer", bare)
    tensors = bare / "diffusion_pytorch_model.safetensors"
    if damage == "cut off":
        tensors.write_bytes(tensors.read_bytes()[:100_000])
    elif damage == "not tensors":
        tensors.write_bytes(b"hello" * 1000)
    elif damage == "of another model":
        shutil.copy(WEIGHTS / "reward" / "reward.safetensors", tensors)
    else:
        bare = elsewhere / "evil.pt"
        torch.save({"weight": torch.zeros(2)}, bare)
    line = refusal(srpo("sample", RED, "--model", bare, "--base", "miniature"), 2 if damage == "a pickle" else 1)
    assert str(bare) in line


@pytest.mark.parametrize("content", [b"hello", None], ids=["no tensors", "another model's"])
def test_a_damaged_or_foreign_lora_is_named(srpo, elsewhere, content):
    file = elsewhere / "style.safetensors"
    if content:
        file.write_bytes(content)
    else:
        shutil.copy(WEIGHTS / "reward" / "reward.safetensors", file)
    assert "style.safetensors" in refusal(srpo("sample", RED, "--model", file, "--base", "miniature"), 1)


def test_a_read_only_disk_is_one_line(srpo, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "cannot write to out (Read-only file system)" in refusal(srpo("sample", RED, "--output", "out"), 2)


def test_a_full_disk_is_one_line_and_leaves_whole_pictures(srpo, monkeypatch, elsewhere):
    from srpo_cli.runtime import pictures

    write, left = pictures.write_atomically, [3]

    def until_full(path, content):
        from srpo_cli.runtime.folder import disk_errors

        left[0] -= 1
        with disk_errors(path.parent):
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(pictures, "write_atomically", until_full)
    outcome = srpo("sample", RED, "-n", 5, *QUICK)
    assert outcome.exit_code == 1
    assert "full" in outcome.stderr.splitlines()[-1]
    assert len(whole_pictures(elsewhere / "samples")) == 3


# --- as a process among others ------------------------------------------------------------------------------------


def start(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "srpo_cli", "sample", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **options},
        # A test run that a shell put into the background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_a_closed_pipe_ends_it_without_a_traceback(elsewhere):
    process = start(RED, "--num-images", "24", "--model", "miniature", *QUICK)
    assert json.loads(process.stdout.readline())["seed"] == 0
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    assert whole_pictures(elsewhere / "samples")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_drawing_leaves_whole_pictures_and_goes_on(srpo, elsewhere, draws, number):
    process = start(RED, "--num-images", "64", "--model", "miniature", "--steps", "12")
    assert process.stdout.readline()
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert errors == ("stopped: the same command draws what is missing\n" if number == signal.SIGINT else "")
    for path in elsewhere.rglob("*.tmp"):
        path.unlink()  # a kill may come between the writing of a file and its renaming
    before = whole_pictures(elsewhere / "samples")
    assert 8 <= len(before) < 64
    times = [path.stat().st_mtime_ns for path in before]
    time.sleep(0.01)
    rows = rows_of(srpo("sample", RED, "--num-images", 64, "--model", "miniature", "--steps", 12))
    assert len(rows) == 64 and sum(draws) == 64 - len(before)
    assert [path.stat().st_mtime_ns for path in before] == times


@pytest.mark.parametrize("columns", [80, 120])
def test_the_help_fits_and_ends_with_examples(srpo, monkeypatch, columns):
    from typer.testing import CliRunner

    from srpo_cli.cli.app import app
    from srpo_cli.cli.sample import EXAMPLES

    help_text = CliRunner().invoke(app, ["sample", "--help"], env={"COLUMNS": str(columns), "NO_COLOR": "1"}).stdout
    lines = [line.rstrip() for line in help_text.splitlines()]
    assert max(map(len, lines)) <= columns
    assert [line.strip() for line in lines[lines.index(" Examples:") :] if line] == EXAMPLES.split("\n\n")
