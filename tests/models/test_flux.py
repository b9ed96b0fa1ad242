"""FLUX: the same pictures as FluxPipeline, differentiable, and one line for whatever cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from srpo_cli.errors import MissingError, SrpoError, UsageError
from srpo_cli.models.flux import Flux, load_flux, load_latent_space

SIZE = (24, 40)
PROMPTS = ["a cat", "two dogs, dark. and a rather long tail"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def flux(pipeline_folder: Path) -> Flux:
    return load_flux(str(pipeline_folder))


def draw(flux: Flux, prompts: list[str] = PROMPTS, **options: object) -> torch.Tensor:
    conditioning = flux.encode_prompts(prompts)
    noise = flux.noise(len(prompts), SIZE, seeded())
    return flux.decode(flux.sample(conditioning, noise, SIZE, steps=3, guidance=2.5, **options), SIZE)


# --- the same as FluxPipeline ---------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["pipeline_folder", "fixed_shift_folder"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_it_draws_what_flux_pipeline_draws_to_the_bit(folder: str, prompt: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)
    pipeline = FluxPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=3,
        guidance_scale=2.5,
        generator=seeded(),
        max_sequence_length=12,
        output_type="pt",
    ).images
    assert torch.equal(draw(load_flux(str(path)), [prompt]), expected)
    assert expected.std() > 0.01


def test_batches_too_once_their_prompts_are_encoded(flux: Flux, pipeline_folder: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.requires_grad_(False)  # torch's CPU convolutions round otherwise where weights could be trained
    conditioning = flux.encode_prompts(PROMPTS)
    expected = pipeline(
        prompt_embeds=conditioning.prompt_embeds,
        pooled_prompt_embeds=conditioning.pooled,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=3,
        guidance_scale=2.5,
        generator=seeded(),
        output_type="pt",
    ).images
    assert torch.equal(draw(flux), expected)


def test_half_precision_rounds_where_the_pipeline_rounds(pipeline_folder: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(pipeline_folder, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    flux = Flux(**parts, max_sequence_length=12)
    expected = pipeline(
        PROMPTS[0],
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=3,
        guidance_scale=2.5,
        generator=seeded(),
        max_sequence_length=12,
        output_type="latent",
    ).images
    drawn = flux.sample(flux.encode_prompts(PROMPTS[:1]), flux.noise(1, SIZE, seeded()), SIZE, 3, 2.5)
    assert drawn.dtype == torch.bfloat16
    assert torch.equal(drawn, expected)
    assert flux.decode(drawn, SIZE).dtype == torch.float32


def test_noise_is_the_pipelines_to_the_bit_and_one_generator_per_picture_works(
    flux: Flux, pipeline_folder: Path
) -> None:
    pipeline = FluxPipeline.from_pretrained(pipeline_folder)
    expected, _ = pipeline.prepare_latents(2, 4, *SIZE, torch.float32, torch.device("cpu"), seeded())
    assert torch.equal(flux.noise(2, SIZE, seeded()), expected)
    apart = torch.cat([flux.noise(1, SIZE, seeded(seed)) for seed in (1, 2)])
    assert torch.equal(flux.noise(2, SIZE, [seeded(1), seeded(2)]), apart)


def test_prompts_are_encoded_as_the_pipeline_encodes_them(flux: Flux, pipeline_folder: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(pipeline_folder)
    embeds, pooled, text_ids = pipeline.encode_prompt(PROMPTS, max_sequence_length=12)
    ours = flux.encode_prompts(PROMPTS)
    torch.testing.assert_close(ours.prompt_embeds, embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.pooled, pooled, atol=1e-6, rtol=0)
    assert torch.equal(ours.text_ids, text_ids)


def test_the_models_own_shift_grows_with_the_picture_only_where_it_is_dynamic(
    flux: Flux, fixed_shift_folder: Path
) -> None:
    small, large = flux.sigmas(4, (16, 16)), flux.sigmas(4, (512, 512))
    assert (large[1:-1] > small[1:-1]).all()
    fixed = load_flux(str(fixed_shift_folder))
    assert torch.equal(fixed.sigmas(4, (16, 16)), fixed.sigmas(4, (512, 512)))
    torch.testing.assert_close(fixed.sigmas(4, SIZE), fixed.sigmas(4, SIZE, shift=1.7))


# --- the parts ------------------------------------------------------------------------------------------


def test_a_prompt_is_encoded_once_and_alike_to_the_bit_in_any_company(
    flux: Flux, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = flux.encode_prompts(PROMPTS)
    monkeypatch.setattr(flux, "text_encoder_2", None)  # would fail if it were asked again
    alone = flux.encode_prompts(PROMPTS[1:])
    assert torch.equal(alone.prompt_embeds[0], together.prompt_embeds[1])
    assert torch.equal(alone.pooled, together.select([1]).pooled)
    assert flux.encode_prompts([PROMPTS[0]] * 3).prompt_embeds.shape == (3, 12, 24)


def test_a_scalar_sigma_is_every_samples_sigma(flux: Flux) -> None:
    conditioning, noise = flux.encode_prompts(PROMPTS), flux.noise(2, SIZE, seeded())
    with torch.no_grad():
        scalar = flux.velocity(noise, torch.tensor(0.7), conditioning, 3.5, SIZE)
        listed = flux.velocity(noise, torch.tensor([0.7, 0.7]), conditioning, 3.5, SIZE)
        mixed = flux.velocity(noise, torch.tensor([0.7, 0.2]), conditioning, 3.5, SIZE)
    assert torch.equal(scalar, listed)
    torch.testing.assert_close(mixed[0], scalar[0])
    assert not torch.allclose(mixed[1], scalar[1], atol=1e-4)


def test_guidance_reaches_the_transformer(flux: Flux) -> None:
    conditioning, noise = flux.encode_prompts(PROMPTS), flux.noise(2, SIZE, seeded())
    with torch.no_grad():
        one, two = (flux.velocity(noise, torch.tensor(0.7), conditioning, g, SIZE) for g in (1.0, 3.5))
    assert not torch.allclose(one, two, atol=1e-4)


def test_truncated_time_changes_the_rollout_a_little(flux: Flux) -> None:
    exact, truncated = draw(flux), draw(flux, truncate_time=True)
    assert not torch.equal(exact, truncated)
    torch.testing.assert_close(exact, truncated, atol=1e-2, rtol=0)


def test_encoding_is_packed_scaled_and_does_not_sample(flux: Flux) -> None:
    images = torch.rand(2, 3, *SIZE, generator=seeded())
    packed = flux.encode(images)
    assert packed.shape == flux.noise(2, SIZE).shape == (2, 15, 16)
    assert torch.equal(packed, flux.encode(images))
    posterior = flux.vae.encode(2 * images - 1).latent_dist.mode()
    assert packed[0, 1, 2].item() == pytest.approx(((posterior[0, 0, 1, 2] - 0.1) * 0.7).item())  # token (0, 1), row 1


def test_decoding_is_bounded_and_differentiable(flux: Flux) -> None:
    packed = flux.noise(1, SIZE, seeded()).requires_grad_()
    images = flux.decode(packed, SIZE)
    assert images.shape == (1, 3, *SIZE) and images.min() >= 0 and images.max() <= 1
    images.sum().backward()
    assert packed.grad.abs().sum() > 0


def test_only_the_transformer_is_trainable(flux: Flux) -> None:
    assert flux.trainable_parameters() == list(flux.transformer.parameters())
    for part in (flux.vae, flux.text_encoder, flux.text_encoder_2):
        assert not part.training and not any(parameter.requires_grad for parameter in part.parameters())


@pytest.mark.parametrize("size", [(24, 36), (0, 8), (4, 8), (-8, 8)])
def test_a_size_it_cannot_make_tells_the_multiple(flux: Flux, size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=r"-?\d+x-?\d+ px: both sides must be multiples of 8"):
        flux.noise(1, size)


# --- weights --------------------------------------------------------------------------------------------


def test_the_cpu_always_computes_in_float32(pipeline_folder: Path) -> None:
    assert load_flux(str(pipeline_folder), dtype=torch.bfloat16, device="cpu").dtype == torch.float32


def test_elsewhere_trained_and_frozen_parts_have_the_dtypes_they_are_given(pipeline_folder: Path) -> None:
    flux = load_flux(str(pipeline_folder), torch.float32, "meta", frozen_dtype=torch.bfloat16)
    assert flux.dtype == torch.float32
    assert {part.dtype for part in (flux.vae, flux.text_encoder, flux.text_encoder_2)} == {torch.bfloat16}
    assert load_flux(str(pipeline_folder), torch.bfloat16, "meta").vae.dtype == torch.bfloat16


def test_the_untrained_velocity_is_the_bases_to_the_bit_and_leaves_the_lora_on(pipeline_folder: Path) -> None:
    flux = load_flux(str(pipeline_folder))
    asked = flux.noise(2, SIZE, seeded()), torch.tensor([0.3, 0.8]), flux.encode_prompts(PROMPTS), 3.5, SIZE
    with torch.no_grad():
        base = flux.velocity(*asked)
        flux.add_lora(4, seed=1)
        for parameter in flux.trainable_parameters():
            parameter.normal_(std=0.1, generator=seeded(2))
    trained = flux.velocity(*asked)
    assert not torch.allclose(trained, base, atol=1e-2)
    with torch.no_grad():
        untrained = flux.untrained_velocity(*asked)
    assert torch.equal(untrained, base)
    trained.sum().backward()  # a graph from before goes backward as if nothing had been in between
    before = [parameter.grad for parameter in flux.trainable_parameters()]
    for parameter in flux.trainable_parameters():
        assert parameter.requires_grad
        parameter.grad = None
    again = flux.velocity(*asked)
    assert torch.equal(again, trained)
    again.sum().backward()
    after = [parameter.grad for parameter in flux.trainable_parameters()]
    assert all(torch.equal(one, other) and one.abs().max() > 0 for one, other in zip(before, after, strict=True))


def test_the_lora_is_back_on_where_the_untrained_velocity_fails(pipeline_folder: Path) -> None:
    flux = load_flux(str(pipeline_folder))
    flux.add_lora(4, seed=1)
    with torch.no_grad():
        for parameter in flux.trainable_parameters():
            parameter.normal_(std=0.1, generator=seeded(2))
        asked = torch.tensor(0.5), flux.encode_prompts(PROMPTS), 3.5, SIZE
        latents = flux.noise(2, SIZE, seeded())
        trained = flux.velocity(latents, *asked)
        with pytest.raises(RuntimeError):
            flux.untrained_velocity(latents[..., :1], *asked)
        assert torch.equal(flux.velocity(latents, *asked), trained)


def test_a_tuned_transformer_takes_the_place_of_the_pipelines(
    flux: Flux, pipeline_folder: Path, tmp_path: Path
) -> None:
    tuned = load_flux(str(pipeline_folder))
    with torch.no_grad():
        tuned.transformer.proj_out.bias += 0.3
    tuned.transformer.save_pretrained(tmp_path)
    reloaded = load_flux(str(pipeline_folder), weights=tmp_path)
    assert torch.equal(draw(reloaded), draw(tuned))
    assert not torch.equal(draw(reloaded), draw(flux))


@pytest.fixture
def lora_folder(pipeline_folder: Path, tmp_path: Path) -> Path:
    """A LoRA of rank 2 with alpha 4, as diffusers saves one."""
    transformer = load_flux(str(pipeline_folder)).transformer
    transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights="gaussian")
    )
    layers = get_peft_model_state_dict(transformer)
    layers = {name: torch.randn(tensor.shape, generator=seeded(i)) for i, (name, tensor) in enumerate(layers.items())}
    metadata = transformer.peft_config["default"].to_dict()
    FluxPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)
    return tmp_path


@pytest.mark.parametrize("file", ["", "pytorch_lora_weights.safetensors"])
def test_a_lora_draws_what_flux_pipeline_draws_with_it(pipeline_folder: Path, lora_folder: Path, file: str) -> None:
    ours = load_flux(str(pipeline_folder), weights=lora_folder / file)
    theirs = load_flux(str(pipeline_folder))
    pipeline = FluxPipeline.from_pretrained(pipeline_folder, transformer=theirs.transformer)
    pipeline.load_lora_weights(lora_folder)
    assert torch.equal(draw(ours), draw(theirs))
    assert not torch.equal(draw(ours), draw(load_flux(str(pipeline_folder))))
    names = [name for name, parameter in ours.transformer.named_parameters() if parameter.requires_grad]
    assert names and all("lora_" in name for name in names)
    assert len(ours.trainable_parameters()) == len(names)


def test_missing_models_tell_the_command_that_fetches_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingError, match=r"hf download black-forest-labs/FLUX\.1-dev") as failure:
        load_flux("flux.1-dev")
    assert failure.value.exit_code == 4 and "\n" not in str(failure.value)
    with pytest.raises(MissingError, match="hf download someone/a-model"):
        load_flux("someone/a-model")
    with pytest.raises(UsageError, match=r"'\./nowhere'"):
        load_flux("./nowhere")


def test_a_download_that_stopped_half_way_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").touch()
    monkeypatch.setattr("srpo_cli.models.flux_files.snapshot_download", lambda repo, **_: str(tmp_path))
    with pytest.raises(MissingError, match=r"scheduler/scheduler_config\.json.*continue with: hf download"):
        load_flux("flux.1-dev")


@pytest.mark.parametrize("part", ["scheduler", "vae", "transformer", "tokenizer_2"])
def test_a_missing_part_is_named(pipeline_folder: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(pipeline_folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / part)
    with pytest.raises(MissingError, match=part):
        load_flux(str(tmp_path / "copy"))


def damage_cut(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def damage_foreign(folder: Path) -> None:
    save_file({"something.else": torch.zeros(3)}, folder / "diffusion_pytorch_model.safetensors")


def damage_missing_tensor(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("proj_out.bias")
    save_file(tensors, file)


def damage_shape(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"proj_out.bias": torch.zeros(3)}, file)


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def damage_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"joint_attention_dim": 40}
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"context_embedder.weight": torch.zeros(32, 40)}, file)


@pytest.mark.parametrize(
    "damage",
    [damage_cut, damage_foreign, damage_missing_tensor, damage_shape, damage_config, damage_width],
    ids=lambda damage: damage.__name__.removeprefix("damage_"),
)
def test_damaged_or_foreign_weights_are_one_line(pipeline_folder: Path, tmp_path: Path, damage) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(pipeline_folder / "transformer", weights)
    damage(weights)
    with pytest.raises(SrpoError, match="weights") as failure:
        load_flux(str(pipeline_folder), weights=weights)
    assert "\n" not in str(failure.value) and len(str(failure.value)) < 400


def test_a_damaged_or_foreign_lora_is_one_line(pipeline_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    file.write_bytes(b"not a tensor file")
    with pytest.raises(SrpoError, match=r"some\.safetensors is not a safetensors file, or is cut short"):
        load_flux(str(pipeline_folder), weights=file)
    save_file({"lora_unet_double_blocks_0.lora_down.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(SrpoError, match="LoRA") as failure:
        load_flux(str(pipeline_folder), weights=file)
    assert "\n" not in str(failure.value) and len(str(failure.value)) < 400


def test_only_safetensors_are_read(pipeline_folder: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "lora.bin"
    torch.save({}, pickled)
    with pytest.raises(UsageError, match="only safetensors"):
        load_flux(str(pipeline_folder), weights=pickled)
    with pytest.raises(MissingError, match="nowhere"):
        load_flux(str(pipeline_folder), weights=tmp_path / "nowhere")


# --- the autoencoder alone ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae_folder(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    shutil.copytree(pipeline_folder / "vae", folder / "vae")
    return folder


def test_an_autoencoder_alone_does_what_the_whole_model_does_with_it(flux: Flux, vae_folder: Path) -> None:
    space = load_latent_space(str(vae_folder))
    images = torch.rand(2, 3, *SIZE, generator=seeded())
    latents = space.encode(images)
    assert torch.equal(latents, flux.encode(images))
    assert torch.equal(space.decode(latents, SIZE), flux.decode(latents, SIZE))
    assert torch.equal(space.noise(2, SIZE, seeded()), flux.noise(2, SIZE, seeded()))
    assert not any(parameter.requires_grad for parameter in space.vae.parameters())


@pytest.mark.parametrize(
    ("size", "pixels", "nearest"),
    [
        ((24, 40), None, (24, 40)),
        ((27, 37), None, (24, 40)),
        ((1, 300), None, (8, 304)),
        ((100, 400), 10_000, (48, 200)),
    ],
)
def test_the_nearest_size_is_one_that_it_can_make(flux: Flux, size, pixels, nearest) -> None:
    assert flux.nearest_size(size, pixels) == nearest
    assert flux.noise(1, nearest, seeded()).shape[1] == nearest[0] * nearest[1] // 64


def test_a_missing_autoencoder_is_named_with_the_command_that_fetches_it_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(MissingError, match="AutoencoderKL"):
        load_latent_space(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingError, match=r'hf download black-forest-labs/FLUX\.1-dev --include "vae/\*"'):
        load_latent_space("flux.1-dev")


def test_of_a_download_only_the_autoencoder_must_be_there(
    monkeypatch: pytest.MonkeyPatch, vae_folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("srpo_cli.models.flux_files.snapshot_download", lambda repo, **_: str(tmp_path))
    with pytest.raises(MissingError, match=r"vae/diffusion_pytorch_model\.safetensors"):
        load_latent_space("flux.1-dev")
    shutil.copytree(vae_folder / "vae", tmp_path / "vae")
    assert load_latent_space("flux.1-dev").granularity == 8
    assert load_latent_space("someone/a-model").granularity == 8
