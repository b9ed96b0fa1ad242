"""Tensors come back from disk as they were put, a damaged file is none, and processes may share the folder."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from srpo_cli.errors import UsageError
from srpo_cli.runtime.tensor_cache import TensorCache, cache_root

TENSORS = {"embeds": torch.randn(3, 4).bfloat16(), "pooled": torch.arange(5.0)}


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    return TensorCache(tmp_path / "cache")


def test_tensors_come_back_to_the_bit_and_only_under_their_key(cache: TensorCache) -> None:
    assert cache.get("a") is None and cache.size() == 0
    cache.put("a", {**TENSORS, "view": torch.randn(4, 4, requires_grad=True).t()})
    found = cache.get("a")
    assert found["embeds"].dtype == torch.bfloat16
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert found["view"].shape == (4, 4) and cache.get("b") is None
    assert cache.size() == sum(path.stat().st_size for path in cache.folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_damaged_file_is_dropped_and_can_be_put_again(cache: TensorCache, content: bytes | None) -> None:
    cache.put("a", TENSORS)
    (file,) = cache.folder.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3] if content is None else content)
    assert cache.get("a") is None and not file.exists()
    cache.put("a", TENSORS)
    assert torch.equal(cache.get("a")["pooled"], TENSORS["pooled"])


def test_writers_at_once_leave_a_whole_file_and_nothing_else(cache: TensorCache) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cache.put("a", TENSORS), range(32)))
    assert torch.equal(cache.get("a")["embeds"], TENSORS["embeds"])
    assert len([path for path in cache.folder.rglob("*") if path.is_file()]) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot write to"):
        TensorCache(tmp_path / "cache").put("a", TENSORS)


def test_a_file_in_the_folders_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UsageError, match=r"cannot write to .*cache"):
        TensorCache(tmp_path / "cache").put("a", TENSORS)
    assert TensorCache(tmp_path / "cache").get("a") is None


def test_the_users_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SRPO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_root() == Path("/home/somebody/.cache/srpo")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/srpo")
    monkeypatch.setenv("SRPO_CACHE", "/own")
    assert cache_root() == Path("/own") and TensorCache().folder == Path("/own/tensors")
