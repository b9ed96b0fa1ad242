"""The recovery recipe: what it measures is what the algebra says, on pictures of the miniature."""

import json
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from PIL import Image

from srpo_cli.config.load import load_train_config
from srpo_cli.errors import UsageError
from srpo_cli.miniature import WEIGHTS
from srpo_cli.models.flux import Flux
from srpo_cli.recipes import recover as recipe
from srpo_cli.recipes import sample
from srpo_cli.recipes.parts import load_reward
from srpo_cli.rewards.base import Reward
from srpo_cli.runtime.inputs import list_pictures
from srpo_cli.runtime.pictures import is_sheet, read_metadata
from srpo_cli.runtime.sources import Source

PIPELINE = str(WEIGHTS / "pipeline")
PROMPTS = (
    "a red sphere on a wooden table",
    "a blue cone on snow, dark",
    "realistic photo. an orange cube on grass, backlit",
    "cg render. a green cylinder on sand",
    "comic. a purple cone on grass",
    "oil painting. a yellow sphere",
    "realistic photo. a red cylinder on snow",
    "cg render. a blue cube on a checkered floor, bright",
)
load_once = lru_cache(recipe.load_flux)
load_reward_once = lru_cache(lambda name, *_: load_reward(name, None, torch.device("cpu")))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(recipe, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(recipe, "load_flux", load_once)
    monkeypatch.setattr(recipe, "load_reward", lambda name, *_, **__: load_reward_once(name))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder as ``srpo sample`` leaves it: eight pictures that carry their prompts, and a grid."""
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "best_device", lambda: torch.device("cpu"))
        list(sample.sample(Source("miniature"), sample.Request(PROMPTS), folder))
    return folder


@pytest.fixture
def said():
    return []


@pytest.fixture
def study(tmp_path, said, monkeypatch):
    """Runs a request and returns its rows and summary; pictures of them are drawn only where they are looked at."""

    def run(pictures=(), model="miniature", drawn=False, **options):
        if not drawn:
            monkeypatch.setattr(recipe, "_curve", lambda *_: None)
        monkeypatch.setattr(recipe, "_STRIPS", 2 if drawn else 0)
        request = recipe.Request(pictures=list_pictures([str(path) for path in pictures]), **options)
        study = recipe.Study(Source(str(model)), request, tmp_path / "out", said.append)
        rows = list(study.rows())
        return rows, study.finish()

    return run


def by_label(rows, sigma):
    """Rows of one sigma by method and picture."""
    return {(row["label"], row["picture"]): row for row in rows if row["sigma"] == sigma}


def errors(rows, label, sigma, key="latent_error"):
    return torch.tensor([row[key] for (name, _), row in by_label(rows, sigma).items() if name == label])


def squared(rows, label, sigma, key):
    """Mean squared pixel errors from PSNRs."""
    return 10 ** (-errors(rows, label, sigma, key) / 10)


@pytest.fixture(scope="module")
def at_95(images, tmp_path_factory):
    """Rows at sigma 0.95 and 0.5, with the default steps, the paper's training step, and the gains of eq. 5."""
    request = recipe.Request(
        list_pictures([str(images)]), sigmas=(0.5, 0.95), delta_sigmas=(0.0215, 0.025, 0.075), gains=(0.025, 0.075)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "best_device", lambda: torch.device("cpu"))
        patch.setattr(recipe, "_STRIPS", 0)
        study = recipe.Study(Source("miniature"), request, tmp_path_factory.mktemp("at_95"), lambda _: None)
        return list(study.rows())


# --- how far below the one-step prediction's Direct-Align's error is ----------------------------------------------


@pytest.mark.parametrize("sigma", [0.5, 0.95])
def test_with_one_velocity_latent_errors_differ_by_their_gains_alone(at_95, sigma):
    one_step = by_label(at_95, sigma)
    for (label, picture), row in one_step.items():
        expected = one_step["one-step", picture]["latent_error"] * abs(row["gain"]) / sigma
        assert row["latent_error"] == pytest.approx(expected, rel=1e-3), label


@pytest.mark.parametrize(("label", "ratio"), [("gain 0.025", 38), ("gain 0.075", 12.67)])
@pytest.mark.parametrize("branch", ["denoise", "invert"])
def test_at_sigma_095_equation_5_is_more_than_10_times_below_the_one_step_prediction(at_95, label, ratio, branch):
    ratios = errors(at_95, "one-step", 0.95) / errors(at_95, f"Direct-Align {label} {branch}", 0.95)
    torch.testing.assert_close(ratios, torch.full((8,), float(ratio)), rtol=1e-3, atol=0)
    assert ratios.min() >= 10


def test_at_sigma_095_the_training_step_is_10_times_below_in_squared_error(at_95):
    label = "Direct-Align 0.0215 denoise"
    latent = (errors(at_95, "one-step", 0.95) / errors(at_95, label, 0.95)).square()
    torch.testing.assert_close(latent, torch.full((8,), 9.98), rtol=1e-3, atol=0)  # (0.95 * 0.0715 / 0.0215) ** 2
    for reference in ("psnr", "psnr_picture"):
        one_step, aligned = (squared(at_95, name, 0.95, reference).mean() for name in ("one-step", label))
        assert one_step / aligned >= 10


def test_at_sigma_095_a_larger_step_is_not(at_95):
    for delta_sigma, ratio in ((0.025, 2.85), (0.075, 1.583)):
        label = f"Direct-Align {delta_sigma:g} denoise"
        ratios = errors(at_95, "one-step", 0.95) / errors(at_95, label, 0.95)
        torch.testing.assert_close(ratios, torch.full((8,), ratio), rtol=1e-3, atol=0)


# --- rows -------------------------------------------------------------------------------------------------------


def test_a_row_for_each_sigma_and_method_that_has_a_step(study, images, tmp_path):
    picture = next(images.glob("*seed*.png"))
    rows, summary = study([picture], sigmas=(0.05, 0.95, 1.0), gains=(0.1,))
    told = [(row["sigma"], row["label"].removeprefix("Direct-Align ")) for row in rows]
    steps = {"0.025 denoise", "0.025 invert", "0.075 denoise", "0.075 invert", "gain 0.1 denoise", "gain 0.1 invert"}
    assert sorted(told) == sorted(
        [
            (0.0, "round trip"),
            *((sigma, "one-step") for sigma in (0.05, 0.95, 1.0)),
            *((0.05, step) for step in steps - {"0.075 denoise", "gain 0.1 denoise"}),
            *((0.95, step) for step in steps - {"0.075 invert"}),
            *((1.0, step) for step in ("0.025 denoise", "0.075 denoise")),
        ]
    )
    round_trip = rows[0]
    assert (round_trip["psnr"], round_trip["latent_error"]) == (100, 0) and round_trip["psnr_picture"] < 60
    clean = round_trip["reward_picture"]
    for row in rows:
        assert row["picture"] == str(picture) and row["prompt"] == read_metadata(picture)["prompt"]
        assert (row["branch"] == "invert") == (row["gain"] is not None and row["gain"] < 0)
        assert row["reward"] - row["reward_deviation"] == pytest.approx(clean)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert lines == [{key: value for key, value in row.items() if value is not None} for row in rows]
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["pictures"], summary["reward"], summary["windows"]) == (1, "miniature", [])


