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
        assert ranks.mean(0.1, 0.2) == [0.1, 0.2]
        assert ranks.average_gradients([parameter], 0.3) == 0.3
        assert parameter.grad.tolist() == [1, 2, 3]
        assert ranks.largest(15) == 15
        assert ranks.from_rank_0("mine") == "mine"
        ranks.wait()
        with pytest.raises(UsageError, match="mine"), ranks.together():
            raise UsageError("mine")


def test_a_turn_is_one_ranks_in_one_step_and_for_one_process_the_step():
    turns = [Ranks(rank, 3).turn(step) for step in range(4) for rank in range(3)]
    assert turns == list(range(12))
    assert [Ranks().turn(step) for step in range(4)] == [0, 1, 2, 3]


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
