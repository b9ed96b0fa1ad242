"""``srpo doctor`` finds what is missing, says what to type, and exits 0 only where a preset can run."""

import json
from pathlib import Path

import pytest

from srpo_cli.config.load import preset_path
from srpo_cli.registry import HUB_FILES, REWARD_FILES
from srpo_cli.runtime import doctor

H100 = doctor.Device("cuda:0", "NVIDIA H100 80GB HBM3", 79 * 2**30)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A machine with the miniature's weights, an empty Hub cache, and accelerators at will; no torch."""
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model_index.json").touch()
    monkeypatch.setattr(doctor, "WEIGHTS", weights)
    monkeypatch.setattr(doctor, "check_loads", lambda package: doctor.Check(f"{package} loads", True, "yes"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(doctor, "accelerators", lambda: [])

    def with_devices(*devices: doctor.Device) -> Path:
        monkeypatch.setattr(doctor, "accelerators", lambda: list(devices))
        return tmp_path / "hub"

    return with_devices


def put_in_hub_cache(cache: Path, name: str) -> None:
    """Lay out a Hub cache that holds every file of a named model or reward."""
    hub = HUB_FILES.get(name) or REWARD_FILES[name][0]
    repository = cache / f"models--{hub.repo.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("1234")
    for file in hub.files:
        path = repository / "snapshots" / "1234" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_without_an_accelerator_a_preset_needs_only_the_miniature(srpo, machine):
    outcome = srpo("doctor", "--preset", "realism")
    assert outcome.exit_code == 0
    assert "none: presets run on the built-in miniature" in outcome.stdout
    assert "model miniature" in outcome.stdout


def test_with_an_accelerator_missing_weights_come_with_their_command(srpo, machine):
    machine(H100)
    outcome = srpo("doctor", "--preset", "realism")
    assert outcome.exit_code == 4
    assert "NVIDIA H100 80GB HBM3, 79.0 GiB" in outcome.stdout
    assert "hf download black-forest-labs/FLUX.1-dev" in outcome.stdout
    assert "accept its licence" in outcome.stdout
    assert "hf download xswu/HPSv2 HPS_v2.1_compressed.pt" in outcome.stdout
    assert outcome.stderr.startswith("error: model flux.1-dev: 11 of 11 files")


def test_with_an_accelerator_and_its_weights_a_preset_can_run(srpo, machine):
    cache = machine(H100)
    put_in_hub_cache(cache, "flux.1-dev")
    put_in_hub_cache(cache, "hpsv2.1")
    outcome = srpo("doctor", "--preset", "realism", "--format", "json")
    assert outcome.exit_code == 0
    rows = {row["check"]: row for row in json.loads(outcome.stdout)}
    assert rows["model flux.1-dev"]["status"] == rows["reward hpsv2.1"]["status"] == "ok"
    assert rows["hub cache"]["found"].startswith("2 models")
    assert rows["torch"]["found"]


def test_half_a_download_is_not_a_model(srpo, machine):
    cache = machine(H100)
    put_in_hub_cache(cache, "flux.1-dev")
    next(cache.rglob("*-00003-of-00003.safetensors")).unlink()
    assert not doctor.check_weights("model", "flux.1-dev").ok


def test_a_configurations_own_weights_are_looked_for(srpo, machine, tmp_path):
    cache = machine(H100)
    put_in_hub_cache(cache, "flux.1-dev")
    file = tmp_path / "HPS_v2.1_compressed.pt"
    preset = tmp_path / "mine.yaml"
    preset.write_text(preset_path("realism").read_text().replace("name: hpsv2.1", f"name: hpsv2.1\n  weights: {file}"))
    outcome = srpo("doctor", "--preset", preset)
    assert outcome.exit_code == 4
    assert f"put the weights at {file}" in outcome.stdout
    file.touch()
    assert srpo("doctor", "--preset", preset).exit_code == 0


def test_a_plain_clip_reward_needs_a_file_of_weights(srpo, machine, tmp_path):
    put_in_hub_cache(machine(H100), "flux.1-dev")
    file, preset = tmp_path / "clip.safetensors", tmp_path / "mine.yaml"
    text = preset_path("realism").read_text()
    preset.write_text(text.replace("name: hpsv2.1", "name: clip:ViT-B-32"))
    outcome = srpo("doctor", "--preset", preset)
    assert outcome.exit_code == 4
    line = "error: reward clip:ViT-B-32: reward.weights is not set. Next: --set reward.weights=FILE"
    assert outcome.stderr.startswith(line)
    preset.write_text(text.replace("name: hpsv2.1", f"name: clip:ViT-B-32\n  weights: {file}"))
    outcome = srpo("doctor", "--preset", preset)
    assert outcome.exit_code == 4
    assert f"put the weights at {file}" in outcome.stdout
    file.touch()
    assert srpo("doctor", "--preset", preset).exit_code == 0


def test_a_folder_is_a_model_and_another_repository_is_looked_up(machine, tmp_path):
    assert doctor.check_weights("model", str(tmp_path / "weights")).ok
    assert doctor.check_weights("model", "someone/model").remedy == "hf download someone/model"


def test_a_package_that_does_not_import_is_reported_with_the_remedy():
    check = doctor.check_loads("a_module_that_nobody_has")
    assert not check.ok
    assert "No module named" in check.found
    assert check.remedy.startswith("pip install --force-reinstall torch torchvision")


def test_a_cpu_build_of_torch_is_mended_from_the_cpu_index(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.13.0+cpu")
    assert doctor.check_loads("a_module_that_nobody_has").remedy.endswith("index for CPU builds")


def test_a_missing_package_is_reported(srpo, machine, monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "a-package-that-nobody-has"))
    outcome = srpo("doctor")
    assert outcome.exit_code == 4
    assert "pip install a-package-that-nobody-has" in outcome.stdout


def test_a_bad_preset_is_refused(srpo, machine):
    assert srpo("doctor", "--preset", "nope").exit_code == 2
    assert srpo("doctor", "--preset", "style:cyberpunk").exit_code == 2


@pytest.mark.slow
def test_torch_and_torchvision_fit_here():
    assert doctor.check_loads("torchvision").ok
    doctor.accelerators()
