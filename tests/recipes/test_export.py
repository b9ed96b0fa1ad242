"""``srpo export``: what it writes draws, in plain diffusers, the pictures that the run's own weights draw."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors import safe_open

from srpo_cli.config.load import dump_yaml, load_train_config
from srpo_cli.errors import MissingError, SrpoError, UsageError
from srpo_cli.miniature import WEIGHTS
from srpo_cli.models.flux import Flux, load_flux
from srpo_cli.recipes import export as recipe
from srpo_cli.recipes.export import LORA_FILE, Request, export
from srpo_cli.runtime.folder import RunFolder

PIPELINE = WEIGHTS / "pipeline"
PROMPT = "a red sphere on a wooden table"
RANK, ALPHA = 4, 12
MEASURED = {"photo_rate": {"mean": 0.5, "low": 0.4, "high": 0.6}}


def draw(pipeline: FluxPipeline) -> torch.Tensor:
    """A picture of plain diffusers, (3, 48, 48)."""
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(3)
    options = {"height": 48, "width": 48, "num_inference_steps": 2, "max_sequence_length": 16}
    return pipeline(PROMPT, **options, generator=noise, output_type="pt").images[0]


def draw_here(model: Flux) -> torch.Tensor:
    """The same picture as ``srpo sample`` draws it."""
    size = (48, 48)
    noise = model.noise(1, size, torch.Generator().manual_seed(3))
    latents = model.sample(model.encode_prompts([PROMPT]), noise, size, steps=2, guidance=3.5)
    with torch.no_grad():
        return model.decode(latents, size)[0]


def with_transformer(folder: Path, pipeline: Path = PIPELINE, dtype: torch.dtype = torch.float32) -> FluxPipeline:
    transformer = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
    return FluxPipeline.from_pretrained(pipeline, transformer=transformer, torch_dtype=dtype)


def with_lora(folder: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(PIPELINE, torch_dtype=torch.float32)
    pipeline.load_lora_weights(folder)
    return pipeline


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load(file).items()}


def load(file: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(file)


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as tensors:
        return tensors.metadata()


def make_run(folder: Path, **settings: object) -> RunFolder:
    """The folder of a run on the miniature, as far as an export reads it; it has no checkpoint yet."""
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]
    resolved = load_train_config("realism", overrides=["model.name=miniature", *overrides], miniature=True)
    run = RunFolder(folder)
    run.start(dump_yaml(resolved), processes=1, device="cpu")
    facts = json.loads((folder / "environment.json").read_text())
    facts["command"] = ["/usr/bin/srpo", "train", "--preset", "realism", "--set", "control_words.positive=[a b]"]
    run.write_json("environment.json", facts)
    return run


def add_checkpoint(run: RunFolder, step: int, save: Callable[[Path], None], average: Callable | None = None) -> Path:
    path = run.checkpoints / f"step-{step:06d}"
    path.mkdir()
    save(path / "transformer")
    if average:
        average(path / "ema")
    (path / "state.json").write_text(json.dumps({"step": step}))
    return path


def moved(model: Flux, seed: int, scale: float = 0.02) -> Flux:
    """The model after something like a training: all that it trains moves a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += scale * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
    return model


