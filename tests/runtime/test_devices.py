"""A machine that surely has no accelerator is recognised without torch; any doubt is left to torch."""

import subprocess
import sys

import pytest
import torch

from srpo_cli.runtime import devices


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A Linux machine with one network card and no device files to speak of."""
    card = tmp_path / "sys" / "pci" / "devices" / "0000:00:01.0"
    card.mkdir(parents=True)
    (card / "class").write_text("0x020000\n")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "null").touch()
    monkeypatch.setattr(devices, "_SYSTEM", tmp_path / "sys")
    monkeypatch.setattr(devices, "_DEVICES", tmp_path / "dev")
    monkeypatch.setattr(devices.sys, "platform", "linux")
    monkeypatch.setattr(devices, "best_device", lambda: torch.device("cuda"))
    return tmp_path


def test_a_machine_without_a_trace_of_one_has_none(machine):
    assert not devices.has_accelerator()


@pytest.mark.parametrize("kind", ["0x030000", "0x030200", "0x120000"])
def test_a_card_that_may_be_one_is_left_to_torch(machine, kind):
    card = machine / "sys" / "pci" / "devices" / "0000:00:02.0"
    card.mkdir()
    (card / "class").write_text(kind + "\n")
    assert devices.has_accelerator()


@pytest.mark.parametrize("name", ["nvidia0", "nvidiactl", "kfd", "dri", "dxg", "accel", "nvhost-gpu"])
def test_a_device_file_that_may_be_one_is_left_to_torch(machine, name):
    (machine / "dev" / name).touch()
    assert devices.has_accelerator()


def test_a_system_that_says_nothing_is_left_to_torch(machine, monkeypatch):
    monkeypatch.setattr(devices, "_SYSTEM", machine / "nothing")
    assert devices.has_accelerator()
    monkeypatch.setattr(devices, "_SYSTEM", machine / "sys")
    monkeypatch.setattr(devices.sys, "platform", "darwin")
    assert devices.has_accelerator()


def test_the_module_itself_does_without_torch():
    code = "import sys, srpo_cli.runtime.devices; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cpu_computes_in_float32(dtype):
    with devices.arithmetic(torch.device("cpu"), dtype):
        assert (torch.eye(2) @ torch.eye(2)).dtype is torch.float32
