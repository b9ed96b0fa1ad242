"""``srpo doctor`` finds what is missing, says what to type, and exits 0 only where a preset can run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from srpo_cli.config.load import preset_path
from srpo_cli.errors import MissingError
from srpo_cli.registry import HUB_FILES, MINIATURE_REWARDS, PROMPT_FILES, REWARD_FILES
from srpo_cli.runtime import doctor
from srpo_cli.runtime.plan import Counts, Work

H100 = doctor.Device("cuda:0", "NVIDIA H100 80GB HBM3", 79 * 2**30)
COUNTS = Counts(  # of something that is small beside an H100
    parameters=2_000_000_000,
    modulation=500_000_000,
    linears=1_400_000_000,
    block=300_000_000,
    matrix=50_000_000,
    lora=10_000_000,
    transformer=Work(6e12, 18e12, 24e12, 4 * 10**9, 10**8, 4 * 10**8, 7 * 10**7),
    decoder=Work(5e12, 10e12, 15e12, 6 * 10**9, 8 * 10**8, 28 * 10**8, 3 * 10**8),
    reward=Work(),
    decoder_parameters=80_000_000,
    reward_parameters=600_000_000,
    encoder_parameters=500_000_000,
    prompt=4_000_000,
)


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
    tiny = replace(COUNTS, parameters=2_000_000, transformer=Work(), decoder=Work())
    counts = {"miniature": tiny, "flux.1-dev": COUNTS}
    monkeypatch.setattr("srpo_cli.recipes.plan.count", lambda config, dtype=None: counts[config.model.name])

    def with_devices(*devices: doctor.Device) -> Path:
        monkeypatch.setattr(doctor, "accelerators", lambda: list(devices))
        return tmp_path / "hub"

    return with_devices


def put_in_hub_cache(cache: Path, name: str) -> None:
    """Lay out a Hub cache that holds every file of a named model or reward."""
    hub = HUB_FILES.get(name) or PROMPT_FILES.get(name) or REWARD_FILES[name][0]
    repository = cache / f"{hub.repo_type}s--{hub.repo.replace('/', '--')}"
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
    assert "memory plan: replicated on cpu" in outcome.stdout
    assert "hf download ymhao/HPDv2 train.json --repo-type dataset" in outcome.stdout  # elsewhere it would


def test_with_an_accelerator_missing_weights_come_with_their_command(srpo, machine):
    machine(H100)
    outcome = srpo("doctor", "--preset", "realism")
    assert outcome.exit_code == 4
    assert "NVIDIA H100 80GB HBM3, 79.0 GiB" in outcome.stdout
    assert "hf download black-forest-labs/FLUX.1-dev" in outcome.stdout
    assert "accept its licence" in outcome.stdout
    assert "hf download xswu/HPSv2 HPS_v2.1_compressed.pt" in outcome.stdout
    assert "hf download ymhao/HPDv2 train.json --repo-type dataset" in outcome.stdout
    assert "memory plan: resident on NVIDIA H100 80GB HBM3, 79 GiB" in outcome.stdout
    assert outcome.stderr.startswith("error: model flux.1-dev: 11 of 11 files")


def test_with_an_accelerator_and_its_weights_a_preset_can_run(srpo, machine):
    cache = machine(H100)
    for name in ("flux.1-dev", "hpsv2.1", "hpdv2"):
        put_in_hub_cache(cache, name)
    outcome = srpo("doctor", "--preset", "realism", "--format", "json")
    assert outcome.exit_code == 0
    document = json.loads(outcome.stdout)
    rows = {row["check"]: row for row in document["checks"]}
    for check in ("model flux.1-dev", "reward hpsv2.1", "prompts hpdv2"):
        assert rows[check]["status"] == "ok"
    assert rows["hub cache"]["found"].startswith("2 models")
    assert rows["torch"]["found"]
    assert (document["plan"], document["fits"]) == ("resident", True)
    assert document["memory_gib"]["total"] < 79


def test_all_accelerators_of_a_machine_are_planned_for(srpo, machine, monkeypatch):
    machine(H100, H100)
    monkeypatch.setattr("srpo_cli.runtime.plan.host_memory", lambda: 512 * 2**30)  # rank 0 gathers moments there
    document = json.loads(srpo("doctor", "--preset", "realism", "--format", "json").stdout)
    assert (document["plan"], document["settings"]["shard"]) == ("sharded", 2)
    assert document["launch"] == "srpo train --preset realism --gpus 2"


def test_a_preset_that_does_not_fit_is_said_so_with_what_would(srpo, machine):
    cache = machine(doctor.Device("cuda:0", "Small GPU", 8 * 2**30))
    for name in ("flux.1-dev", "hpsv2.1", "hpdv2"):
        put_in_hub_cache(cache, name)
    outcome = srpo("doctor", "--preset", "realism")
    assert outcome.exit_code == 1
    assert "DOES NOT FIT" in outcome.stdout
    assert outcome.stderr.startswith("error: realism does not fit here, nothing fits: the closest plan needs ")
    assert "Next: --set " in outcome.stderr


def test_without_a_preset_there_is_no_plan(srpo, machine):
    assert json.loads(srpo("doctor", "--format", "json").stdout).keys() == {"checks"}


def test_a_plan_that_cannot_be_counted_says_why(srpo, machine, monkeypatch):
    def refuse(config, dtype=None):
        raise MissingError("someone/model cannot be planned")

    monkeypatch.setattr("srpo_cli.recipes.plan.count", refuse)
    assert "no memory plan: someone/model cannot be planned" in srpo("doctor", "--preset", "realism").stderr
    document = json.loads(srpo("doctor", "--preset", "realism", "--format", "json").stdout)
    assert (document["plan"], document["why"]) == (None, "someone/model cannot be planned")


def test_packages_that_only_some_settings_need_are_listed_and_not_required(srpo, machine, monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"a-package-that-nobody-has": "for something"})
    monkeypatch.setattr(doctor, "ATTENTION", {"json": "Some attention (some)"})
    outcome = srpo("doctor", "--format", "json")
    assert outcome.exit_code == 0
    rows = {row["check"]: row for row in json.loads(outcome.stdout)["checks"]}
    extra = rows["a-package-that-nobody-has"]
    assert (extra["status"], extra["found"]) == ("optional", "not installed, for something")
    assert extra["remedy"] == "pip install a-package-that-nobody-has"
    assert rows["attention"]["found"] == "torch's own (native), Some attention (some)"


def test_prompts_are_looked_for_where_the_preset_says(srpo, machine, tmp_path):
    assert doctor.check_prompts("miniature-unlit").ok
    assert doctor.check_prompts("-").ok
    assert not doctor.check_prompts(str(tmp_path / "prompts.txt")).ok
    (tmp_path / "prompts.txt").write_text("a prompt")
    assert doctor.check_prompts(str(tmp_path / "prompts.txt")).ok


def test_half_a_download_is_not_a_model(srpo, machine):
    cache = machine(H100)
    put_in_hub_cache(cache, "flux.1-dev")
    next(cache.rglob("*-00003-of-00003.safetensors")).unlink()
    assert not doctor.check_weights("model", "flux.1-dev").ok


def test_a_configurations_own_weights_are_looked_for(srpo, machine, tmp_path):
    cache = machine(H100)
    put_in_hub_cache(cache, "flux.1-dev")
    put_in_hub_cache(cache, "hpdv2")
    file = tmp_path / "HPS_v2.1_compressed.pt"
    preset = tmp_path / "mine.yaml"
    preset.write_text(preset_path("realism").read_text().replace("name: hpsv2.1", f"name: hpsv2.1\n  weights: {file}"))
    outcome = srpo("doctor", "--preset", preset)
    assert outcome.exit_code == 4
    assert f"put the weights at {file}" in outcome.stdout
    file.touch()
    assert srpo("doctor", "--preset", preset).exit_code == 0


def test_a_plain_clip_reward_needs_a_file_of_weights(srpo, machine, tmp_path):
    cache = machine(H100)
    put_in_hub_cache(cache, "flux.1-dev")
    put_in_hub_cache(cache, "hpdv2")
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


@pytest.mark.parametrize("name", MINIATURE_REWARDS)
def test_the_miniatures_rewards_are_in_the_package_or_it_is_told(tmp_path, monkeypatch, name):
    assert doctor.check_weights("reward", name).ok
    monkeypatch.setattr(doctor, "WEIGHTS", tmp_path / "gone")
    assert not doctor.check_weights("reward", name).ok


def test_a_folder_is_a_model_and_another_repository_is_looked_up(machine, tmp_path):
    assert doctor.check_weights("model", str(tmp_path / "weights")).ok
    assert doctor.check_weights("model", "someone/model").remedy == "hf download someone/model"


def test_a_transformers_file_needs_the_other_parts_of_flux(machine, tmp_path):
    file = tmp_path / "tuned.safetensors"
    file.touch()
    cache = machine(H100)
    assert not doctor.check_weights("model", str(file)).ok
    put_in_hub_cache(cache, "flux.1-dev")
    for shard in cache.rglob("transformer/*"):
        shard.unlink()
    assert doctor.check_weights("model", str(file)).ok


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
