"""The wheel is complete and small, and works where the repository is not."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from srpo_cli.registry import MINIATURE_REWARDS

REPOSITORY = Path(__file__).parents[1]
LARGEST_WEIGHTS = 16_000_000
PROMPT = "a red sphere on grass"
TINY = [
    "train.batch_size=1",
    "rollout.steps=2",
    "sampling.steps=2",
    "samples.count=1",
    "evaluation.prompts=4",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the environment's own tools."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPOSITORY)
    (built,) = folder.glob("srpo_cli-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it, which finds the wheel's dependencies where this environment has them.

    Its path to them comes after its own packages, and a ``.pth`` file there, such as an editable install of this
    repository leaves, is not followed.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in dependencies))
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, object]:
    """Options of a process that runs outside the repository and inherits nothing from this environment."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {"cwd": tmp_path, "env": {**inherited, "NO_COLOR": "1"}}


def run(*command: object, **options: object) -> str:
    """Run a command to its end and return its stdout; its stderr is in the failure."""
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_the_wheel_holds_presets_weights_and_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    for preset in (REPOSITORY / "presets").glob("*.yaml"):
        assert f"srpo_cli/presets/{preset.name}" in sizes
    for room in ("benchmarks", "comparisons"):
        files = {path.name for path in (REPOSITORY / "srpo_cli" / "config" / room).glob("*.yaml")}
        assert files and {f"srpo_cli/config/{room}/{name}" for name in files} <= sizes.keys()
    weights = {name: size for name, size in sizes.items() if name.startswith("srpo_cli/miniature/weights/")}
    assert any(name.endswith(".safetensors") for name in weights)
    for file in MINIATURE_REWARDS.values():
        assert f"srpo_cli/miniature/weights/reward/{file}" in weights
    assert sum(weights.values()) <= LARGEST_WEIGHTS
    assert any(name.endswith("/licenses/LICENSE") for name in sizes)
    assert not any(name.startswith("tests/") for name in sizes)


def test_everything_that_is_imported_is_declared(wheel):
    imported: set[str] = set()
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requirements = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
        for name in archive.namelist():
            for node in ast.walk(ast.parse(archive.read(name))) if name.endswith(".py") else ():
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(node.module.partition(".")[0])
    declared = {
        normalised(re.match(r"[\w.-]+", requirement)[0])
        for requirement in requirements
        if "extra == 'test'" not in requirement.replace('"', "'")  # a user's extras are named where they are missing
    }
    distributions = packages_distributions()
    foreign = imported - sys.stdlib_module_names - {"srpo_cli"}
    assert {"torch", "yaml", "PIL", "open_clip"} <= foreign
    for module in sorted(foreign):
        assert not declared.isdisjoint(map(normalised, distributions[module])), f"{module} is of no declared dependency"


def test_what_runs_is_the_wheel(installed, elsewhere):
    show = "import srpo_cli, sys; print(srpo_cli.__file__, *sys.path, sep='\\n')"
    file, *path = map(Path, run(installed / "bin" / "python", "-c", show, **elsewhere).splitlines())
    assert file.is_relative_to(installed)
    assert REPOSITORY not in path


def test_the_installed_command_works_away_from_the_repository(installed, elsewhere):
    srpo = installed / "bin" / "srpo"
    assert "presets" in run(srpo, "--help", **elsewhere)
    assert "realism" in run(srpo, "presets", "list", **elsewhere)
    run(srpo, "presets", "validate", "realism", "lighting", "style", **elsewhere)
    (row,) = run(srpo, "sample", "--model", "miniature", PROMPT, **elsewhere).splitlines()
    assert (elsewhere["cwd"] / json.loads(row)["file"]).is_file()


def test_the_installed_command_trains_away_from_the_repository(installed, elsewhere):
    settings = [part for setting in TINY for part in ("--set", setting)]
    command = ["train", "--preset", "realism", "--model", "miniature", "--steps", "1", *settings, "--output", "run"]
    run(installed / "bin" / "srpo", *command, **elsewhere)
    folder = elsewhere["cwd"] / "run"
    assert (folder / "summary.json").is_file()
    assert list(folder.glob("checkpoints/step-000001/transformer/*.safetensors"))