def test_the_model_is_called_once_at_each_sigma(study, images, monkeypatch):
    called = []
    velocity = Flux.velocity

    def counted(self, packed_latents, sigma, *rest):
        called.extend(sigma.tolist())
        return velocity(self, packed_latents, sigma, *rest)

    monkeypatch.setattr(Flux, "velocity", counted)
    monkeypatch.setattr(recipe, "_LARGEST_BATCH", 2)  # the last call is then one sigma
    rows, _ = study([next(images.glob("*seed*.png"))], sigmas=(0.2, 0.6, 0.9))
    assert called == pytest.approx([0.2, 0.6, 0.9])
    assert [row["sigma"] for row in rows] == sorted(row["sigma"] for row in rows)


def test_the_seed_decides_the_noise(study, images):
    picture = [next(images.glob("*seed*.png"))]
    first, again, other = (study(picture, sigmas=(0.9,), seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert errors(first, "one-step", 0.9) != errors(other, "one-step", 0.9)


def test_means_are_over_the_pictures(study, images):
    pictures = sorted(images.glob("*seed*.png"))[:2]
    rows, summary = study(pictures, sigmas=(0.9,))
    mean = next(mean for mean in summary["means"] if mean["label"] == "one-step")
    assert mean["pictures"] == 2
    for key in ("psnr", "ssim", "psnr_picture", "ssim_picture", "latent_error", "reward", "reward_deviation"):
        assert mean[key] == pytest.approx(errors(rows, "one-step", 0.9, key).mean().item(), rel=1e-5)


def test_the_window_is_where_the_clean_ranking_is_kept(study, images, tmp_path):
    sigmas = (0.1, 0.95)
    _, summary = study([images], sigmas=sigmas, delta_sigmas=(0.025,), gains=(0.025,), drawn=True)
    assert summary["pictures"] == 8  # without the grid
    windows = {window["label"]: (window["sigma_low"], window["sigma_high"]) for window in summary["windows"]}
    assert windows["Direct-Align gain 0.025 denoise"] == sigmas
    assert windows["one-step"] != sigmas
    correlations = {(mean["label"], mean["sigma"]): mean["rank_correlation"] for mean in summary["means"]}
    for label, (low, high) in windows.items():
        kept = [sigma for sigma in sigmas if correlations.get((label, sigma), -1) >= 0.9]
        assert (low in kept and high in kept) if kept else low is None
    with Image.open(tmp_path / "out" / "curve.png") as curve:
        assert 600 < curve.width < 1600
    assert is_sheet(read_metadata(tmp_path / "out" / "curve.png"))


# --- models and pictures ----------------------------------------------------------------------------------------


def test_a_true_velocity_recovers_the_round_trip_with_the_autoencoder_alone(study, images, tmp_path, said):
    folder = tmp_path / "autoencoder"
    shutil.copytree(Path(PIPELINE) / "vae", folder / "vae")
    picture = next(images.glob("*seed*.png"))
    rows, summary = study([picture], folder, noise_only=True, sigmas=(0.3, 0.95), gains=(0.05,))
    assert {row["label"] for row in rows} >= {"noised", "one-step", "Direct-Align gain 0.05 invert"}
    for row in rows:
        assert (row["psnr"] < 30) if row["method"] == "noised" else (row["psnr"] > 90)
        assert (row["latent_error"] > 0.1) if row["method"] == "noised" else (row["latent_error"] < 1e-5)
    assert summary["velocity"] == "true" and summary["windows"] == []
    assert any("autoencoder alone" in line for line in said)


def test_a_picture_of_another_size_is_fitted_and_said(study, images, tmp_path, said):
    Image.new("RGB", (70, 51), "red").save(tmp_path / "red.png")
    study([tmp_path / "red.png"], prompt="a red cube", sigmas=(0.5,))
    study([tmp_path / "red.png"], PIPELINE, sigmas=(0.5,))
    fitted = [line.rpartition(": ")[2] for line in said if "fitted" in line]
    assert fitted == ["51x70 px, fitted to 48x48", "51x70 px, fitted to 48x72"]
    with pytest.raises(UsageError, match="multiples of 8"):
        study([tmp_path / "red.png"], PIPELINE, sigmas=(0.5,), size=(50, 50))
    with pytest.raises(UsageError, match="48x48 and no other"):
        study([tmp_path / "red.png"], prompt="a red cube", sigmas=(0.5,), size=(64, 64))


def test_without_pictures_the_prompt_is_rolled_out(study, tmp_path):
    rows, _ = study(prompt="a red sphere", num_images=2, steps=2, seed=4, sigmas=(0.5,))
    drawn = [tmp_path / "out" / f"rollout-seed{seed}.png" for seed in (4, 5)]
    assert list(dict.fromkeys(row["picture"] for row in rows)) == list(map(str, drawn))
    assert [read_metadata(path)["prompt"] for path in drawn] == ["a red sphere"] * 2
    rows, _ = study(drawn[:1], sigmas=(0.5,), seed=4)  # the same picture again, from its file
    assert rows[0]["prompt"] == "a red sphere"


class Brightness(Reward):
    """Reads no text."""

    name, reads_text = "brightness", False

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


def test_a_picture_without_a_prompt_is_judged_only_by_a_reward_that_reads_none(study, tmp_path, said, monkeypatch):
    Image.new("RGB", (48, 48), "red").save(tmp_path / "red.png")
    with pytest.raises(UsageError, match=r"red\.png has no prompt, and miniature reads one: .*--prompt TEXT.*red\.txt"):
        study([tmp_path / "red.png"], PIPELINE, sigmas=(0.5,), reward="miniature")
    monkeypatch.setattr(recipe, "load_reward", lambda *_, **__: Brightness())
    rows, summary = study([tmp_path / "red.png"], PIPELINE, sigmas=(0.5,), reward="brightness")
    assert "1 of 1 pictures have no prompt: the model reads an empty one" in said
    assert summary["reward"] == "brightness" and all("reward" in row for row in rows)
    monkeypatch.setattr(recipe, "load_reward", lambda name, *_, **__: load_reward_once(name))
    (tmp_path / "red.txt").write_text("a red cube\n")
    rows, _ = study([tmp_path / "red.png"], PIPELINE, sigmas=(0.5,), reward="miniature")
    assert {row["prompt"] for row in rows} == {"a red cube"}


def test_without_a_reward_there_is_no_reward_column_and_that_is_said(study, images, said):
    rows, summary = study([next(images.glob("*seed*.png"))], PIPELINE, sigmas=(0.5,))
    assert "reward" not in rows[0] and summary["reward"] is None and summary["windows"] == []
    assert any("--reward NAME" in line for line in said)


def test_pictures_of_equal_reward_have_no_ranking(study, images, monkeypatch):
    class Constant(Brightness):
        def __call__(self, images, prompts):
            return torch.zeros(len(images))

    monkeypatch.setattr(recipe, "load_reward", lambda *_, **__: Constant())
    _, summary = study([images], sigmas=(0.9,), delta_sigmas=(0.025,))
    assert summary["pictures"] == 8 and summary["windows"] == []


def test_strips_are_of_the_first_pictures_and_hold_every_cell(study, images, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(
        recipe, "save_grid", lambda rows, path, labels, captions: sheets.append((rows, labels, captions))
    )
    pictures = sorted(images.glob("*seed*.png"))[:3]
    study(pictures, sigmas=(0.5, 0.9, 0.95), delta_sigmas=(0.075,), drawn=True)
    assert len(sheets) == 2
    rows, labels, captions = sheets[0]
    assert labels == ["noised", "one-step", "Direct-Align 0.075 denoise", "Direct-Align 0.075 invert"]
    assert captions[1:] == ["sigma 0.5", "sigma 0.9", "sigma 0.95"]
    assert [len(row) for row in rows] == [4] * 4
    assert torch.equal(rows[3][3], torch.full((3, 48, 48), recipe._EMPTY))  # 0.95 + 0.075 is no noise level
    grain = [row[2].diff(dim=-1).abs().mean() for row in rows]  # of sigma 0.9
    assert grain[0] > 2 * max(grain[1:3])  # noise, and what is left without it
    assert recipe._strip_size((400, 608)) == (168, 256)


@pytest.mark.parametrize(
    ("miniature", "low", "high", "delta_sigma"), [(True, 0.3, 0.9, 0.15), (False, 0.75, 0.9643, 0.0215)]
)
def test_a_presets_window_is_in_noise_levels(miniature, low, high, delta_sigma):
    algorithm = load_train_config("realism", miniature=miniature).config.algorithm
    window = recipe.PresetWindow.of("realism", algorithm)
    assert (window.low, window.high, window.delta_sigma) == pytest.approx((low, high, delta_sigma), abs=1e-4)
    assert f"{low:g} to" in str(window)
