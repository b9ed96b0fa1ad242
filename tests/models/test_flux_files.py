"""Transformers in either layout and any float dtype, what kind of file is given, and exact float32 masters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from srpo_cli.errors import MissingError, SrpoError, UsageError
from srpo_cli.models.flux import load_flux, load_latent_space
from srpo_cli.models.flux_files import encoder_fingerprint, load_masters, load_prompt_encoder
from srpo_cli.models.flux_layout import bfl_pieces
from srpo_cli.registry import HubFiles


@pytest.fixture(scope="module")
def tuned(pipeline_folder: Path) -> dict[str, torch.Tensor]:
    """A transformer of the pipeline's shape with other weights."""
    state = load_file(pipeline_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(tensor.shape, generator=generator) / 8 for name, tensor in state.items()}


def loaded(pipeline_folder: Path, file: Path, **options: object) -> dict[str, torch.Tensor]:
    return load_flux(str(pipeline_folder), weights=file, **options).transformer.state_dict()


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def test_the_layout_of_black_forest_labs_is_what_diffusers_takes_it_for(to_bfl) -> None:
    with torch.device("meta"):
        wide = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    # Diffusers' conversion takes the width of FLUX.1 for granted, but only in rows: one column will do.
    shapes = {name: (tensor.shape[0], *(1 for _ in tensor.shape[1:])) for name, tensor in wide.state_dict().items()}
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    assert_same(convert_flux_transformer_checkpoint_to_diffusers(to_bfl(state)), state)
    assert bfl_pieces(shapes)["single_transformer_blocks.1.proj_mlp.weight"].start == 3 * 3072


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_of_black_forest_labs_or_comfyui_is_a_transformer(
    pipeline_folder: Path, tuned, to_bfl, tmp_path: Path, prefix: str
) -> None:
    others = {"vae.decoder.conv_in.weight": torch.zeros(1)} if prefix else {}
    save_file(to_bfl(tuned, prefix) | others, tmp_path / "x.safetensors")
    assert_same(loaded(pipeline_folder, tmp_path / "x.safetensors"), tuned)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_a_single_file_in_diffusers_layout_may_have_any_float_dtype(
    pipeline_folder: Path, tuned, tmp_path: Path, dtype: torch.dtype
) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in tuned.items()}
    save_file(stored, tmp_path / "x.safetensors")
    assert_same(loaded(pipeline_folder, tmp_path / "x.safetensors"), {n: t.float() for n, t in stored.items()})


def test_a_folder_of_several_files_is_read_by_its_index(pipeline_folder: Path, tmp_path: Path) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(pipeline_folder / "transformer")
    transformer.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(loaded(pipeline_folder, tmp_path), transformer.state_dict())


def test_a_single_file_is_a_model_whose_other_parts_are_flux_1_devs(
    monkeypatch: pytest.MonkeyPatch, pipeline_folder: Path, tuned, tmp_path: Path
) -> None:
    hub = tmp_path / "hub"
    shutil.copytree(pipeline_folder, hub)
    monkeypatch.setattr("srpo_cli.models.flux_files.snapshot_download", lambda repo, **_: str(hub))
    for place in ("text_encoder_2/model-00001-of-00002", "text_encoder_2/model-00002-of-00002"):
        (hub / f"{place}.safetensors").touch()  # only looked for: the small T5 is in one file
    for place in ("tokenizer/vocab.json", "tokenizer_2/tokenizer.json"):
        (hub / place).touch()
    save_file(tuned, tmp_path / "x.safetensors")
    model = load_flux(str(tmp_path / "x.safetensors"), text_encoders=False)
    assert_same(model.transformer.state_dict(), tuned)
    assert model.name.endswith("x.safetensors") and load_latent_space(model.name).granularity == 8
    with pytest.raises(MissingError, match="nowhere"):
        load_flux(str(tmp_path / "nowhere.safetensors"))


