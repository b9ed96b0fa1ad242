"""What two processes exchange in a training step under plan sharded, counted on the CPU over gloo."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from benchmarks.scenes import make_run, miniature_config, one_thread, take_step
from srpo_cli.runtime.distributed import Ranks

_RANKS = 2


def count_gathers(*overrides: str) -> dict[str, float]:
    """Exchanges of one training step for each unit that is sharded, a block or what lies outside of all blocks.

    Args:
        overrides: of the miniature's configuration, as for ``--set``.

    Returns all_gathers and reduce_scatters per unit and optimizer step, and other exchanges per optimizer step, of
    rank 0. To be called in a process that has computed nothing yet: the ranks are forked from it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        arguments = (port, Path(folder), overrides)
        ranks = [context.Process(target=_count, args=(rank, *arguments)) for rank in range(_RANKS)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            raise RuntimeError(f"a rank ended with {[rank.exitcode for rank in ranks]}")
        return json.loads((Path(folder) / "counts.json").read_text())


def _count(rank: int, port: int, folder: Path, overrides: Sequence[str]) -> None:
    one_thread()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(_RANKS)}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=_RANKS)
    config = miniature_config("memory.plan=sharded", "prompts.limit=2", "train.batch_size=1", *overrides)
    run = make_run(config, folder / "run", Ranks(rank, _RANKS))
    take_step(run)
    with CommDebugMode() as exchanges:
        take_step(run)
    transformer = run.model.transformer
    units = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks) + 1
    updates = config.algorithm.pairs
    named = {"all_gathers": 0, "reduce_scatters": 0, "others": 0}
    for operator, number in exchanges.get_comm_counts().items():
        name = str(operator)
        # FSDP2 gathers flat tensors; what ranks tell one another, as the oracle's figures, is gathered in lists.
        kind = (
            "all_gathers" if "allgather_base" in name else "reduce_scatters" if "reduce_scatter" in name else "others"
        )
        named[kind] += number
    if rank == 0:
        per_unit = {kind: number / (updates * (1 if kind == "others" else units)) for kind, number in named.items()}
        (folder / "counts.json").write_text(json.dumps(per_unit))
    dist.destroy_process_group()


if __name__ == "__main__":
    print(json.dumps(count_gathers(*sys.argv[1:])))
