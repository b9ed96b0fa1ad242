"""LoRA on FLUX: which layers get one, float32 over any base, what other trainers write, folding it in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.models.flux import Flux, load_flux
from srpo_cli.models.flux_lora import add_lora

SIZE = (24, 40)


@pytest.fixture
def flux(pipeline_folder: Path) -> Flux:
    return load_flux(str(pipeline_folder))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shake(flux: Flux, std: float = 0.1) -> None:
    """Give a LoRA something to add."""
    for name, parameter in sorted(flux.transformer.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std, generator=seeded(len(name)))


@torch.no_grad()
def velocity(flux: Flux) -> torch.Tensor:
    noise = flux.noise(1, SIZE, seeded())
    return flux.velocity(noise, torch.tensor(0.7), flux.encode_prompts(["a cat"]), 3.5, SIZE)


def test_by_default_every_linear_of_flux_1_dev_but_the_modulation_gets_one() -> None:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        assert sum(parameter.numel() for parameter in transformer.parameters()) == 11_901_408_320
        add_lora(transformer, rank=16)
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    assert sum(parameter.numel() for parameter in trained.values()) == 65_372_160
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    layers = {name.partition(".lora_")[0] for name in trained}
    assert len(layers) == 19 * 12 + 38 * 5
    assert not any(layer.endswith(".linear") or "blocks" not in layer for layer in layers)


def test_a_new_lora_changes_nothing_and_is_all_that_is_trained(flux: Flux) -> None:
    before = velocity(flux)
    flux.add_lora(2, seed=1)
    assert flux.has_lora and torch.equal(velocity(flux), before)
    names = [name for name, parameter in flux.transformer.named_parameters() if parameter.requires_grad]
    assert names and all("lora_" in name for name in names)
    shake(flux)
    assert not torch.allclose(velocity(flux), before, atol=1e-4)


def test_its_seed_decides_how_it_starts(pipeline_folder: Path) -> None:
    states = []
    for seed in (1, 1, 2):
        model = load_flux(str(pipeline_folder))
        torch.manual_seed(seed + len(states))  # must not matter
        model.add_lora(2, seed=seed)
        states.append({n: p for n, p in model.transformer.named_parameters() if "lora_A" in n})
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    for name, weight in first.items():  # peft's own range: kaiming_uniform with a = sqrt(5)
        assert weight.abs().max() <= weight.shape[1] ** -0.5, name


def test_targets_are_ends_of_names_and_a_wrong_one_is_named(flux: Flux) -> None:
    with pytest.raises(UsageError, match=r"Unknown LoRA target 'attn\.to_x'\. Did you mean 'attn\.to_\w'") as failure:
        flux.add_lora(2, targets=["attn.to_q", "attn.to_x"])
    assert "\n" not in str(failure.value) and not flux.has_lora
    flux.add_lora(2, alpha=4, targets=["attn.to_q", "norm.linear"])
    layers = {n.partition(".lora_")[0] for n, p in flux.transformer.named_parameters() if p.requires_grad}
    assert layers == {
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.norm.linear",
    }
    layer = flux.transformer.get_submodule("transformer_blocks.0.attn.to_q")
    assert list(layer.scaling.values()) == [2.0]


def test_over_bfloat16_it_is_float32_and_keeps_no_wide_activations(pipeline_folder: Path) -> None:
    model = load_flux(str(pipeline_folder), torch.bfloat16, literal=True)
    model.add_lora(2, seed=1)
    shake(model)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.trainable_parameters()} == {torch.float32}
    saved: list[torch.Tensor] = []
    layer = model.transformer.get_submodule("transformer_blocks.0.attn.to_q")
    x = torch.randn(1, 5, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(x)
    assert out.dtype == torch.bfloat16 and {tensor.dtype for tensor in saved} == {torch.bfloat16}
    out.float().square().sum().backward()
    down = next(iter(layer.lora_A.values())).weight
    assert down.grad.dtype == torch.float32 and down.grad.abs().sum() > 0


def test_saved_and_loaded_it_goes_on_and_plain_diffusers_draws_the_same(
    flux: Flux, pipeline_folder: Path, tmp_path: Path
) -> None:
    flux.add_lora(2, alpha=4, seed=1)
    shake(flux)
    flux.save_weights(tmp_path)
    again = load_flux(str(pipeline_folder), weights=tmp_path)
    assert torch.equal(velocity(again), velocity(flux))
    assert len(again.trainable_parameters()) == len(flux.trainable_parameters())
    theirs = load_flux(str(pipeline_folder))
    FluxPipeline.from_pretrained(pipeline_folder, transformer=theirs.transformer).load_lora_weights(tmp_path)
    torch.testing.assert_close(velocity(theirs), velocity(flux))


@pytest.mark.parametrize("base", ["model", "float8", "int8", "nf4"])
def test_saved_and_loaded_it_is_the_same_to_the_bit_over_any_base(
    pipeline_folder: Path, tmp_path: Path, base: str
) -> None:
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    states = []
    for weights in (None, tmp_path):
        model = load_flux(
            str(pipeline_folder), torch.bfloat16, weights=weights, base=base, literal=True, text_encoders=False
        )
        if weights is None:
            model.add_lora(2, alpha=4, seed=1)
            shake(model)
            model.save_weights(tmp_path)
        states.append(
            get_peft_model_state_dict(model.transformer, adapter_name=next(iter(model.transformer.peft_config)))
        )
        assert all(parameter.dtype == torch.float32 for parameter in model.trainable_parameters())
    saved, loaded = states
    assert saved and saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in saved.values())


def test_folded_in_it_draws_the_same_and_everything_is_trained(flux: Flux) -> None:
    names = [name for name, _ in flux.transformer.named_parameters()]
    flux.add_lora(2, alpha=4, seed=1)
    shake(flux)
    expected = velocity(flux)
    added = flux.fuse_lora()
    assert not flux.has_lora
    torch.testing.assert_close(velocity(flux), expected, atol=1e-5, rtol=1e-4)
    assert [name for name, _ in flux.transformer.named_parameters()] == names
    assert len(flux.trainable_parameters()) == len(names)
    assert added.keys() <= set(names)


# --- more or less of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["model", "float8", "int8", "nf4"])
def test_at_scale_0_it_adds_nothing_and_at_1_what_was_trained_to_the_bit(pipeline_folder: Path, base: str) -> None:
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    model = load_flux(str(pipeline_folder), base=base)
    plain = velocity(model)
    model.add_lora(2, alpha=4, seed=1)
    shake(model)
    trained = velocity(model)
    drawn = []
    for scale in (0.5, 0, 2, 1):  # each counts from what was trained, not from the one before
        model.scale_lora(scale)
        drawn.append(velocity(model))
    half, nothing, double, whole = drawn
    assert torch.equal(nothing, plain) and torch.equal(whole, trained)
    moved = [(out - plain).norm() for out in (half, trained, double)]
    assert 0 < moved[0] < moved[1] < moved[2]


def stored_lora(folder: Path, layout: str) -> tuple[Path, float]:
    """A LoRA file of rank 4 beside one layer, and what its layout says of its scale at strength 1."""
    down, up = torch.randn(4, 32, generator=seeded(1)), torch.randn(32, 4, generator=seeded(2))
    if layout == "kohya, alpha 1":
        name = "lora_unet_double_blocks_0_img_attn_proj"
        state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
        save_file(state, folder / "lora.safetensors")
        return folder / "lora.safetensors", 1 / 4
    layer = "transformer_blocks.0.attn.to_out.0"
    state = {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=[layer], use_rslora=layout == "peft, rslora").to_dict()
    config = {f"transformer.{key}": sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    save_file(state, folder / "lora.safetensors", {"lora_adapter_metadata": json.dumps(config), "format": "pt"})
    return folder / "lora.safetensors", 6 / 2 if layout == "peft, rslora" else 6 / 4


@pytest.mark.parametrize("scale", [0, 0.3, 1, 1.7])
@pytest.mark.parametrize("layout", ["kohya, alpha 1", "peft", "peft, rslora"])
def test_folded_in_at_a_scale_the_weights_are_base_plus_scale_times_lora_as_the_pipeline_folds_it(
    pipeline_folder: Path, tmp_path: Path, layout: str, scale: float
) -> None:
    file, own = stored_lora(tmp_path, layout)
    model = load_flux(str(pipeline_folder), weights=file)
    model.scale_lora(scale)
    model.fuse_lora()
    expected = FluxTransformer2DModel.from_pretrained(pipeline_folder / "transformer").state_dict()
    down, up = torch.randn(4, 32, generator=seeded(1)), torch.randn(32, 4, generator=seeded(2))
    expected["transformer_blocks.0.attn.to_out.0.weight"] += scale * own * (up @ down)
    torch.testing.assert_close(model.transformer.state_dict(), expected)

    pipeline = FluxPipeline.from_pretrained(pipeline_folder)
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(pipeline.transformer.state_dict(), expected)


def test_a_transformer_beneath_it_stays_whole(pipeline_folder: Path, tmp_path: Path) -> None:
    tuned = load_flux(str(pipeline_folder))
    with torch.no_grad():
        for parameter in tuned.transformer.parameters():
            parameter.mul_(1.1)
    tuned.save_weights(tmp_path / "tuned")
    expected = velocity(tuned)
    assert not torch.allclose(velocity(load_flux(str(pipeline_folder))), expected, atol=1e-3)
    file, _ = stored_lora(tmp_path, "peft")
    model = load_flux(str(pipeline_folder), weights=[tmp_path / "tuned", file])
    assert not torch.allclose(velocity(model), expected, atol=1e-3)
    model.scale_lora(0)
    assert torch.equal(velocity(model), expected)


def test_a_scaled_one_is_saved_as_it_was_trained(flux: Flux, pipeline_folder: Path, tmp_path: Path) -> None:
    flux.add_lora(2, alpha=4, seed=1)
    shake(flux)
    trained = velocity(flux)
    flux.scale_lora(0.5)
    flux.save_weights(tmp_path)
    assert torch.equal(velocity(load_flux(str(pipeline_folder), weights=tmp_path)), trained)


# --- other people's files ---------------------------------------------------------------------------------


def test_kohyas_layout_is_read_with_its_alpha_as_diffusers_reads_it(pipeline_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "kohya.safetensors"
    module = "lora_unet_double_blocks_0_img_attn_proj"
    state = {
        f"{module}.lora_down.weight": torch.randn(2, 32, generator=seeded(1)),
        f"{module}.lora_up.weight": torch.randn(32, 2, generator=seeded(2)),
        f"{module}.alpha": torch.tensor(1.0),
    }
    save_file(state, file)
    layer = load_flux(str(pipeline_folder), weights=file).transformer.get_submodule(
        "transformer_blocks.0.attn.to_out.0"
    )
    (name,) = layer.lora_A
    added = layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight
    expected = 0.5 * state[f"{module}.lora_up.weight"] @ state[f"{module}.lora_down.weight"]
    torch.testing.assert_close(added, expected)


def test_xlabs_layout_is_read_too(pipeline_folder: Path, tmp_path: Path) -> None:
    file, name = tmp_path / "xlabs.safetensors", "double_blocks.0.processor.proj_lora1"
    save_file({f"{name}.down.weight": torch.randn(2, 32), f"{name}.up.weight": torch.randn(32, 2)}, file)
    model = load_flux(str(pipeline_folder), weights=file)
    layers = {n.partition(".lora_")[0] for n, p in model.transformer.named_parameters() if p.requires_grad}
    assert layers == {"transformer_blocks.0.attn.to_out.0"}


def lora_state(module: str, down: tuple[int, int], up: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": torch.zeros(down), f"{module}.lora_B.weight": torch.zeros(up)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lora_state("transformer.transformer_blocks.0.attn.to_q", (2, 48), (32, 2)),
            r"another model: transformer\.transformer_blocks\.0\.attn\.to_q\.lora_A\.weight is \[2, 48\] there and "
            r"\['rank', 32\] here",
        ),
        (lora_state("transformer.transformer_blocks.9.attn.to_q", (2, 32), (32, 2)), r"transformer_blocks\.9"),
        (lora_state("unet.down_blocks.0.attn.to_q", (2, 32), (32, 2)), r"no layer for unet\.down_blocks"),
        (lora_state("text_encoder.layers.0.q_proj", (2, 32), (32, 2)), r"no layer for text_encoder\.layers"),
    ],
    ids=["shape", "block", "unet", "text"],
)
def test_a_lora_for_other_modules_is_one_line_that_names_the_first(
    pipeline_folder: Path, tmp_path: Path, state, message: str
) -> None:
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(SrpoError, match=message) as failure:
        load_flux(str(pipeline_folder), weights=tmp_path / "x.safetensors")
    assert "\n" not in str(failure.value)


# --- over a quantised base --------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "error"), [("float8", 0.05), ("int8", 0.02), ("nf4", 0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_quantised_base_stays_near_the_model_and_its_lora_learns(
    pipeline_folder: Path, base: str, error: float, dtype: torch.dtype
) -> None:
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    plain = velocity(load_flux(str(pipeline_folder)))
    model = load_flux(str(pipeline_folder), dtype, base=base, literal=True, text_encoders=True)
    assert not model.trainable_parameters() and model.dtype == dtype
    narrow = {n for n, p in model.transformer.named_parameters() if p.element_size() == 1 and n.endswith("weight")}
    assert len(narrow) == 14 + 6  # every linear of the blocks, modulation included, and none beside them
    assert all("transformer_blocks." in name for name in narrow)
    near = velocity(model).float()
    assert 0 < (near - plain).norm() / plain.norm() < error + (0.05 if dtype == torch.bfloat16 else 0)
    model.add_lora(2, seed=1)
    assert torch.equal(velocity(model).float(), near)
    shake(model)
    model.checkpoint_blocks(transformer=True, vae=True)
    noise = model.noise(1, SIZE, seeded())
    out = model.velocity(noise, torch.tensor(0.7), model.encode_prompts(["a cat"]), 3.5, SIZE)
    out.float().square().sum().backward()
    for parameter in model.trainable_parameters():
        assert parameter.dtype == torch.float32 and parameter.grad.isfinite().all()
    assert sum(parameter.grad.norm() for parameter in model.trainable_parameters()) > 0
    with pytest.raises(UsageError, match=r"lora\.base"):
        model.fuse_lora()
