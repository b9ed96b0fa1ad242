"""The training step against numbers recorded from the authors' script: same inputs, same gradients, float64.

Everything that is computed here goes through the functions that training calls. ``SRPO_REFERENCE_VECTORS``
names another folder of cases; ``pytest -v`` lists the largest errors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from srpo_cli.algorithms.base import ControlWords, Rollout
from srpo_cli.algorithms.injection import Injection, ReferenceDraws
from srpo_cli.algorithms.srpo import SRPO
from srpo_cli.core.schedule import shifted_sigmas, truncate_to_clock
from srpo_cli.models.flux import Conditioning, Flux, _pack
from srpo_cli.rewards.clip import ClipReward
from srpo_cli.rewards.preprocess import Preprocess

FOLDER = Path(os.environ.get("SRPO_REFERENCE_VECTORS", Path(__file__).parents[1] / "reference_vectors"))
CASES = sorted(path.stem for path in FOLDER.glob("*.json"))
TOLERANCE = 1e-6
WORDS = ControlWords(
    positive=("Natural-lighting", "Detail", "Detailed", "Real"),
    negative=("Concept art", "Painting", "Anime", "Flat", "Oil"),
)
worst: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def list_errors(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.config.get_verbosity() > 0:
        with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            print(f"\nlargest relative errors over {', '.join(CASES)}:")
            print(*(f"  {what:38s} {error:.1e}" for what, error in worst.items()), sep="\n")


def relative_error(value: Tensor, reference: Tensor) -> float:
    norm = reference.double().norm()
    difference = (value.double() - reference.double()).norm()
    return (difference / norm if norm else difference).item()


def check(what: str, value: Tensor | float, reference: Tensor | float, tolerance: float = TOLERANCE) -> None:
    error = relative_error(torch.as_tensor(value, dtype=torch.float64), torch.as_tensor(reference, dtype=torch.float64))
    worst[what] = max(worst.get(what, 0.0), error)
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


def hashed_words(texts: list[str]) -> Tensor:
    """The stand-in tokenizer of the recording: one md5-based id per word, 24 ids."""
    rows = torch.zeros(len(texts), 24, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        words = [int(hashlib.md5(word.encode()).hexdigest(), 16) % 250 + 1 for word in text.lower().split()]
        row[: len(words) + 2] = torch.tensor([254, *words, 255])
    return rows


def build(cls: type, name: str) -> torch.nn.Module:
    config = json.loads((FOLDER / "models" / "config.json").read_text())[name]
    model = cls(**{key: value for key, value in config.items() if not key.startswith("_")})
    model.load_state_dict(load_file(FOLDER / "models" / f"{name}.safetensors"))
    return model.double()


@dataclass
class Case:
    config: dict
    record: dict
    tensors: dict[str, Tensor]
    flux: Flux
    srpo: SRPO
    draws: ReferenceDraws
    rollout: Rollout
    injections: list[Injection]

    def tensor(self, branch: int, name: str) -> Tensor:
        return self.tensors[f"b{branch}.{name}"]


def in_order(pair: list[Injection], count: int) -> list[Injection]:
    """The recording's branches: from ``count - 1`` down to 0, odd ones denoise and even ones invert."""
    by_branch = {injection.branch: injection for injection in pair}
    return [by_branch["denoise" if i % 2 else "invert"] for i in reversed(range(count))]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    record = json.loads((FOLDER / f"{request.param}.json").read_text())
    tensors = load_file(FOLDER / f"{request.param}.safetensors")
    config = record["config"]
    flux = Flux(
        build(FluxTransformer2DModel, "transformer"),
        build(AutoencoderKL, "vae"),
        FlowMatchEulerDiscreteScheduler(),
    )
    clip = build(open_clip.CLIP, "reward")
    scale = clip.logit_scale.exp().item() / 20 if config["reward"] == "pickscore" else 1.0
    reward = ClipReward(clip, hashed_words, preprocess=Preprocess(clip.visual.image_size[0]), scale=scale)
    draws = ReferenceDraws(
        train_timestep=tuple(config["train_timestep"]),
        schedule_steps=config["vis_sampling_step"],
        shift=config["shift"],
        timestep_length=config["timestep_length"],
        groundtruth_ratio=config["groundtruth_ratio"],
        discount_pos=tuple(config["discount_pos"]),
        discount_inv=tuple(config["discount_inv"]),
    )
    length = tensors["encoder_hidden_states"].shape[1]
    conditioning = Conditioning(
        tensors["encoder_hidden_states"],
        tensors["pooled_prompt_embeds"],
        tensors["text_ids"].repeat(length, 1),
    )
    size = (config["h"], config["w"])
    return Case(
        config,
        record,
        tensors,
        flux,
        SRPO(flux, reward, WORDS, guidance=3.5, hinge=0.7),
        draws,
        Rollout(tensors["latent_start"], tensors["noise"], [config["caption"]], conditioning, size),
        in_order(draws.at(config["mid_timestep"]), config["gradient_accumulation_steps"]),
    )


def test_there_are_cases() -> None:
    assert CASES


@pytest.mark.parametrize(
    ("count", "branches"),
    [
        (1, ["invert"]),
        (2, ["denoise", "invert"]),
        (3, ["invert", "denoise", "invert"]),
        (4, ["denoise", "invert", "denoise", "invert"]),
    ],
)
def test_branches_are_counted_down_to_an_invert(count: int, branches: list[str]) -> None:
    assert [injection.branch for injection in in_order(ReferenceDraws().at(500), count)] == branches