def train_lora(seed: int = 0, **options: object) -> Flux:
    """The miniature under a LoRA that does something; its scale is 3, 6 in one layer, whose rank is its own."""
    model = load_flux("miniature", torch.float32)
    model.transformer.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "ff.net.2"]
    patterns = {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 24}}
    model.transformer.add_adapter(
        LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, **patterns, **options})
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.transformer.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained every weight: steps 10 and 20, the figures of step 20."""
    run = make_run(tmp_path_factory.mktemp("full") / "run")
    model = load_flux("miniature", torch.float32)
    for step in (10, 20):
        add_checkpoint(run, step, moved(model, step).save_weights)
    figures = {"base": MEASURED, "tuned": MEASURED, "evaluation_prompts": 256}
    run.write_json("summary.json", {**figures, "steps": 20})
    return run.path


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("lora") / "run", train__mode="lora")
    add_checkpoint(run, 5, train_lora().save_weights)
    return run.path


def weights_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}" / "transformer"


# --- the same picture -----------------------------------------------------------------------------------------------


def test_a_whole_transformer_draws_the_same_picture_to_the_bit(full_run, tmp_path):
    export(Request(full_run, tmp_path / "out"))
    drawn = draw(with_transformer(tmp_path / "out"))
    assert torch.equal(drawn, draw_here(load_flux("miniature", weights=weights_of(full_run, 20))))
    assert not torch.allclose(drawn, draw_here(load_flux("miniature")), atol=0.01)


def test_a_lora_draws_the_same_picture_though_nobody_is_told_its_alpha(lora_run, tmp_path):
    export(Request(lora_run, tmp_path / "out"))
    tuned = draw_here(load_flux("miniature", weights=weights_of(lora_run, 5)))
    torch.testing.assert_close(draw(with_lora(tmp_path / "out")), tuned, atol=1e-5, rtol=0)
    assert not torch.allclose(tuned, draw_here(load_flux("miniature")), atol=0.01)

    bare = {name: tensor for name, tensor in load(tmp_path / "out" / LORA_FILE).items()}
    (tmp_path / "bare").mkdir()
    safetensors.torch.save_file(bare, tmp_path / "bare" / LORA_FILE, {"format": "pt"})
    torch.testing.assert_close(draw(with_lora(tmp_path / "bare")), tuned, atol=1e-5, rtol=0)


def test_a_merged_lora_draws_the_same_picture(lora_run, tmp_path):
    export(Request(lora_run, tmp_path / "out", "merged"))
    tuned = draw_here(load_flux("miniature", weights=weights_of(lora_run, 5)))
    torch.testing.assert_close(draw(with_transformer(tmp_path / "out")), tuned, atol=1e-5, rtol=0)


def test_of_another_flux_in_bfloat16_too_with_its_shift_that_grows(tmp_path):
    pipeline = shutil.copytree(PIPELINE, tmp_path / "pipeline")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(pipeline / "scheduler")
    config = FluxTransformer2DModel.load_config(pipeline / "transformer")
    sizes = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel.from_config({**config, **sizes})
    transformer.to(torch.bfloat16).save_pretrained(pipeline / "transformer")  # as FLUX.1-dev's is
    run = make_run(tmp_path / "run", model__name=pipeline, model__dtype="bfloat16")
    tuned = add_checkpoint(run, 1, moved(load_flux(str(pipeline), torch.float32), 1, 0.5).save_weights) / "transformer"

    result = export(Request(run.path, tmp_path / "out"))
    assert result["dtype"] == "bfloat16"
    drawn = draw(with_transformer(tmp_path / "out", pipeline, torch.bfloat16))
    expected = draw_here(load_flux(str(pipeline), torch.bfloat16, weights=tuned, literal=True))
    assert torch.equal(drawn, expected.bfloat16())  # diffusers leaves pictures in the dtype of the VAE
    assert not torch.equal(draw(FluxPipeline.from_pretrained(pipeline, torch_dtype=torch.bfloat16)), drawn)


def test_srpo_reads_what_it_exports(full_run, lora_run, tmp_path):
    for run, form in ((full_run, "full"), (lora_run, "lora"), (lora_run, "merged"), (full_run, "extract")):
        export(Request(run, tmp_path / form, form))
        load_flux("miniature", weights=tmp_path / form)


# --- layouts --------------------------------------------------------------------------------------------------------


def test_a_lora_has_the_layout_of_diffusers_with_its_scale_in_lora_b(lora_run, tmp_path):
    result = export(Request(lora_run, tmp_path / "out"))
    before, after = (load(folder / LORA_FILE) for folder in (weights_of(lora_run, 5), tmp_path / "out"))
    assert before.keys() == after.keys()
    for layer, scale in (("to_q", ALPHA / RANK), ("to_k", ALPHA / 2), ("to_v", 24 / RANK)):
        name = f"transformer.transformer_blocks.0.attn.{layer}"
        assert torch.equal(after[f"{name}.lora_A.weight"], before[f"{name}.lora_A.weight"])
        torch.testing.assert_close(after[f"{name}.lora_B.weight"], scale * before[f"{name}.lora_B.weight"])
    assert result["rank"] == RANK
    assert result["parameters"] == sum(tensor.numel() for tensor in after.values())


def test_a_rank_stabilised_lora_has_the_scale_that_peft_gives_it(tmp_path):
    model = train_lora(use_rslora=True, rank_pattern={}, alpha_pattern={})
    add_checkpoint(run := make_run(tmp_path / "run"), 1, model.save_weights)
    export(Request(run.path, tmp_path / "out"))
    name = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    before = load(weights_of(run.path, 1) / LORA_FILE)[name]
    torch.testing.assert_close(load(tmp_path / "out" / LORA_FILE)[name], before * ALPHA / RANK**0.5)


def test_a_whole_transformer_comes_in_shards_that_diffusers_puts_together(full_run, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "_SHARD", 2 * 10**6)
    result = export(Request(full_run, tmp_path / "out"))
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "out").state_dict()
    trained = tensors_of(weights_of(full_run, 20))
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    assert result["parameters"] == sum(tensor.numel() for tensor in trained.values())


def test_rounding_is_told_by_what_it_takes_of_the_training(full_run, tmp_path):
    notes = []
    result = export(Request(full_run, tmp_path / "out", dtype="bfloat16"), notes.append)
    base, trained = tensors_of(PIPELINE / "transformer"), tensors_of(weights_of(full_run, 20))
    lost = sum((trained[name].bfloat16().float() - trained[name]).square().sum() for name in trained)
    change = sum((trained[name] - base[name]).square().sum() for name in trained)
    assert result["rounding"] == pytest.approx((lost / change).sqrt().item(), rel=1e-4)
    assert any("Rounding the weights to bfloat16" in note for note in notes)
    assert all(tensor.dtype is torch.bfloat16 for tensor in tensors_of(tmp_path / "out").values())
    assert export(Request(full_run, tmp_path / "exact"))["rounding"] is None


# --- the difference as a LoRA ---------------------------------------------------------------------------------------


def test_at_full_rank_the_difference_is_reproduced(full_run, tmp_path):
    notes = []
    result = export(Request(full_run, tmp_path / "out", "extract", rank=10_000), notes.append)
    assert result["error"] < 2e-6
    assert result["rank"] == max(layer["rank"] for layer in result["layers"])
    assert any(note.startswith("note: Rank 10000 is more than") for note in notes)
    base, trained = tensors_of(PIPELINE / "transformer"), tensors_of(weights_of(full_run, 20))
    lora = load(tmp_path / "out" / LORA_FILE)
    for layer in (layer["layer"] for layer in result["layers"]):
        down, up = (lora[f"transformer.{layer}.lora_{kind}.weight"] for kind in "AB")
        rebuilt = base[f"{layer}.weight"] + up @ down
        torch.testing.assert_close(rebuilt, trained[f"{layer}.weight"], atol=1e-6, rtol=0)


def test_at_a_lower_rank_the_errors_are_the_least_possible(full_run, tmp_path):
    result = export(Request(full_run, tmp_path / "out", "extract", rank=3))
    base, trained = tensors_of(PIPELINE / "transformer"), tensors_of(weights_of(full_run, 20))
    lost = left_out = whole = 0.0
    errors = {layer["layer"]: layer["error"] for layer in result["layers"]}
    for name in trained:
        values = torch.linalg.svdvals((trained[name] - base[name]).double().reshape(len(trained[name]), -1))
        whole += values.square().sum().item()
        if (layer := name.removesuffix(".weight")) in errors:
            least = values[3:].norm() / values.norm()
            assert errors[layer] == pytest.approx(least.item(), abs=1e-5)
            lost += values[3:].square().sum().item()
        else:
            left_out += values.square().sum().item()
    assert result["error"] == pytest.approx((lost / (whole - left_out)) ** 0.5, abs=1e-5)
    assert result["left_out"] == pytest.approx((left_out / whole) ** 0.5, abs=1e-5)
    assert result["total_error"] == pytest.approx(((lost + left_out) / whole) ** 0.5, abs=1e-5)
    assert 0 < result["left_out"] < 1


def test_it_covers_every_linear_layer_but_the_modulation(full_run, tmp_path):
    result = export(Request(full_run, tmp_path / "out", "extract", rank=1))
    layers = {layer["layer"] for layer in result["layers"]}
    assert {
        "x_embedder",
        "proj_out",
        "transformer_blocks.0.ff.net.0.proj",
        "single_transformer_blocks.0.proj_mlp",
    } < layers
    modulation = {"transformer_blocks.0.norm1.linear", "single_transformer_blocks.0.norm.linear", "norm_out.linear"}
    assert modulation.isdisjoint(layers)
    assert {f"{name}.weight" for name in modulation} < tensors_of(PIPELINE / "transformer").keys()


def test_layers_clipped_to_their_own_rank_keep_their_scale_in_diffusers(full_run, tmp_path):
    export(Request(full_run, tmp_path / "out", "extract", rank=10_000))
    pipeline = with_lora(tmp_path / "out")
    pipeline.fuse_lora()
    fused = pipeline.transformer.state_dict()
    trained = tensors_of(weights_of(full_run, 20))
    for layer in ("x_embedder", "transformer_blocks.0.attn.to_q", "proj_out"):
        torch.testing.assert_close(fused[f"{layer}.base_layer.weight"], trained[f"{layer}.weight"], atol=1e-6, rtol=0)


def test_its_errors_are_in_the_header_and_in_the_card(full_run, tmp_path):
    result = export(Request(full_run, tmp_path / "out", "extract", rank=3))
    report = json.loads(header(tmp_path / "out" / LORA_FILE)["srpo.extract"])
    assert report["error"] == result["error"]
    assert report["left_out"] == result["left_out"]
    assert report["layers"].keys() == {layer["layer"] for layer in result["layers"]}
    card = (tmp_path / "out" / "README.md").read_text()
    for value in (result["error"], result["left_out"], result["total_error"]):
        assert f"**{value:.4f}**" in card
    assert "| x_embedder | 3 |" in card


def test_weights_that_have_not_moved_have_no_difference(tmp_path):
    add_checkpoint(run := make_run(tmp_path / "run"), 1, load_flux("miniature", torch.float32).save_weights)
    with pytest.raises(SrpoError, match="has the base's weights in every layer"):
        export(Request(run.path, tmp_path / "out", "extract"))


# --- which weights --------------------------------------------------------------------------------------------------


def test_any_checkpoint_can_be_had_by_its_step_or_its_folder(full_run, tmp_path):
    export(Request(full_run, tmp_path / "step", step=10))
    export(Request(full_run / "checkpoints" / "step-000010", tmp_path / "folder"))
    trained = tensors_of(weights_of(full_run, 10))
    for folder in ("step", "folder"):
        exported = tensors_of(tmp_path / folder)
        assert all(torch.equal(exported[name], trained[name]) for name in trained)


@pytest.mark.parametrize("name", ["", "best"])
def test_the_best_checkpoint_is_what_is_exported_and_the_card_says_so(lora_run, tmp_path, name):
    run = shutil.copytree(lora_run, tmp_path / "run")
    newer = shutil.copytree(run / "checkpoints" / "step-000005", run / "checkpoints" / "step-000006")
    (newer / "state.json").write_text(json.dumps({"step": 6}))
    claim = "the run's best by held-out evidence"
    assert export(Request(run, tmp_path / "newest"))["step"] == 6
    assert claim not in (tmp_path / "newest" / "README.md").read_text()
    (run / "best").symlink_to("checkpoints/step-000005")
    assert export(Request(run / name))["step"] == 5
    assert f"| checkpoint | step 5, {claim} |" in (run / "exports" / "step-000005-lora" / "README.md").read_text()
    assert export(Request(run, tmp_path / "other", step=6))["step"] == 6
    assert claim not in (tmp_path / "other" / "README.md").read_text()


def test_the_average_is_what_is_exported_unless_it_is_not_wanted(tmp_path):
    run = make_run(tmp_path / "run", train__ema=0.9)
    model = load_flux("miniature", torch.float32)
    path = add_checkpoint(run, 1, model.save_weights, moved(load_flux("miniature", torch.float32), 1).save_weights)
    assert export(Request(run.path, tmp_path / "average"))["weights"] == "average"
    assert export(Request(run.path, tmp_path / "trained", ema=False))["weights"] == "trained"
    for mine, theirs in (("average", "ema"), ("trained", "transformer")):
        exported, kept = tensors_of(tmp_path / mine), tensors_of(path / theirs)
        assert all(torch.equal(exported[name], kept[name]) for name in kept)
    assert "their moving average, decay 0.9" in (tmp_path / "average" / "README.md").read_text()


@pytest.mark.parametrize("start", ["transformer", "transformer/diffusion_pytorch_model.safetensors"])
def test_a_lora_on_tuned_weights_is_merged_into_those(full_run, tmp_path, start):
    start = weights_of(full_run, 20).parent / start
    run = make_run(tmp_path / "run", model__weights=start)
    add_checkpoint(run, 1, train_lora().save_weights)
    export(Request(run.path, tmp_path / "merged", "merged"))
    name = "transformer_blocks.0.norm1.linear.weight"  # no LoRA there
    assert torch.equal(tensors_of(tmp_path / "merged")[name], tensors_of(weights_of(full_run, 20))[name])
    export(Request(run.path, tmp_path / "lora"))
    assert f"trained on `{start}` in place of" in (tmp_path / "lora" / "README.md").read_text()


def test_of_a_quantised_base_it_is_told_that_pictures_differ(tmp_path):
    add_checkpoint(
        run := make_run(tmp_path / "run", train__mode="lora", lora__base="nf4"), 1, train_lora().save_weights
    )
    notes = []
    export(Request(run.path, tmp_path / "out"), notes.append)
    assert any("weights were kept in nf4" in note for note in notes)
    assert "a LoRA over a base kept in nf4" in (tmp_path / "out" / "README.md").read_text()


def test_a_difference_is_to_the_base_whatever_the_run_began_from(full_run, tmp_path):
    run = make_run(tmp_path / "run", model__weights=weights_of(full_run, 10))
    shutil.copytree(full_run / "checkpoints" / "step-000020", run.checkpoints / "step-000020")
    notes = []
    mine = export(Request(run.path, tmp_path / "mine", "extract"), notes.append)
    assert mine["error"] == export(Request(full_run, tmp_path / "other", "extract"))["error"]
    assert any(note.startswith("note: The run began from") for note in notes)


# --- header and card ------------------------------------------------------------------------------------------------


def test_the_header_says_where_the_weights_come_from(full_run, lora_run, tmp_path):
    export(Request(full_run, tmp_path / "full"))
    export(Request(lora_run, tmp_path / "lora"))
    full = header(tmp_path / "full" / "diffusion_pytorch_model.safetensors")
    lora = header(tmp_path / "lora" / LORA_FILE)
    assert full["format"] == lora["format"] == "pt"
    assert full["srpo.base_model"] == "miniature"
    assert full["srpo.method"] == "srpo"
    assert (full["srpo.step"], lora["srpo.step"]) == ("20", "5")
    assert full["srpo.config_sha256"] == hashlib.sha256((full_run / "config.yaml").read_bytes()).hexdigest()
    assert full["modelspec.architecture"] == "flux-miniature"
    assert lora["modelspec.architecture"] == "flux-miniature/lora"
    assert lora["modelspec.title"] == "srpo's miniature aligned by SRPO (LoRA)"
    data = (tmp_path / "lora" / LORA_FILE).read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert lora["modelspec.hash_sha256"] == f"0x{hashlib.sha256(body).hexdigest()}"


def test_the_card_of_the_miniature(full_run, tmp_path):
    export(Request(full_run, tmp_path / "out"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert card.data.base_model is None  # it is not on the Hub
    assert "srpo train --preset realism --set 'control_words.positive=[a b]'\nsrpo export" in card.text
    assert f"srpo export {full_run} --output {tmp_path / 'out'}" in card.text
    assert "| photo rate | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] |" in card.text
    assert "they say nothing about FLUX" in card.text
    assert "realistic photo" in card.text
    assert "None" not in card.text
    assert "20 of 60" in card.text


def test_the_cards_snippet_draws(lora_run, full_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run, form in ((lora_run, "lora"), (full_run, "full")):
        export(Request(run, tmp_path / form, form))
        snippet = (tmp_path / form / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        scope: dict = {}
        exec(snippet, scope)
        assert scope["picture"].size == (48, 48)


def test_figures_of_other_weights_are_not_in_the_card(full_run, tmp_path):
    export(Request(full_run, tmp_path / "out", step=10))
    assert "Nothing was measured of these weights." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("flux.1-dev", "black-forest-labs/FLUX.1-dev"),
        ("black-forest-labs/FLUX.1-Krea-dev", "black-forest-labs/FLUX.1-Krea-dev"),
    ],
)
def test_the_card_of_flux_names_its_licence(lora_run, tmp_path, name, repo):
    run = shutil.copytree(lora_run, tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("name: miniature ", f"name: {name} ", 1))
    export(Request(run, tmp_path / "out"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == repo
    assert card.data["base_model_relation"] == "adapter"
    assert card.data.license == "other"
    assert card.data.license_name == "flux-1-dev-non-commercial-license"
    assert card.data.license_link == f"https://huggingface.co/{repo}/blob/main/LICENSE.md"
    assert header(tmp_path / "out" / LORA_FILE)["modelspec.architecture"] == "flux-1-dev/lora"
    assert "lora" in card.data.tags
    assert "None" not in card.text
    assert f'FluxPipeline.from_pretrained("{repo}"' in card.text


def test_the_licence_of_an_unknown_base_is_called_unknown(lora_run, tmp_path):
    run = shutil.copytree(lora_run, tmp_path / "run")
    shutil.copytree(PIPELINE, tmp_path / "somebody")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("name: miniature ", f"name: {tmp_path / 'somebody'} ", 1))
    export(Request(run, tmp_path / "out", "merged"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "unknown"
    assert "whose licence srpo does not know" in card.text


# --- mistakes, and nothing half-written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "form", "message"),
    [
        ("full_run", "lora", "--format extract makes one of the difference"),
        ("full_run", "merged", "--format full writes them as they are"),
        ("lora_run", "extract", "--format lora exports it as it is"),
        ("lora_run", "full", "--format merged folds it into the base"),
    ],
)
def test_a_format_that_does_not_suit_the_run_names_the_one_that_does(request, tmp_path, run, form, message):
    with pytest.raises(UsageError, match=message):
        export(Request(request.getfixturevalue(run), tmp_path / "out", form))


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(full_run, tmp_path):
    with pytest.raises(UsageError, match="no checkpoint of step 7: --checkpoint can be 10, 20"):
        export(Request(full_run, tmp_path / "out", step=7))
    with pytest.raises(UsageError, match="holds no checkpoint"):
        export(Request(make_run(tmp_path / "run").path, tmp_path / "out"))


def test_a_folder_with_something_in_it_is_left_alone(full_run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(UsageError, match="is not empty"):
        export(Request(full_run, tmp_path / "out"))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_base_that_is_not_here_comes_with_the_command_that_fetches_it(lora_run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    run = shutil.copytree(lora_run, tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("name: miniature ", "name: flux.1-dev ", 1))
    with pytest.raises(MissingError, match="hf download black-forest-labs"):
        export(Request(run, tmp_path / "deep" / "out", "merged"))
    assert not (tmp_path / "deep").exists()


def test_a_lora_for_another_transformer_is_refused(lora_run, tmp_path):
    run = shutil.copytree(lora_run, tmp_path / "run")
    file = weights_of(run, 5) / LORA_FILE
    tensors = {name.replace("to_q", "to_z"): tensor for name, tensor in load(file).items()}
    safetensors.torch.save_file(tensors, file, header(file))
    with pytest.raises(SrpoError, match=r"to_z\.weight has another shape or is not there"):
        export(Request(run, tmp_path / "out", "merged"))


def test_weights_of_another_model_are_refused_by_their_first_tensor(full_run, tmp_path):
    run = shutil.copytree(full_run, tmp_path / "run")
    file = weights_of(run, 20) / "diffusion_pytorch_model.safetensors"
    tensors = load(file)
    tensors["x_embedder.weight"] = tensors["x_embedder.weight"][:, :3].contiguous()
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SrpoError, match=r"x_embedder\.weight is \[\d+, 3\] there"):
        export(Request(run, tmp_path / "out"))


def test_weights_that_are_not_finite_or_too_large_are_refused(full_run, tmp_path):
    run = shutil.copytree(full_run, tmp_path / "run")
    file = weights_of(run, 20) / "diffusion_pytorch_model.safetensors"
    for value, message in ((1e6, "is too large for float16"), (float("nan"), "not finite")):
        tensors = load(file)
        tensors["x_embedder.bias"][0] = value
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
        with pytest.raises(SrpoError, match=message):
            export(Request(run, tmp_path / "out", dtype="float16"))
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_whatever_stops_an_export_leaves_nothing(full_run, tmp_path, monkeypatch, error):
    def stop(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(recipe, "model_card", stop)  # the weights are written by then
    with pytest.raises(error):
        export(Request(full_run, tmp_path / "deep" / "out"))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_no_obstacle(full_run, tmp_path):
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "half.safetensors").touch()
    (tmp_path / "out").mkdir()
    export(Request(full_run, tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert not (tmp_path / ".out.tmp").exists()


def test_a_disk_without_room_is_told_before_anything_is_written(full_run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SrpoError, match=r"0\.0 GiB free: free some space"):
        export(Request(full_run, tmp_path / "out"))
    assert not list(tmp_path.iterdir())
