"""Who is one of several, who starts them, and with what command line."""

import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.runtime import launch as module
from srpo_cli.runtime.launch import LAUNCHED, Launch, is_rank, leads, slurm_environment

TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "gpu[03-04,7],login",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
RANK = """
import os, sys, torch
from srpo_cli.runtime.distributed import join_ranks

print("here", flush=True)
with join_ranks(torch.device("cpu")) as ranks:
    if len(sys.argv) > 1:
        ranks.check_packages({"torch": sys.argv[1 + ranks.rank], "diffusers": "1"})
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """An environment that no launcher made."""
    for name in [*TASK, "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", LAUNCHED, "PET_RDZV_CONF"]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def port():
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_rank(rank, port, *arguments):
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    command = [sys.executable, "-c", RANK, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# --- found launched already ---------------------------------------------------------------------------------------


def test_a_task_of_srun_is_a_rank():
    assert slurm_environment(TASK) == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": str(12000 + 7 * 1234 + 2),
    }


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1", "a1"), ("a1,a2", "a1"), ("rack1-n[007-9].site,b", "rack1-n007.site"), ("r[2-3]n[4,6]", "r2n4")],
)
def test_the_master_is_the_first_node_of_the_step(nodes, first):
    assert slurm_environment({**TASK, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_a_master_that_the_job_script_chose_is_kept():
    found = slurm_environment({**TASK, "MASTER_ADDR": "head", "MASTER_PORT": "5"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("head", "5")


def test_a_task_that_sees_one_device_uses_that():
    assert slurm_environment({**TASK, "CUDA_VISIBLE_DEVICES": "3"})["LOCAL_RANK"] == "0"
    assert slurm_environment({**TASK, "CUDA_VISIBLE_DEVICES": "2,3"})["LOCAL_RANK"] == "1"


def test_all_tasks_find_the_same_port_and_two_steps_different_ones():
    ports = {
        (step, rank): slurm_environment({**TASK, "SLURM_PROCID": rank, "SLURM_STEP_ID": step})["MASTER_PORT"]
        for step in "01"
        for rank in "0123"
    }
    assert len(set(ports.values())) == 2
    assert all(12000 <= int(number) < 32000 for number in ports.values())


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},  # a shell on a node
        {**TASK, "RANK": "0"},  # torchrun inside of a step
    ],
    ids=["plain", "batch", "shell", "torchrun"],
)
def test_who_is_no_task_of_several_is_no_rank(environment):
    assert slurm_environment(environment) == {}


def test_a_rank_starts_nothing(alone):
    alone.setenv("RANK", "1")
    alone.setenv("WORLD_SIZE", "2")
    assert Launch.of(8, None, None, None) is None
    assert Launch.of(8, 2, "a:1", None) is None
    assert is_rank() and not leads()


def test_a_task_of_srun_starts_nothing_and_becomes_a_rank(alone):
    alone.setattr(module.os, "environ", {**TASK})
    assert Launch.of(8, None, None, None) is None
    assert module.os.environ["RANK"] == "5"


def test_one_task_a_node_launches_where_the_user_names_the_nodes(alone):
    alone.setattr(module.os, "environ", {**TASK, "SLURM_STEP_NUM_TASKS": "2"})
    assert Launch.of(8, 2, "gpu03:29500", None) == Launch(8, 2, "gpu03", 29500)


# --- what is started ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([(4, 2.0), (-signal.SIGABRT, 1.0)], 4),  # aborted while it left: the other one told what was wrong
        ([(75, 1.0), (4, 2.0)], 4),  # lost the other one, and says nothing
        ([(3, 2.0), (4, 1.0)], 4),
        ([(-signal.SIGTERM, 1.0), (75, 2.0)], 128 + signal.SIGTERM),
    ],
)
def test_the_exit_code_is_that_of_the_process_that_told_what_was_wrong(alone, ends, expected):
    failures = {rank: SimpleNamespace(exitcode=code, timestamp=when) for rank, (code, when) in enumerate(ends)}
    assert Launch.of(2, None, None, None)._exit_code(failures, str) == expected


def test_what_a_process_told_counts_where_torchrun_found_only_another_one_aborted(alone):
    def run(_arguments):
        module.leave_exit_code(2)
        module.leave_exit_code(4)
        raise ChildFailedError("srpo", {1: ProcessFailure(1, 0, -signal.SIGABRT, "")})

    alone.setattr("torch.distributed.run.run", run)
    before = dict(os.environ)
    assert Launch.of(2, None, None, None).run([]) == 2
    assert os.environ == before
    module.leave_exit_code(4)  # of a process that nobody started: it goes nowhere


def test_one_process_starts_nothing():
    assert Launch.of(1, None, None, None) is None
    assert leads()


@pytest.mark.parametrize(
    ("launch", "command"),
    [
        (Launch(2), "--standalone --nproc-per-node 2"),
        (
            Launch(8, 2, "node1", 29500),
            "--rdzv-backend c10d --rdzv-endpoint node1:29500 --rdzv-id srpo --nnodes 2 "
            "--rdzv-conf read_timeout=600,join_timeout=600 --nproc-per-node 8",
        ),
        (
            Launch(8, 2, "fe80::1", 29500, node_rank=1),
            "--rdzv-backend static --master-addr fe80::1 --master-port 29500 --node-rank 1 --nnodes 2 "
            "--rdzv-conf timeout=600 --nproc-per-node 8",
        ),
    ],
)
def test_it_is_torchruns_command_line(launch, command):
    assert " ".join(launch.torchrun()) == f"{command} --module srpo_cli"


def test_hosts_are_names_and_addresses():
    assert Launch.of(1, 2, "node-1.site:29500", 0) == Launch(1, 2, "node-1.site", 29500, 0)
    launch = Launch.of(1, 2, "[fe80::1]:29500", None)
    assert (launch.host, launch.endpoint) == ("fe80::1", "[fe80::1]:29500")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((2, 2, None, None), "--nodes 2 needs --rdzv HOST:PORT"),
        ((2, None, "a:1", None), "--rdzv a:1 needs --nodes"),
        ((2, None, None, 1), "--node-rank 1 needs --nodes"),
        ((2, 2, "a:1", 2), "--node-rank 2: 2 nodes are numbered from 0 to 1"),
        *(((2, 2, place, None), f"--rdzv {place}: give HOST:PORT") for place in ("a", "a:b", ":1", "a:0", "a:70000")),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(UsageError) as refused:
        Launch.of(*flags)
    assert message in str(refused.value)


def test_more_gpus_than_there_are_is_refused_with_both_numbers(alone):
    alone.setattr("srpo_cli.runtime.devices.has_accelerator", lambda: True)
    alone.setattr("torch.accelerator.device_count", lambda: 2)
    with pytest.raises(UsageError, match="--gpus 3: here are 2"):
        Launch(3).check(print)


def test_on_a_bare_cpu_it_is_said(alone):
    alone.setattr("srpo_cli.runtime.devices.has_accelerator", lambda: False)
    said = []
    Launch(2).check(said.append)
    assert said == ["no accelerator here: 2 processes on the CPU"]


def test_an_unknown_host_is_refused():
    with pytest.raises(UsageError, match=r"--rdzv no\.such\.host\.invalid:29500: unknown host"):
        Launch(1, 2, "no.such.host.invalid", 29500).check(lambda _: None)


def test_a_free_port_will_do(port):
    Launch(1, 2, "127.0.0.1", port).check(lambda _: None)


def test_a_port_that_something_else_listens_on_is_refused(alone):
    alone.setattr(module, "_ANSWER", 0.5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--rdzv 127.0.0.1:{port}: the port is in use, and not by a rendezvous"):
            Launch(1, 2, "127.0.0.1", port).check(lambda _: None)


def test_a_port_where_a_rendezvous_waits_is_joined(port):
    from torch.distributed import TCPStore

    host = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    Launch(1, 2, "127.0.0.1", host.port).check(lambda _: None)


@pytest.mark.parametrize("node_rank", [None, 0, 1])
def test_nodes_that_do_not_come_are_one_line(alone, port, node_rank):
    alone.setenv("PET_RDZV_CONF", "join_timeout=1,timeout=1")
    alone.setenv("TORCH_CPP_LOG_LEVEL", "FATAL")
    before = dict(os.environ)
    with pytest.raises(SrpoError) as failed:
        Launch(1, 2, "127.0.0.1", port, node_rank).run(["--version"])
    assert str(failed.value).startswith(f"no connection between the 2 nodes at 127.0.0.1:{port} (")
    assert "\n" not in str(failed.value)
    assert failed.value.exit_code == 1
    assert dict(os.environ) == before


# --- ranks --------------------------------------------------------------------------------------------------------


def test_ranks_with_other_packages_are_refused_by_one_of_them(port):
    ranks = [start_rank(rank, port, "2.14", "2.11") for rank in range(2)]
    (_, zero), (_, one) = (rank.communicate(timeout=60) for rank in ranks)
    assert "UsageError: rank 1 has torch 2.11, rank 0 has 2.14: install the same versions everywhere" in zero
    assert (ranks[1].returncode, one) == (2, "")


def test_a_rank_that_waits_for_the_others_ends_when_it_is_told_to(port):
    rank = start_rank(0, port)
    assert rank.stdout.readline() == "here\n"
    time.sleep(1)
    rank.send_signal(signal.SIGTERM)
    rank.communicate(timeout=10)
    assert rank.returncode == -signal.SIGTERM