def test_weights_go_into_the_dtype_they_are_given_literally_on_a_cpu_too(pipeline_folder: Path) -> None:
    model = load_flux(
        str(pipeline_folder), torch.bfloat16, frozen_dtype=torch.float32, literal=True, latent_dtype=torch.float32
    )
    assert {parameter.dtype for parameter in model.transformer.parameters()} == {torch.bfloat16}
    assert model.vae.dtype == model.text_encoder.dtype == torch.float32
    noise = model.noise(1, (16, 16), torch.Generator().manual_seed(0))
    drawn = model.sample(model.encode_prompts(["a cat"]), noise, (16, 16), 2, 3.5)
    assert noise.dtype == drawn.dtype == model.encode(torch.zeros(1, 3, 16, 16)).dtype == torch.float32
    assert not torch.equal(drawn, drawn.bfloat16().float())


# --- one line for what does not fit ----------------------------------------------------------------------


def drop(state):
    state.pop("transformer_blocks.0.attn.to_q.weight")


def widen(state):
    state["transformer_blocks.0.attn.to_q.weight"] = torch.zeros(64, 48)


def add(state):
    state["transformer_blocks.1.attn.to_q.weight"] = torch.zeros(2, 2)


def quantise(state):
    state["proj_out.weight"] = torch.zeros(16, 32, dtype=torch.int8)


