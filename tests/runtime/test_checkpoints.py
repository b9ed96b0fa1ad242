"""Checkpoints: what comes back is what was saved, a damaged one is named, nothing is unpickled."""

import json
import shutil

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import save_file

from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.runtime import checkpoints
from srpo_cli.runtime.checkpoints import (
    OPTIMIZER,
    best_checkpoint,
    find_checkpoint,
    link_best,
    list_checkpoints,
    newest_checkpoint,
    save_checkpoint,
    save_masters,
)
from srpo_cli.runtime.trained import Trained


@pytest.fixture
def trained():
    """A layer after its first step, and what writes it."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    held = Trained(dict(layer.named_parameters()), torch.optim.AdamW(layer.parameters(), 1e-2))
    layer(torch.randn(4, 3)).sum().backward()
    held.step(1e-2)

    def write(folder):
        (folder / "transformer").mkdir()
        save_file({"weight": layer.weight.detach()}, folder / "transformer" / "weights.safetensors")
        torch.save(held.optimizer_state(), folder / OPTIMIZER)

    return write, held


def untrained():
    layer = torch.nn.Linear(3, 2)
    return Trained(dict(layer.named_parameters()), torch.optim.AdamW(layer.parameters(), 1e-3))


def test_the_optimizer_comes_back_exactly(tmp_path, trained):
    write, held = trained
    checkpoint = save_checkpoint(tmp_path, 20, write, {"ledger": {"updates": 1}}, keep=2)
    assert checkpoint.path.name == "step-000020"
    assert checkpoint.state() == {"step": 20, "ledger": {"updates": 1}}
    other = untrained()
    checkpoint.load_optimizer(other.load_optimizer_state)
    mine, theirs = (one.optimizer_state()["state"] for one in (held, other))
    assert len(mine) == 2
    for index in mine:
        for name in mine[index]:
            assert torch.equal(mine[index][name], theirs[index][name])


def test_weights_of_several_files_are_found_by_diffusers(tmp_path, monkeypatch):
    torch.manual_seed(0)
    shape = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    width = {"in_channels": 16, "joint_attention_dim": 24, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6)}
    model = FluxTransformer2DModel(**shape, **width)
    monkeypatch.setattr(checkpoints, "_FILE_BYTES", 100_000)
    asked = []

    def masters():
        for name, parameter in model.named_parameters():
            asked.append(name)
            yield name, parameter.detach()

    save_masters(tmp_path / "transformer", model, masters())
    files = sorted(path.name for path in (tmp_path / "transformer").glob("*.safetensors"))
    assert len(files) > 2 and files[0].endswith(f"-00001-of-{len(files):05d}.safetensors")
    index = json.loads((tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(parameter.numel() * 4 for parameter in model.parameters())
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), again.parameters(), strict=True))
    whole, asked[:] = list(asked), []
    save_masters(None, model, masters())  # a rank that writes nothing gives all of its parts all the same
    assert asked == whole


def test_only_the_newest_are_kept_and_the_newest_is_found(tmp_path, trained):
    (tmp_path / "checkpoints").mkdir()
    for step in (10, 20, 30):
        save_checkpoint(tmp_path / "checkpoints", step, trained[0], {}, keep=2)
    assert [c.step for c in list_checkpoints(tmp_path / "checkpoints")] == [20, 30]
    assert find_checkpoint(tmp_path).step == 30
    assert find_checkpoint(tmp_path / "checkpoints" / "step-000020").step == 20


def test_a_half_written_checkpoint_is_none(tmp_path):
    (tmp_path / "checkpoints" / ".step-000010.tmp").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)


def test_what_a_killed_process_left_half_done_is_cleared_away(tmp_path, trained):
    for left in (".step-000005.tmp", ".step-000002.old.tmp"):
        (tmp_path / left / "transformer").mkdir(parents=True)
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, 10, trained[0], {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]


def test_a_write_that_fails_leaves_the_checkpoints_that_were_there(tmp_path, trained):
    def no_space(folder):
        (folder / "weights.safetensors").write_bytes(b"as far as it goes")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    save_checkpoint(tmp_path, 10, trained[0], {}, keep=1)
    with pytest.raises(SrpoError, match=r"No space left .* MiB free: free some space, then resume"):
        save_checkpoint(tmp_path, 20, no_space, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]


def test_weights_that_were_cut_off_are_found_without_reading_them(tmp_path, trained):
    checkpoint = save_checkpoint(tmp_path, 10, trained[0], {}, keep=1)
    checkpoint.check_transformer()
    file = checkpoint.transformer / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SrpoError, match=r"transformer\): remove it, and the resumed run starts over"):
        checkpoint.check_transformer()
    file.unlink()
    with pytest.raises(SrpoError, match="transformer"):
        checkpoint.check_transformer()


def test_a_damaged_checkpoint_says_which_one_is_before_it(tmp_path, trained):
    save_checkpoint(tmp_path, 10, trained[0], {}, keep=2)
    newest = save_checkpoint(tmp_path, 20, trained[0], {}, keep=2)
    (newest.path / "state.json").write_text("[]")
    with pytest.raises(SrpoError, match="goes on from step-000010"):
        newest.state()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04\x95cos\nsystem\n."])
def test_a_damaged_optimizer_file_is_named(tmp_path, trained, content):
    checkpoint = save_checkpoint(tmp_path, 1, trained[0], {}, keep=1)
    (checkpoint.path / "optimizer.pt").write_bytes(content)
    with pytest.raises(SrpoError, match=r"optimizer\.pt"):
        checkpoint.load_optimizer(trained[1].load_optimizer_state)


def test_a_pickle_is_refused_and_never_run(tmp_path, trained):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    checkpoint = save_checkpoint(tmp_path, 1, trained[0], {}, keep=1)
    (checkpoint.path / "optimizer.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SrpoError, match="damaged"):
        checkpoint.load_optimizer(trained[1].load_optimizer_state)
    assert not (tmp_path / "owned").exists()


# The best one


@pytest.fixture
def run(tmp_path, trained):
    """A run's folder with checkpoints of the steps 10, 20 and 30."""
    (tmp_path / "checkpoints").mkdir()
    for step in (10, 20, 30):
        save_checkpoint(tmp_path / "checkpoints", step, trained[0], {}, keep=5)
    return tmp_path


