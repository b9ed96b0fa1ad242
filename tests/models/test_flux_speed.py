"""Switches for memory and speed: they change what is kept and how it is computed, not what comes out."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from srpo_cli.errors import MissingError, UsageError
from srpo_cli.models.flux import Flux, load_flux

SIZE = (24, 40)


@pytest.fixture
def flux(pipeline_folder: Path) -> Flux:
    return load_flux(str(pipeline_folder))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(flux: Flux, **options: object) -> torch.Tensor:
    noise = flux.noise(2, SIZE, seeded())
    return flux.sample(flux.encode_prompts(["a cat", "a dog"]), noise, SIZE, 3, 3.5, **options)


def gradient(flux: Flux) -> torch.Tensor:
    """Of a picture's brightness after one step, in the first trainable weight of a block."""
    flux.transformer.zero_grad()
    noise = flux.noise(1, SIZE, seeded())
    velocity = flux.velocity(noise, torch.tensor(0.7), flux.encode_prompts(["a cat"]), 3.5, SIZE)
    flux.decode(noise - 0.7 * velocity, SIZE).mean().backward()
    blocks = flux.transformer.transformer_blocks.parameters()
    return next(parameter.grad.clone() for parameter in blocks if parameter.requires_grad)


class HostReads(TorchDispatchMode):
    """Counts the times that the host asks for a tensor's value, which would make it wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


# --- no waiting for the device ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"truncate_time": True}], ids=str)
def test_a_sample_never_asks_for_a_value(flux: Flux, options: dict[str, object]) -> None:
    sample(flux)  # prompts are encoded and positions made
    with HostReads() as reads:
        sample(flux, **options)
    assert reads.count == 0


def test_a_velocity_and_its_gradient_never_ask_for_a_value(flux: Flux) -> None:
    gradient(flux)
    with HostReads() as reads:
        gradient(flux)
    assert reads.count == 0


# --- recomputing blocks -----------------------------------------------------------------------------------


def test_blocks_are_recomputed_in_the_backward_pass_only(flux: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradient(flux)
    counts = {"transformer": 0, "vae": 0}

    def count(part: str):
        return lambda *_: counts.__setitem__(part, counts[part] + 1)

    flux.transformer.single_transformer_blocks[0].register_forward_pre_hook(count("transformer"))
    flux.vae.decoder.up_blocks[0].register_forward_pre_hook(count("vae"))
    flux.checkpoint_blocks(transformer=True, vae=True)
    assert torch.equal(gradient(flux), expected)
    assert counts == {"transformer": 2, "vae": 2}
    with torch.no_grad():
        flux.decode(sample(flux), SIZE)
    assert counts == {"transformer": 2 + 3, "vae": 2 + 1}
    flux.checkpoint_blocks(transformer=False, vae=False)
    gradient(flux)
    assert counts == {"transformer": 2 + 3 + 1, "vae": 2 + 1 + 1}


def saved_bytes(flux: Flux) -> int:
    """Of activations in the autoencoder, on the way to a picture."""
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    latents = flux.noise(1, (64, 64), seeded()).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        images = flux.decode(latents, (64, 64))
    images.sum().backward()
    return sum(seen.values())


def test_a_decoder_that_is_recomputed_keeps_less(flux: Flux) -> None:
    plain = saved_bytes(flux)
    flux.checkpoint_blocks(transformer=False, vae=True)
    assert saved_bytes(flux) < 0.6 * plain  # three levels here; FLUX's decoder has four, of three times the layers


# --- a caller's autocast ----------------------------------------------------------------------------------


def test_the_autoencoder_computes_in_its_own_dtype_whatever_the_caller_does(flux: Flux) -> None:
    latents, images = flux.noise(1, SIZE, seeded()), torch.rand(1, 3, *SIZE, generator=seeded())
    pictures, encoded = flux.decode(latents, SIZE), flux.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flux.decode(latents, SIZE), pictures)
        assert torch.equal(flux.encode(images), encoded)


# --- compiling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["model", "int8"])
def test_compiled_blocks_are_whole_graphs_and_compute_the_same(pipeline_folder: Path, base: str) -> None:
    torch._dynamo.reset()
    flux = load_flux(str(pipeline_folder), base=base)
    if base == "int8":
        flux.add_lora(2, targets=["attn.to_q"], seed=1)
    flux.checkpoint_blocks(transformer=True, vae=False)
    drawn, expected = sample(flux), gradient(flux)
    flux.compile_blocks(backend="eager")  # whole: a graph break would be an error
    torch.testing.assert_close(sample(flux), drawn, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradient(flux), expected, atol=1e-6, rtol=1e-3)
    torch._dynamo.utils.counters.clear()
    sample(flux), gradient(flux)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and not counters["stats"].get("unique_graphs")
    torch._dynamo.reset()


# --- attention --------------------------------------------------------------------------------------------


def test_auto_takes_the_native_attention_on_a_cpu(flux: Flux) -> None:
    before = sample(flux)
    assert flux.use_attention() == "native"
    assert torch.equal(sample(flux), before)
    assert flux.use_attention("_native_math") == "_native_math"
    torch.testing.assert_close(sample(flux), before, atol=1e-5, rtol=1e-4)


def test_a_choice_of_attention_is_one_models_alone(flux: Flux, pipeline_folder: Path) -> None:
    before = sample(load_flux(str(pipeline_folder)))
    with pytest.raises(UsageError):
        flux.use_attention("_native_cudnn")
    assert torch.equal(sample(flux), before)
    flux.use_attention("_native_math")
    assert torch.equal(sample(load_flux(str(pipeline_folder))), before)


def test_attention_that_is_unknown_not_installed_or_not_for_this_device_is_one_line(flux: Flux) -> None:
    with pytest.raises(UsageError, match=r"Unknown attention backend 'flex_attn'\. Did you mean 'flex'"):
        flux.use_attention("flex_attn")
    with pytest.raises(MissingError, match=r"attention sage is not installed here .*sageattention"):
        flux.use_attention("sage")
    with pytest.raises(UsageError, match="attention _native_cudnn does not work in float32 on cpu") as failure:
        flux.use_attention("_native_cudnn")
    assert "\n" not in str(failure.value)


# --- float8 rollouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["model", "float8"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_float8_rollouts_are_near_and_leave_the_model_as_it_was(pipeline_folder: Path, base: str, lora: bool) -> None:
    flux = load_flux(str(pipeline_folder), base=base)
    if lora:
        flux.add_lora(2, seed=1)
    names, drawn = list(flux.transformer.state_dict()), sample(flux)
    with flux.float8_rollouts():
        near = sample(flux)
    assert 0 < (near - drawn).norm() / drawn.norm() < 0.1
    assert torch.equal(sample(flux), drawn)
    assert list(flux.transformer.state_dict()) == names


def test_float8_rollouts_see_the_weights_as_they_are_when_entered(flux: Flux) -> None:
    with flux.float8_rollouts():
        before = sample(flux)
    with torch.no_grad():
        flux.transformer.single_transformer_blocks[0].proj_out.weight *= 2
    with flux.float8_rollouts():
        assert not torch.allclose(sample(flux), before, atol=1e-3)


def test_float8_rollouts_do_not_go_over_four_bits(pipeline_folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    flux = load_flux(str(pipeline_folder), base="nf4")
    with pytest.raises(UsageError, match=r"float8 does not go with lora\.base nf4"), flux.float8_rollouts():
        pass


def test_float8_rollouts_and_compiled_blocks_go_together(flux: Flux) -> None:
    torch._dynamo.reset()
    with flux.float8_rollouts():
        expected = sample(flux)
    plain = sample(flux)
    flux.compile_blocks(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(sample(flux), plain, atol=1e-5, rtol=1e-4)
        with flux.float8_rollouts():
            torch.testing.assert_close(sample(flux), expected, atol=1e-4, rtol=1e-3)
    torch._dynamo.reset()


RUN = [("draw", 8), ("draw", 4), ("gradient", 16), ("gradient", 8), ("draw", 1), ("gradient", 2), ("gradient", 1)]
RUN_IN_FLOAT8 = [("draw", 8), ("float8", 8), ("float8", 4), *RUN[2:4], ("draw", 4), ("float8", 1), *RUN[4:]]


@pytest.mark.parametrize(
    "run", [pytest.param(RUN, id="plain"), pytest.param(RUN_IN_FLOAT8, id="float8", marks=pytest.mark.slow)]
)
def test_compiled_blocks_take_all_the_batches_of_a_run(flux: Flux, run: list[tuple[str, int]]) -> None:
    torch._dynamo.reset()
    for blocks in (flux.transformer.transformer_blocks, flux.transformer.single_transformer_blocks):
        blocks.append(deepcopy(blocks[0]))  # what a second block is given differs from what the first is
    flux.checkpoint_blocks(transformer=True, vae=False)
    flux.compile_blocks(backend="eager")
    one = flux.encode_prompts(["a cat"])
    for kind, count in run:
        noise, prompts = flux.noise(count, SIZE, seeded()), one.repeat(count)
        if kind == "gradient":
            flux.velocity(noise, torch.tensor(0.7), prompts, 3.5, SIZE).mean().backward()
        else:
            with flux.float8_rollouts() if kind == "float8" else nullcontext():
                flux.sample(prompts, noise, SIZE, 1, 3.5)
    torch._dynamo.reset()
