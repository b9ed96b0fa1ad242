"""The wheel is complete and small, and works where the repository is not."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
LARGEST_WEIGHTS = 16_000_000

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
    """Install the wheel, and nothing else, into an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel)
    return folder


def run(*command: object, **options: object) -> str:
    """Run a command to its end and return its stdout; its stderr is in the failure."""
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_the_wheel_holds_presets_weights_and_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    for preset in (REPOSITORY / "presets").glob("*.yaml"):
        assert f"srpo_cli/presets/{preset.name}" in sizes
    weights = {name: size for name, size in sizes.items() if name.startswith("srpo_cli/miniature/weights/")}
    assert any(name.endswith(".safetensors") for name in weights)
    assert sum(weights.values()) <= LARGEST_WEIGHTS
    assert any(name.endswith("/licenses/LICENSE") for name in sizes)
    assert not any(name.startswith("tests/") for name in sizes)


def test_the_installed_package_works_away_from_the_repository(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}

    def python(*arguments: str) -> str:
        return run(sys.executable, *arguments, cwd=tmp_path, env=environment)

    assert Path(python("-c", "import srpo_cli; print(srpo_cli.__file__)").strip()).is_relative_to(installed)
    assert "realism" in python("-m", "srpo_cli", "presets", "list")
    assert "presets" in python("-m", "srpo_cli", "--help")
    python("-m", "srpo_cli", "presets", "validate", "realism", "lighting", "style")
