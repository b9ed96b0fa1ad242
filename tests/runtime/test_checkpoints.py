"""Checkpoints: what comes back is what was saved, a damaged one is named, nothing is unpickled."""

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.runtime.checkpoints import find_checkpoint, list_checkpoints, save_checkpoint


class Model(torch.nn.Linear):
    """A layer that saves itself as the model families do."""

    def save_weights(self, folder):
        folder.mkdir()
        save_file({"weight": self.weight.detach()}, folder / "weights.safetensors")


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = Model(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return model.save_weights, optimizer


def test_the_optimizer_comes_back_exactly(tmp_path, trained):
    save_weights, optimizer = trained
    checkpoint = save_checkpoint(tmp_path, 20, save_weights, optimizer, {"ledger": {"updates": 1}}, keep=2)
    assert checkpoint.path.name == "step-000020"
    assert checkpoint.state() == {"step": 20, "ledger": {"updates": 1}}
    other = torch.optim.AdamW(Model(3, 2).parameters(), 1e-3)
    checkpoint.load_optimizer(other)
    for mine, theirs in zip(
        optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True
    ):
        for name in mine:
            assert torch.equal(mine[name], theirs[name])


def test_only_the_newest_are_kept_and_the_newest_is_found(tmp_path, trained):
    (tmp_path / "checkpoints").mkdir()
    for step in (10, 20, 30):
        save_checkpoint(tmp_path / "checkpoints", step, *trained, {}, keep=2)
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
    save_checkpoint(tmp_path, 10, *trained, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]


def test_a_write_that_fails_leaves_the_checkpoints_that_were_there(tmp_path, trained):
    def no_space(folder):
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(b"as far as it goes")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    save_checkpoint(tmp_path, 10, *trained, {}, keep=1)
    with pytest.raises(SrpoError, match=r"No space left .* MiB free: free some space, then resume"):
        save_checkpoint(tmp_path, 20, no_space, trained[1], {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]


def test_weights_that_were_cut_off_are_found_without_reading_them(tmp_path, trained):
    checkpoint = save_checkpoint(tmp_path, 10, *trained, {}, keep=1)
    checkpoint.check_transformer()
    file = checkpoint.transformer / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SrpoError, match=r"transformer\): remove it, and the resumed run starts over"):
        checkpoint.check_transformer()
    file.unlink()
    with pytest.raises(SrpoError, match="transformer"):
        checkpoint.check_transformer()


def test_a_damaged_checkpoint_says_which_one_is_before_it(tmp_path, trained):
    save_checkpoint(tmp_path, 10, *trained, {}, keep=2)
    newest = save_checkpoint(tmp_path, 20, *trained, {}, keep=2)
    (newest.path / "state.json").write_text("[]")
    with pytest.raises(SrpoError, match="goes on from step-000010"):
        newest.state()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04\x95cos\nsystem\n."])
def test_a_damaged_optimizer_file_is_named(tmp_path, trained, content):
    checkpoint = save_checkpoint(tmp_path, 1, *trained, {}, keep=1)
    (checkpoint.path / "optimizer.pt").write_bytes(content)
    with pytest.raises(SrpoError, match=r"optimizer\.pt"):
        checkpoint.load_optimizer(trained[1])


def test_a_pickle_is_refused_and_never_run(tmp_path, trained):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    checkpoint = save_checkpoint(tmp_path, 1, *trained, {}, keep=1)
    (checkpoint.path / "optimizer.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SrpoError, match="damaged"):
        checkpoint.load_optimizer(trained[1])
    assert not (tmp_path / "owned").exists()
