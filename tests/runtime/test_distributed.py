"""One process needs no group: every exchange is the identity, every rule of several holds for one."""

import pytest
import torch
import torch.distributed

from srpo_cli.errors import UsageError
from srpo_cli.runtime.distributed import Ranks, join_ranks

CPU = torch.device("cpu")


@pytest.fixture
def alone(monkeypatch):
    """An environment that no launcher made."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_joins_no_group_and_exchanges_nothing(alone):
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, 2.0, 3.0])
    with join_ranks(CPU) as ranks:
        assert not torch.distributed.is_initialized()
        assert ranks.leads
        assert ranks.average([parameter.grad], torch.tensor([0.25])).tolist() == [0.25]
        assert parameter.grad.tolist() == [1, 2, 3]
        assert ranks.gather("mine") == ["mine"]
        assert ranks.largest(15) == 15
        assert ranks.from_rank_0("mine") == "mine"
        ranks.wait()
        with pytest.raises(UsageError, match="mine"), ranks.together():
            raise UsageError("mine")


@pytest.mark.parametrize(("count", "size"), [(4, 2), (4, 3), (7, 3), (3, 3), (5, 1)])
def test_shares_cover_all_in_order_and_differ_by_one_at_most(count, size):
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_error_of_all_is_told_by_one():
    error = UsageError("the same everywhere")
    assert Ranks(0, 2).common(error) is error
    silent = Ranks(1, 2).common(error)
    assert isinstance(silent, SystemExit)
    assert silent.code == 2


def test_half_an_environment_is_refused(alone):
    alone.setenv("WORLD_SIZE", "2")
    alone.setenv("RANK", "0")
    with pytest.raises(UsageError, match="MASTER_ADDR is not set: start with torchrun"), join_ranks(CPU):
        pass
