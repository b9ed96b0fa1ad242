"""The README.md beside exported weights: what they are, whose licence binds them, how they were made, how to load them.

Its front matter is the Hugging Face Hub's, so that the folder can be uploaded as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from srpo_cli.config.schema import AlgorithmConfig, TrainConfig
from srpo_cli.models.flux_files import is_single_file
from srpo_cli.registry import HUB_FILES
from srpo_cli.rewards.mixed import formula

_DEV_LICENCE = "flux-1-dev-non-commercial-license"
_METHODS = {
    "srpo": "SRPO",
    "direct-align": "Direct-Align",
    "refl": "ReFL",
    "alignprop": "AlignProp",
    "dance-grpo": "DanceGRPO",
    "flow-grpo": "Flow-GRPO",
}
_PAPERS = {
    "srpo": "arXiv:2509.06942",
    "direct-align": "arXiv:2509.06942",
    "refl": "arXiv:2304.05977",
    "draft": "arXiv:2309.17400",
    "alignprop": "arXiv:2310.03739",
    "dance-grpo": "arXiv:2505.07818",
    "flow-grpo": "arXiv:2505.05470",
}
_DEV_REPOSITORIES = ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Krea-dev")


@dataclass(frozen=True)
class Base:
    """The model that was aligned, as its users know it.

    ``repo`` is its repository on the Hugging Face Hub, empty where it has none; ``licence`` one of the Hub's
    identifiers, "other" with a name and a link.
    """

    name: str
    repo: str = ""
    licence: str = "unknown"
    licence_name: str | None = None
    licence_link: str | None = None
    architecture: str = "flux"

    @classmethod
    def of(cls, name: str) -> Base:
        """What is known of a model by its name in the configuration."""
        if name == "miniature":
            return cls(name, licence="apache-2.0", architecture="flux-miniature")
        hub = HUB_FILES.get(name)
        repo = hub.repo if hub else name
        if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo):
            return cls(name)
        if repo not in _DEV_REPOSITORIES:
            return cls(name, repo)
        link = f"https://huggingface.co/{repo}/blob/main/LICENSE.md"
        return cls(name, repo, "other", _DEV_LICENCE, link, "flux-1-dev")

    @property
    def pipeline(self) -> str:
        """What ``FluxPipeline.from_pretrained`` takes; a single file brings the transformer only."""
        return HUB_FILES["flux.1-dev"].repo if is_single_file(self.name) else self.repo or self.name

    @property
    def title(self) -> str:
        """Name for people."""
        return "srpo's miniature" if self.name == "miniature" else self.repo or Path(self.name).name


def model_card(
    *,
    config: TrainConfig,
    base: Base,
    result: Mapping[str, Any],
    commands: Sequence[str],
    environment: Mapping[str, Any],
    summary: Mapping[str, Any] | None,
    start: Path | None = None,
    remarks: Sequence[str] = (),
    best: bool = False,
) -> str:
    """The card's text, front matter first.

    Args:
        config, base: of the run.
        result: what was exported, as the command reports it.
        commands: the run's and the export's.
        environment: the run's ``environment.json``.
        summary: the run's ``summary.json`` where its figures are those of these weights.
        start: transformer that a LoRA goes onto; None: the pipeline's own.
        remarks: what else a user of the weights must know, a sentence or two each.
        best: whether the weights are those of the run's best checkpoint, as its guard ranks them.
    """
    adapter = _is_adapter(result)
    data = ModelCardData(
        base_model=base.repo or None,
        library_name="diffusers",
        license=base.licence,
        license_name=base.licence_name,
        license_link=base.licence_link,
        pipeline_tag="text-to-image",
        tags=["flux", *_tags(config.algorithm.name), *(["lora"] if adapter else [])],
        base_model_relation=("adapter" if adapter else "finetune") if base.repo else None,
    )
    sections = [
        f"# {title(base, config.algorithm, result['format'])}",
        _what(config, base, result),
        _licence(base),
        "## Load it",
        _how_to_load(config, base, result, start),
        "## How it was made",
        _how_it_was_made(config, result, best, environment),
        "```sh\n" + "\n".join(commands) + "\n```",
        "## Measured",
        _measured(base, result, summary),
    ]
    if result["format"] == "extract":
        sections += ["## What the LoRA keeps", _kept(result)]
    sections += ["## Limits", _bullets([*remarks, *_limits(base, config)])]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def title(base: Base, algorithm: AlgorithmConfig, form: str) -> str:
    """Name of exported weights, for people."""
    return f"{base.title} aligned by {_method(algorithm)}" + (" (LoRA)" if form in ("lora", "extract") else "")


def _method(algorithm: AlgorithmConfig) -> str:
    """A method as its paper calls it."""
    if algorithm.name == "draft":
        return "DRaFT-LV" if algorithm.draft.noises else f"DRaFT-{algorithm.draft.last_steps}"
    return _METHODS[algorithm.name]


def _method_and_paper(algorithm: AlgorithmConfig) -> str:
    """What was optimised, and how, with the papers to read."""
    if algorithm.name == "srpo":
        return f"SRPO on Direct-Align ({_PAPERS['srpo']}), schedule {algorithm.schedule}"
    schedule = f", schedule {algorithm.schedule}" if algorithm.name == "direct-align" else ""
    signal = f"the semantic-relative reward ({_PAPERS['srpo']})" if algorithm.relative else "the plain reward"
    return f"{_method(algorithm)} ({_PAPERS[algorithm.name]}){schedule}, on {signal}"


def _tags(name: str) -> list[str]:
    return ["srpo", "direct-align"] if name == "srpo" else [name]


def _what(config: TrainConfig, base: Base, result: Mapping[str, Any]) -> str:
    rank = result.get("rank")
    what = {
        "lora": f"A LoRA of rank {rank} for {base.title}'s transformer, its scale folded in (alpha = rank).",
        "full": f"A whole transformer in place of {base.title}'s, in diffusers' layout.",
        "merged": f"{base.title}'s transformer with a trained LoRA folded into its weights, in diffusers' layout.",
        "extract": f"The difference of a fully trained transformer to {base.title}'s, as a LoRA of rank {rank} "
        "(alpha = rank). It is an approximation: see below what it keeps.",
    }[result["format"]]
    return " ".join([config.description.rstrip(".") + "." if config.description else "", what]).strip()


def _licence(base: Base) -> str:
    if base.licence_link:
        return (
            f"These weights derive from {base.repo} and are bound by its licence, [{base.licence_name}]"
            f"({base.licence_link}): read it before you use them or pass them on."
        )
    if base.licence == "unknown":
        return (
            f"These weights derive from {base.repo or base.name}, whose licence srpo does not know. It binds these "
            "weights too: look it up before you pass them on."
        )
    return f"These weights derive from {base.title}, which is under the licence {base.licence}."


def _how_to_load(config: TrainConfig, base: Base, result: Mapping[str, Any], start: Path | None) -> str:
    """A snippet for diffusers and the command for srpo."""
    folder, adapter = Path(result["output"]).name, _is_adapter(result)
    dtype = f"dtype=torch.{config.model.dtype}"
    imports, pipeline, tokens = "", f'"{base.pipeline}"', ""
    if base.name == "miniature":
        imports, pipeline = "\nfrom srpo_cli.miniature import WEIGHTS", 'WEIGHTS / "pipeline"'
        tokens = "max_sequence_length=pipe.tokenizer_2.model_max_length, "  # diffusers would pad prompts to FLUX's 512
    own = start if adapter else folder
    lines = [
        "import torch",
        "from diffusers import FluxPipeline" + (", FluxTransformer2DModel" if own else "") + imports,
    ]
    if own:
        read = "from_single_file" if str(own).endswith(".safetensors") else "from_pretrained"
        lines += ["", f'transformer = FluxTransformer2DModel.{read}("{own}", {dtype})']
        lines.append(f"pipe = FluxPipeline.from_pretrained({pipeline}, transformer=transformer, {dtype})")
    else:
        lines += ["", f"pipe = FluxPipeline.from_pretrained({pipeline}, {dtype})"]
    if adapter:
        lines.append(f'pipe.load_lora_weights("{folder}")')
    height, width = config.model.size
    lines += [
        f'size = {{"height": {height}, "width": {width}}}',
        f"sampling = dict({tokens}num_inference_steps={config.sampling.steps}, "
        f"guidance_scale={config.sampling.guidance:g})",
        'picture = pipe("a prompt", **size, **sampling).images[0]',
    ]
    paragraphs = [f"In the folder that `{folder}` is in:", "```python\n" + "\n".join(lines) + "\n```"]
    if adapter and base.name != "miniature":
        paragraphs.append("ComfyUI reads the file as it is: put it into `models/loras`.")
    if adapter and start and start == config.model.weights:
        paragraphs.append(
            f"The LoRA was trained on `{start}` in place of {base.title}'s transformer and belongs on it."
        )
    else:
        paragraphs.append(f'With srpo: `srpo sample --model {folder} --base {base.name} "a prompt"`.')
    return "\n\n".join([*paragraphs, "The prompt needs no control word."])


def _is_adapter(result: Mapping[str, Any]) -> bool:
    return result["format"] in ("lora", "extract")


def _how_it_was_made(config: TrainConfig, result: Mapping[str, Any], best: bool, environment: Mapping[str, Any]) -> str:
    words, train = config.control_words, config.train
    trained = "every weight"
    if result["format"] in ("lora", "merged"):
        trained = "a LoRA" + ("" if config.lora.base == "model" else f" over a base kept in {config.lora.base}")
    weights = "as they were trained"
    if result["weights"] == "average":
        weights = "their moving average" + (f", decay {train.ema:g}" if train.ema else "")
    compared = {
        "control words, towards": ", ".join(words.positive),
        "control words, away from": ", ".join(words.negative),
    }
    rows = {
        "method": _method_and_paper(config.algorithm),
        "reward": formula((part.weight, name) for name, part in config.reward.parts.items()),
        **(compared if config.algorithm.compares_words else {}),
        "prompts": config.prompts.source,
        "trained": trained,
        "steps": f"{result['step']} of {train.steps}, {train.batch_size} rollout(s) each in "
        f"{environment.get('processes', 1)} process(es)",
        **({"checkpoint": f"step {result['step']}, the run's best by held-out evidence"} if best else {}),
        "weights": weights,
        "learning rate": f"{config.optimizer.lr:g}",
        "size of rollouts": "x".join(map(str, config.model.size)),
        "seed": train.seed,
        "made with": ", ".join(f"{name} {found}" for name, found in environment["packages"].items() if found),
        "device": environment.get("device", "unknown"),
    }
    return _table(("", ""), rows.items())


def _measured(base: Base, result: Mapping[str, Any], summary: Mapping[str, Any] | None) -> str:
    if not (summary and summary.get("tuned")):
        return "Nothing was measured of these weights."
    names = {"base": base.title, "tuned": "the run's weights"}
    rows = [
        (name.replace("_", " "), *(_interval(summary[side].get(name)) for side in names)) for name in summary["tuned"]
    ]
    exact = result["format"] in ("lora", "full") and result["dtype"] == "float32"
    prompts = "" if exact else "What was measured are the run's own weights; this file, which rounds them, was not. "
    prompts += f"Means over {summary['evaluation_prompts']} held-out prompts with 95 % intervals."
    if base.name == "miniature":
        prompts += (
            " These are figures of the miniature, a small model of FLUX's layout for trying things out: they say "
            "nothing about FLUX."
        )
    return _table(("", *names.values()), rows) + "\n\n" + prompts


def _interval(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "not measured"
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _kept(result: Mapping[str, Any]) -> str:
    layers = [
        (layer["layer"], layer["rank"], f"{layer['difference']:.3e}", f"{layer['error']:.4f}")
        for layer in result["layers"]
    ]
    table = _table(("layer", "rank", "norm of the difference", "error"), layers)
    return (
        f"Errors are Frobenius norms relative to the difference between the trained weights and the base's: "
        f"**{result['error']:.4f}** over the layers that have a LoRA, **{result['left_out']:.4f}** for what is left "
        f"out ({result['left_out_what']}), **{result['total_error']:.4f}** in all.\n\n"
        f"<details><summary>By layer</summary>\n\n{table}\n\n</details>"
    )


def _limits(base: Base, config: TrainConfig) -> list[str]:
    model = "the miniature draws its own small world and nothing else." if base.name == "miniature" else None
    rewards, s = ("one reward", "s") if len(config.reward.parts) == 1 else (f"{len(config.reward.parts)} rewards", "")
    judge = f"{rewards} say{s} of the control words" if config.algorithm.compares_words else f"{rewards} like{s}"
    return [
        f"The weights were moved towards what {judge}, not towards what people say; "
        "figures above, where there are any, are all that was measured.",
        f"What {base.title} cannot do, and its biases, remain: {model}"
        if model
        else f"What {base.title} cannot do, and its biases, remain.",
    ]


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
