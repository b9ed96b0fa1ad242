"""What a user can get wrong about a run, and what can go wrong in it: one line, the right exit code, nothing lost."""

import errno
import hashlib
import json
import os
import shutil

import pytest
import torch
from PIL import Image

pytestmark = [pytest.mark.usefixtures("on_the_cpu")]


@pytest.fixture
def one_line(srpo):
    """Runs ``srpo``, which must fail with an exit code and one line of error; returns that line."""

    def run(exit_code, *arguments):
        outcome = srpo(*arguments)
        assert outcome.exit_code == exit_code, outcome.stderr
        assert outcome.stdout == ""
        errors = [line for line in outcome.stderr.splitlines() if not line.startswith(("model: ", "run: "))]
        assert len(errors) == 1, outcome.stderr
        assert errors[0].startswith("error: ")
        return errors[0]

    return run


def contents(folder):
    """Digest of every file by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# Mistakes in what is asked for: no run folder is left in the way of the corrected command


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.size=[64, 64]", "model.size is [64, 64]: the miniature draws [48, 48]"),
        ("model.size=[50, 50]", "multiples of 8"),
        ("prompts.source=EMPTY", "holds no prompt"),
        ("prompts.source=CASTLE", "the miniature cannot draw 'a castle'"),
        ("prompts.source=NOWHERE", "cannot read prompts from"),
        ("rollout.pictures=EMPTY_FOLDER", "holds no picture with a caption"),
        ("rollout.pictures=CASTLES", "the miniature cannot draw 'a castle'"),
        ("rollout.pictures=NOWHERE", "does not exist"),
        ("reward.name=nonsense", "Unknown reward 'nonsense'"),
    ],
)
def test_a_mistake_in_a_setting(setting, message, tmp_path, tiny, one_line):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "castle.txt").write_text("a red cube on snow\na castle\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "castles").mkdir()
    Image.new("RGB", (48, 48)).save(tmp_path / "castles" / "a.png")
    (tmp_path / "castles" / "a.txt").write_text("a castle")
    places = {"EMPTY_FOLDER": "empty", "CASTLES": "castles", "EMPTY": "empty.txt", "CASTLE": "castle.txt"}
    key, _, value = setting.partition("=")
    if value in places or value == "NOWHERE":
        setting = f"{key}={tmp_path / places.get(value, 'nowhere')}"
    source = ["--set", "rollout.source=pictures"] if key == "rollout.pictures" else []
    assert message in one_line(2, *tiny(tmp_path / "run", "--set", setting, *source))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("option", "message"), [("--model", "Unknown model"), ("--reward", "Unknown reward")])
def test_an_unknown_model_or_reward(option, message, tmp_path, tiny, one_line):
    assert message in one_line(2, *tiny(tmp_path / "run", option, "minature"))


def test_missing_weights_come_with_the_command_that_fetches_them(tmp_path, tiny, one_line, monkeypatch):
    monkeypatch.setattr("srpo_cli.rewards.weights.try_to_load_from_cache", lambda *_: None)
    assert "hf download xswu/HPSv2" in one_line(4, *tiny(tmp_path / "run", "--reward", "hpsv2.1"))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_another_run(half, tiny, one_line):
    before = contents(half)
    assert f"holds another run: go on with it by `srpo train --resume {half}`" in one_line(2, *tiny(half))
    assert contents(half) == before


def test_a_folder_that_holds_something_else(tmp_path, tiny, one_line):
    (tmp_path / "thesis.tex").write_text("x")
    assert "is not empty and holds no run" in one_line(2, *tiny(tmp_path))


@pytest.mark.parametrize("place", ["below a file", "read-only"])
def test_a_place_where_nothing_can_be_written(place, tmp_path, tiny, one_line, monkeypatch):
    (tmp_path / "file").touch()
    if place == "read-only":  # root may write anywhere, so that the answer is what is changed here
        monkeypatch.setattr("srpo_cli.runtime.folder.os.access", lambda *_: False)
    folder = tmp_path / ("file" if place == "below a file" else "runs") / "run"
    assert "choose another --output" in one_line(2, *tiny(folder))
    assert not folder.exists()


# Runs that cannot be gone on with


def replace_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def other_version(run):
    replace_json(run / "environment.json", lambda it: it["packages"].update(torch="1.0.0"))


def other_device(run):
    replace_json(run / "environment.json", lambda it: it.update(device="cuda"))


def fewer_rollouts_than_processes(run):
    replace_json(run / "environment.json", lambda it: it.update(batch=0))


def no_environment(run):
    (run / "environment.json").write_text("{")


def other_configuration(run):
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("batch_size: 2", "batch_size: 3"))


def unreadable_configuration(run):
    (run / "config.yaml").write_text("train: [")


def foreign_checkpoint(run):
    replace_json(run / "checkpoints/step-000002/state.json", lambda it: it.update(config="0123456789abcdef"))


def other_step(run):
    (run / "checkpoints/step-000002").rename(run / "checkpoints/step-000003")


def other_prompts(run):
    replace_json(run / "checkpoints/step-000002/state.json", lambda it: it.update(prompts="0123456789abcdef"))


def other_model_files(run):
    replace_json(run / "checkpoints/step-000002/state.json", lambda it: it.update(frozen="0123456789abcdef"))


def cut_off(name):
    def cut(run):
        path = run / "checkpoints/step-000002" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def no_transformer(run):
    shutil.rmtree(run / "checkpoints/step-000002/transformer")


def optimizer_of_another_model(run):
    path = run / "checkpoints/step-000002/optimizer.pt"
    state = torch.load(path, weights_only=True)
    for moments in state["state"].values():
        moments["exp_avg"] = torch.zeros(3, 5)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("harm", "exit_code", "message"),
    [
        (other_version, 2, "was begun with torch 1.0.0, here is"),
        (other_device, 2, "was begun on cuda, here is cpu"),
        (fewer_rollouts_than_processes, 2, "has 0 rollout(s), here are 1 processes: start 0 at most"),
        (no_environment, 1, "environment.json cannot be read"),
        (other_configuration, 2, "belongs to another configuration"),
        (unreadable_configuration, 2, "config.yaml"),
        (foreign_checkpoint, 2, "belongs to another configuration"),
        (other_step, 1, "damaged or foreign (state.json)"),
        (other_prompts, 2, "the prompts or pictures have changed"),
        (other_model_files, 2, "the files of the model or the reward have changed"),
        (cut_off("transformer/diffusion_pytorch_model.safetensors"), 1, "damaged or foreign (transformer)"),
        (cut_off("optimizer.pt"), 1, "damaged or foreign (optimizer.pt)"),
        (cut_off("state.json"), 1, "damaged or foreign (state.json)"),
        (no_transformer, 1, "damaged or foreign (transformer)"),
        (optimizer_of_another_model, 1, "damaged or foreign (optimizer.pt)"),
    ],
)
def test_a_run_that_cannot_be_gone_on_with_exactly(harm, exit_code, message, half_copy, one_line):
    harm(half_copy)
    before = contents(half_copy)
    assert message in one_line(exit_code, "train", "--resume", half_copy, "--steps", "4")
    assert contents(half_copy) == before


def test_a_damaged_checkpoint_can_be_done_without(half_copy, one_line, srpo, finished, assert_same):
    cut_off("optimizer.pt")(half_copy)
    error = one_line(1, "train", "--resume", half_copy, "--steps", "4")
    assert error.endswith("remove it, and the resumed run starts over")
    shutil.rmtree(half_copy / "checkpoints/step-000002")
    assert srpo("train", "--resume", half_copy, "--steps", "4").exit_code == 0
    assert_same(half_copy, finished)


def test_fewer_steps_than_were_done(half_copy, one_line):
    assert "has done 2 steps already: --steps 1 is fewer" in one_line(2, "train", "--resume", half_copy, "--steps", "1")


# What goes wrong on the way


@pytest.fixture
def rewards_fail_at(monkeypatch):
    """Makes the reward give NaN for pictures that have a gradient, from a call on."""
    from srpo_cli.rewards.clip import ClipReward

    original = ClipReward.scores

    def at(call):
        calls = []

        def scores(reward, images, *texts):
            given = original(reward, images, *texts)
            calls.extend([1] * images.requires_grad)
            return tuple(score * float("nan") for score in given) if len(calls) >= call else given

        monkeypatch.setattr(ClipReward, "scores", scores)

    return at


@pytest.mark.parametrize("pair", [1, 2])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_every_completed_step(
    pair, rewards_fail_at, finished, tmp_path, tiny, srpo, assert_same, monkeypatch
):
    run = tmp_path / "run"
    with monkeypatch.context():
        rewards_fail_at(2 * 2 + pair)  # in step 3, which takes two pairs as every step, both branches in one call
        outcome = srpo(*tiny(run, "--set", "checkpoint.every=0"))
    assert outcome.exit_code == 1
    assert outcome.stderr.splitlines()[-1] == (
        "error: loss nan with gradient norm nan at step 3: the 2 before it are saved; start a new run with a lower "
        f"optimizer.lr (now 2e-05) and --set model.weights={run}/checkpoints/step-000002/transformer"
    )
    assert_same(run, finished, step=2)


def test_what_the_message_of_a_lost_run_says_can_be_done(finished, tmp_path, tiny, srpo):
    weights = finished / "checkpoints/step-000002/transformer"
    assert srpo(*tiny(tmp_path / "run", "--set", f"model.weights={weights}", steps=1)).exit_code == 0


def test_a_loss_that_is_never_finite_leaves_nothing_to_save(rewards_fail_at, tmp_path, tiny, one_line):
    rewards_fail_at(1)
    error = one_line(1, *tiny(tmp_path / "run", "--quiet"))
    assert error.endswith("at step 1: start a new run with a lower optimizer.lr (now 2e-05)")
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_at_a_checkpoint(half_copy, finished, srpo, one_line, monkeypatch, assert_same):
    before = contents(half_copy / "checkpoints")

    def no_space(state, path):
        path.write_bytes(b"as far as it goes")
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr("srpo_cli.runtime.checkpoints.torch.save", no_space)
        error = one_line(1, "train", "--resume", half_copy, "--steps", "4", "--quiet")
    assert "is full: free some space, then resume the run" in error
    assert contents(half_copy / "checkpoints") == before, "the last checkpoint is whole, the half one gone"
    assert srpo("train", "--resume", half_copy).exit_code == 0
    assert_same(half_copy, finished)


def test_a_disk_that_is_full_when_a_step_is_logged(half_copy, finished, srpo, one_line, monkeypatch, assert_same):
    with monkeypatch.context() as patch:

        def no_space(descriptor):
            raise FULL

        patch.setattr("srpo_cli.runtime.folder.os.fsync", no_space)
        assert "is full" in one_line(1, "train", "--resume", half_copy, "--quiet", "--steps", "4")
    assert srpo("train", "--resume", half_copy, "--steps", "4").exit_code == 0
    assert_same(half_copy, finished)


def test_a_picture_that_cannot_be_read_ends_the_run_after_what_was_learnt(tmp_path, tiny, srpo):
    rows = []
    for i in range(6):
        Image.new("RGB", (48, 48)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "prompt": "a red cube on snow"}))
    (tmp_path / "5.png").write_bytes(b"no picture")
    (tmp_path / "list.jsonl").write_text("\n".join(rows))
    source = ["--set", "rollout.source=pictures", "--set", f"rollout.pictures={tmp_path / 'list.jsonl'}"]
    outcome = srpo(*tiny(tmp_path / "run", *source, "--set", "checkpoint.every=0"))
    assert outcome.exit_code == 2
    assert "5.png is not a picture" in outcome.stderr.splitlines()[-1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_became_read_only(half_copy, one_line):
    for folder in (half_copy, half_copy / "checkpoints"):
        folder.chmod(0o500)
    assert "choose another --output" in one_line(2, "train", "--resume", half_copy, "--steps", "4", "--quiet")