def best_of(run, place):
    link_best(run, list_checkpoints(run / "checkpoints")[place])


def test_the_best_checkpoint_is_what_a_run_is_known_by_and_the_newest_what_it_goes_on_from(run):
    assert find_checkpoint(run).step == newest_checkpoint(run).step == 30
    best_of(run, 0)
    assert (find_checkpoint(run).step, newest_checkpoint(run).step) == (10, 30)
    assert find_checkpoint(run).path.resolve() == run / "checkpoints" / "step-000010"
    assert find_checkpoint(run / "best").step == 10
    assert find_checkpoint(run / "checkpoints" / "step-000020").step == 20


def test_the_link_moves_is_relative_and_goes(run):
    best_of(run, 0)
    best_of(run, 1)
    assert (run / "best").readlink().as_posix() == "checkpoints/step-000020"
    moved = run.rename(run.with_name("moved"))
    assert find_checkpoint(moved).step == 20
    link_best(moved, None)
    assert not (moved / "best").is_symlink()
    link_best(moved, None)  # there is none
    assert sorted(path.name for path in moved.iterdir()) == ["checkpoints"]


def test_a_link_to_a_checkpoint_that_is_gone_points_to_nothing(run):
    best_of(run, 0)
    (run / "checkpoints" / "step-000010").rename(run / "elsewhere")
    assert find_checkpoint(run).step == 30


def test_where_there_are_no_links_a_file_says_where_the_best_one_is(run, monkeypatch):
    def refuse(*_, **__):
        raise OSError("operation not supported")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    best_of(run, 0)
    best_of(run, 1)
    assert (run / "best").read_text() == "checkpoints/step-000020"
    assert (find_checkpoint(run).step, newest_checkpoint(run).step) == (20, 30)
    (run / "checkpoints" / "step-000020").rename(run / "elsewhere")
    assert find_checkpoint(run).step == 30
    link_best(run, None)
    assert best_checkpoint(run) is None


@pytest.mark.parametrize("place", [0, None])
def test_in_a_copy_that_has_a_folder_for_a_link_the_link_is_made_anew(run, place):
    best_of(run, 1)
    copy = shutil.copytree(run, run / "copy")  # which follows links
    link_best(copy, None if place is None else list_checkpoints(copy / "checkpoints")[place])
    assert (best_checkpoint(copy) and best_checkpoint(copy).step) == (None if place is None else 10)
    assert [one.step for one in list_checkpoints(copy / "checkpoints")] == [10, 20, 30]


def test_there_is_a_best_one_at_every_moment_while_it_moves(run, monkeypatch):
    """A process that is killed before the rename leaves the link as it was, and its remains are no obstacle."""

    def die(*_):
        raise KeyboardInterrupt

    best_of(run, 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pathlib.Path.replace", die)
        best_of(run, 1)
    assert best_checkpoint(run).step == 10
    best_of(run, 1)
    assert best_checkpoint(run).step == 20
    assert sorted(path.name for path in run.iterdir()) == ["best", "checkpoints"]


def test_the_best_one_is_kept_beside_the_newest(run, trained):
    for step in (40, 50):
        save_checkpoint(run / "checkpoints", step, trained[0], {}, keep=2, protect=20)
    assert [one.step for one in list_checkpoints(run / "checkpoints")] == [20, 40, 50]
    save_checkpoint(run / "checkpoints", 60, trained[0], {}, keep=2, protect=60)  # which is among the newest
    assert [one.step for one in list_checkpoints(run / "checkpoints")] == [50, 60]