def test_noise_is_packed_as_recorded(case: Case) -> None:
    assert torch.equal(_pack(case.tensors["noise_spatial"]).double(), case.tensors["noise"])


def test_schedules_are_bit_equal(case: Case) -> None:
    config, tensors, draws = case.config, case.tensors, case.draws
    rollout = case.flux.sigmas(config["sampling_steps"], case.rollout.size, config["shift"])
    assert torch.equal(rollout, tensors["sigma_schedule_rollout"])
    assert torch.equal((truncate_to_clock(rollout[:-1]) * 1000).round().long(), tensors["rollout_timestep_int"])
    assert torch.equal(shifted_sigmas(config["vis_sampling_step"], config["shift"]), tensors["sigma_schedule_vis"])
    assert torch.equal(draws.sigmas, tensors["sigmas_train"])
    assert torch.equal(draws.discounts("denoise"), tensors["discount_pos"])
    assert torch.equal(draws.discounts("invert"), tensors["discount_inv"])


def test_injections_are_bit_equal(case: Case) -> None:
    assert len(case.injections) == len(case.record["branches"])
    for injection, recorded in zip(case.injections, case.record["branches"], strict=True):
        assert injection.branch == ("denoise" if recorded["inversion"] else "invert")
        assert injection.sigma.item() == recorded["sigma_inject"]
        assert injection.sigma_recover.item() == recorded["sigma_recover"]
        assert abs(injection.delta_sigma.item()) == -recorded["dsigma"]
        assert round(injection.sigma_model.item() * 1000) == recorded["timestep_int"]
        weights = [injection.positive_weight.item(), injection.negative_weight.item()]
        expected = [(1 + torch.tensor(recorded["discount"])).item(), -1]
        assert weights == (expected if recorded["inversion"] else expected[::-1])


def test_texts_are_those_recorded(case: Case) -> None:
    for word, sign in zip(WORDS.at(case.config["step"]), ("pos", "neg"), strict=True):
        texts = WORDS.texts(word, case.rollout.prompts)
        assert texts == [case.record[f"{sign}_caption"]]
        assert torch.equal(hashed_words(texts), case.tensors[f"token_ids_{sign}"])
        check("text features", case.srpo.reward.text_features(texts), case.tensors[f"text_features_{sign}"])


def test_the_rollout_with_truncated_time_ends_where_recorded(case: Case) -> None:
    config = case.config
    x_0 = case.flux.sample(
        case.rollout.conditioning,
        case.rollout.eps,
        case.rollout.size,
        steps=config["sampling_steps"],
        guidance=config["train_guidence"],
        shift=config["shift"],
        truncate_time=True,
    )
    check("rollout", x_0, case.tensors["latent_start"])


def test_every_branch_computes_what_was_recorded(case: Case) -> None:
    transformer = case.flux.transformer
    scale = 1 / case.config["gradient_accumulation_steps"]
    before = {name: torch.zeros_like(parameter) for name, parameter in transformer.named_parameters()}
    transformer.zero_grad()
    for index, (injection, recorded) in enumerate(zip(case.injections, case.record["branches"], strict=True)):
        (trace,) = case.srpo.backward_pass(case.rollout, [injection], case.config["step"], scale=scale)

        with torch.no_grad():
            recovery = case.srpo.recovery(case.rollout, [injection])
        check("noisy", recovery.x_t, case.tensor(index, "noisy"))
        check("velocity", recovery.model_out, case.tensor(index, "pred"))
        check("recovered", trace.x_0_hat, case.tensor(index, "recovered"))
        check("image", trace.images, case.tensor(index, "image"))
        check("reward", trace.reward, recorded["reward"])
        check("loss", scale * trace.loss, recorded["loss"])
        active = float(recorded["hinge_active"])
        check("dloss/drecovered", trace.x_0_hat_grad, -active * scale * case.tensor(index, "dreward_drecovered"))
        slope = -injection.delta_sigma.double() / (1 - injection.sigma_recover)
        check("dloss/dvelocity", slope * trace.x_0_hat_grad, case.tensor(index, "dloss_dpred"))

        gradients = {name: parameter.grad - before[name] for name, parameter in transformer.named_parameters()}
        before = {name: parameter.grad.clone() for name, parameter in transformer.named_parameters()}
        assert gradients.keys() == recorded["grad_norms"].keys()
        total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        check("branch gradient norm", total, recorded["grad_norm_total"])
        for name, gradient in gradients.items():
            if f"b{index}.grad.{name}" in case.tensors:
                check("branch gradient", gradient, case.tensor(index, f"grad.{name}"))
                check("accumulated gradient", before[name], case.tensor(index, f"accum_grad.{name}"))
        if not recorded["hinge_active"]:
            assert trace.loss.item() == 0
            assert all(not gradient.any() for gradient in gradients.values())


def test_backward_accumulates_all_branches(case: Case) -> None:
    transformer = case.flux.transformer
    transformer.zero_grad()
    metrics = case.srpo.backward(case.rollout, case.injections, case.config["step"])

    check("sum of losses", metrics["loss"], case.record["sum_loss"])
    check("last loss", metrics["invert/loss"], case.record["returned_loss"])
    for name, parameter in transformer.named_parameters():
        check("accumulated gradient, all parameters", parameter.grad, case.tensors[f"accum_grad_full.{name}"])


def test_frozen_parts_get_no_gradient(case: Case) -> None:
    frozen = [*case.flux.vae.parameters(), *case.srpo.reward.clip.parameters()]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)
