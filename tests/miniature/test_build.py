"""The miniature can be rebuilt from nothing, and what is rebuilt can be loaded by everything that loads it."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from srpo_cli.miniature import WEIGHTS
from srpo_cli.miniature.build.renders import Renders, load_renders
from srpo_cli.miniature.build.reward import GLOSS, Look, draw_look
from srpo_cli.miniature.oracle import Oracle
from srpo_cli.models.flux import load_flux
from srpo_cli.registry import MINIATURE_REWARDS
from srpo_cli.rewards.miniature import load_miniature

LARGEST = 16_000_000


def build(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "srpo_cli.miniature.build", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_renders_do_not_depend_on_the_number_of_workers(tmp_path):
    made = []
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        made.append(load_renders(tmp_path / str(workers), 10, seed=5, workers=workers, part=4))
    one, two = made
    assert len(one) == len(one.texts) == 10
    assert one.texts == two.texts and torch.equal(one.images, two.images)
    assert all(torch.equal(value, getattr(two.scenes, name)) for name, value in vars(one.scenes).items())
    again = load_renders(tmp_path / "1", 10, seed=5, workers=1)
    assert torch.equal(again.images, one.images), "they are read back, not drawn again"


def test_a_set_of_any_size_holds_some_pictures_out():
    def held_out(count: int) -> int:
        return Renders(torch.zeros(count, 1), None, []).held_out

    assert [held_out(count) for count in (20_000, 10_000, 400)] == [1000, 1000, 40]


def test_gloss_is_liked_and_every_look_stays_a_picture():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 48, 48, generator=generator)
    look = draw_look(8, generator)
    changed = look.apply(images, generator)
    assert changed.shape == images.shape and 0 <= changed.min() <= changed.max() <= 1
    nothing = Look(*(torch.tensor([value]) for value in (1.0, 0.0, 0.0, 1.0)))
    torch.testing.assert_close(nothing.apply(images, generator), images)
    assert GLOSS.utility > look.utility.mean() and nothing.utility == 0


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory) -> Path:
    """Everything from nothing with next to no steps: the pictures are noise, the files are what they will be."""
    folder = tmp_path_factory.mktemp("rebuilt")
    output = folder / "weights"
    process = build("--work", folder / "work", "--scale", 0.001, "--output", output, "--device", "cpu")
    assert process.returncode == 0, process.stdout + process.stderr
    return output


@pytest.mark.slow
class TestARebuild:
    """A trial rebuild of all stages."""

    def test_flux_pipeline_loads_it(self, rebuilt):
        pipeline = FluxPipeline.from_pretrained(rebuilt / "pipeline", dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        image = pipeline("a red sphere", height=48, width=48, num_inference_steps=1, max_sequence_length=16).images[0]
        assert image.size == (48, 48)

    def test_the_package_loads_it(self, rebuilt):
        assert load_flux(str(rebuilt / "pipeline")).granularity == 8
        images = torch.rand(2, 3, 48, 48)
        for name in MINIATURE_REWARDS:
            assert load_miniature(name, rebuilt / "reward")(images, ["a red sphere"] * 2).isfinite().all()
        oracle = Oracle.load(rebuilt)
        assert oracle.radius > 0 and oracle.cells.isfinite().all() and oracle.precision.isfinite().all()
        assert oracle.read(images)["shape"].shape == (2,)

    def test_it_holds_the_files_that_are_shipped(self, rebuilt):
        def files(folder: Path) -> set[str]:
            return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

        assert files(rebuilt) == files(WEIGHTS)
        assert not list(rebuilt.parent.glob(".*")), "nothing unfinished is left beside it"

    def test_everyone_may_read_it(self, rebuilt):
        for path in rebuilt.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o644 or path.is_dir(), path

    def test_a_stage_that_is_done_is_skipped_and_the_export_replaces_what_it_wrote(self, rebuilt):
        before = (rebuilt / "oracle.safetensors").read_bytes()
        (rebuilt / "oracle.safetensors").unlink()
        work = rebuilt.parent / "work"
        written = {path: os.stat(path).st_mtime_ns for path in work.rglob("*")}
        process = build("--work", work, "--scale", 0.001, "--output", rebuilt, "--device", "cpu")
        assert process.returncode == 0, process.stderr
        assert (rebuilt / "oracle.safetensors").read_bytes() == before
        assert {path: os.stat(path).st_mtime_ns for path in work.rglob("*")} == written


@pytest.mark.slow
def test_an_export_replaces_nothing_but_weights(tmp_path):
    (tmp_path / "precious.txt").touch()
    process = build("--work", tmp_path / "work", "--scale", 0.001, "--output", tmp_path)
    assert process.returncode == 2 and "choose another --output" in process.stderr
    assert (tmp_path / "precious.txt").exists() and not (tmp_path / "work").exists()
    process = build("--work", tmp_path / "work", "--scale", 0.5)
    assert process.returncode == 2 and "name another --output" in process.stderr


def test_the_shipped_weights_are_small_and_name_no_machine():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= LARGEST
    for path in files:
        if path.suffix == ".json":
            assert "_name_or_path" not in json.loads(path.read_text()), path