def scale(state):
    state["proj_out.scale_weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"does not hold this transformer: transformer_blocks\.0\.attn\.to_q\.weight is missing"),
        (widen, r"another model: transformer_blocks\.0\.attn\.to_q\.weight is \[64, 48\] there and \[32, 32\] here"),
        (add, r"another model: this transformer has no transformer_blocks\.1\.attn\.to_q\.weight"),
        (quantise, r"quantised \(proj_out\.weight is I8\): give it in bfloat16"),
        (scale, r"quantised \(proj_out\.scale_weight\): give it in bfloat16"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("bfl", [False, True], ids=["diffusers", "bfl"])
def test_the_first_tensor_that_does_not_fit_is_named(
    pipeline_folder: Path, tuned, to_bfl, tmp_path: Path, change, message: str, bfl: bool
) -> None:
    state = dict(tuned)
    if bfl:
        state = to_bfl(state)
        names = {"transformer_blocks.0.attn.to_q.weight": "double_blocks.0.img_attn.qkv.weight"}
        names |= {"transformer_blocks.1.attn.to_q.weight": "double_blocks.1.img_attn.qkv.weight"}
        names |= {"proj_out.weight": "final_layer.linear.weight"}
        state |= {ours: state[theirs] for ours, theirs in names.items() if theirs in state}
        change(state)
        for ours, theirs in names.items():
            state.pop(theirs, None)
            if ours in state:
                state[theirs] = state.pop(ours)
            message = message.replace(ours.replace(".", r"\."), theirs.replace(".", r"\."))
        message = message.replace("[32, 32\\]", "[96, 32\\]")
    else:
        change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(SrpoError, match=message) as failure:
        load_flux(str(pipeline_folder), weights=tmp_path / "x.safetensors")
    assert "\n" not in str(failure.value)


def test_what_is_neither_a_transformer_nor_a_lora_is_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    save_file({"model.visual.proj": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(SrpoError, match=r"neither a FLUX transformer nor a LoRA.*model\.visual\.proj"):
        load_flux(str(pipeline_folder), weights=tmp_path / "x.safetensors")


def test_of_weights_one_may_be_a_transformer_and_one_a_lora(pipeline_folder: Path, tuned, tmp_path: Path) -> None:
    whole, lora = tmp_path / "x.safetensors", tmp_path / "lora"
    save_file(tuned, whole)
    model = load_flux(str(pipeline_folder), weights=whole)
    model.add_lora(2, seed=3)
    model.save_weights(lora)
    both = load_flux(str(pipeline_folder), weights=[whole, lora])
    assert both.has_lora
    assert torch.equal(both.transformer.proj_out.weight, tuned["proj_out.weight"])
    with pytest.raises(UsageError, match="are both a transformer"):
        load_flux(str(pipeline_folder), weights=[whole, pipeline_folder / "transformer"])


# --- masters ---------------------------------------------------------------------------------------------


def test_masters_are_the_files_float32_values_and_none_where_bfloat16_is_all(
    pipeline_folder: Path, tuned, to_bfl, tmp_path: Path
) -> None:
    save_file(to_bfl(tuned), tmp_path / "x.safetensors")
    model = load_flux(str(pipeline_folder), torch.bfloat16, weights=tmp_path / "x.safetensors", literal=True)
    parameters = dict(model.transformer.named_parameters())
    masters = load_masters(str(pipeline_folder), tmp_path / "x.safetensors", parameters)
    assert list(masters) == list(parameters)
    for name, parameter in parameters.items():
        assert torch.equal(masters[name], tuned[name])
        assert torch.equal(masters[name].bfloat16(), parameter)
    save_file({name: tensor.bfloat16() for name, tensor in tuned.items()}, tmp_path / "y.safetensors")
    assert load_masters(str(pipeline_folder), tmp_path / "y.safetensors", parameters) is None


def test_masters_hold_what_a_folded_lora_adds_below_bfloat16(pipeline_folder: Path, tmp_path: Path) -> None:
    model = load_flux(str(pipeline_folder), torch.bfloat16, literal=True)
    model.add_lora(2, seed=3)
    for name, parameter in model.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-4)
    added = model.fuse_lora()
    parameters = dict(model.transformer.named_parameters())
    masters, plain = (load_masters(str(pipeline_folder), None, parameters, extra) for extra in (added, None))
    name = "transformer_blocks.0.attn.to_q.weight"
    torch.testing.assert_close(masters[name] - plain[name], added[name].delta(), atol=1e-8, rtol=1e-3)
    assert torch.equal(masters["proj_out.weight"], plain["proj_out.weight"])


# --- text encoders and downloads -------------------------------------------------------------------------


def test_text_encoders_alone_encode_as_the_whole_model_does(pipeline_folder: Path) -> None:
    encoder, model = load_prompt_encoder(str(pipeline_folder)), load_flux(str(pipeline_folder))
    expected = model.encode_prompts(["a cat"])
    embeds, pooled = encoder.encode("a cat")
    assert torch.equal(embeds, expected.prompt_embeds[0]) and torch.equal(pooled, expected.pooled[0])
    assert encoder.max_sequence_length == 12


def test_a_model_without_text_encoders_takes_encoded_prompts(pipeline_folder: Path, tmp_path: Path) -> None:
    for part in ("transformer", "vae", "scheduler"):
        shutil.copytree(pipeline_folder / part, tmp_path / part)
    model = load_flux(str(tmp_path), text_encoders=False)
    assert model.text_encoder is None
    with pytest.raises(RuntimeError, match="no text encoders"):
        model.encode_prompts(["a cat"])
    whole = load_flux(str(pipeline_folder))
    expected = whole.encode_prompts(["a cat"])
    encode = load_prompt_encoder(str(pipeline_folder)).encode
    for other in (model, whole):
        other.release_text_encoders(encode)
        assert torch.equal(other.encode_prompts(["a cat"]).prompt_embeds, expected.prompt_embeds)
        assert other.text_encoder is other.text_encoder_2 is None


def test_a_fingerprint_changes_with_the_encoders_and_with_how_they_compute(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    name = str(pipeline_folder)
    fingerprint = encoder_fingerprint(name)
    assert fingerprint == load_prompt_encoder(name).fingerprint == encoder_fingerprint(name, torch.float32)
    assert fingerprint != encoder_fingerprint(name, literal=True) != encoder_fingerprint(name, device="cuda")
    shutil.copytree(pipeline_folder, tmp_path / "copy")
    file = tmp_path / "copy" / "text_encoder_2" / "model.safetensors"
    assert encoder_fingerprint(str(tmp_path / "copy")) == fingerprint
    state = load_file(file)
    state["shared.weight"] = state["shared.weight"] + 1e-3
    save_file(state, file, metadata={"format": "pt"})
    assert encoder_fingerprint(str(tmp_path / "copy")) != fingerprint


def test_only_a_download_that_was_handed_in_is_asked_for_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, pipeline_folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked: list[HubFiles] = []

    def download(files: HubFiles) -> Path:
        asked.append(files)
        snapshot = tmp_path / "models--someone--a-model" / "snapshots" / "1234"
        shutil.copytree(pipeline_folder, snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("1234")
        return snapshot

    with pytest.raises(MissingError, match="hf download someone/a-model"):
        load_flux("someone/a-model", text_encoders=False)
    assert not asked
    assert load_flux("someone/a-model", text_encoders=False, download=download).granularity == 8
    assert [files.repo for files in asked] == ["someone/a-model"]
    assert "model_index.json" in asked[0].files
