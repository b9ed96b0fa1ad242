"""Rebuild every weight of the miniature from fixed seeds.

    python -m srpo_cli.miniature.build --work build-miniature                    # all stages, then export
    python -m srpo_cli.miniature.build --work build-miniature --stage vae        # one of them
    python -m srpo_cli.miniature.build --work build-miniature --scale 0.001 --output trial

Each stage leaves its result in --work and is skipped when that is there; the transformer's goes on from its last
checkpoint. A rebuild needs nothing but this package, 1.5 GB of memory for each worker and 0.2 GB of disk. On two CPU
cores it takes about two hours: renders 5 min, vae 7 min, reward 15 min, clip 5 min, oracle 18 min, transformer 60 min.
With a GPU the training of each is a matter of minutes (estimated, not measured); rendering stays on the CPU.
`python -m srpo_cli.miniature.measure --weights DIR` says whether the result is as good as it must be.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from srpo_cli.miniature import WEIGHTS
from srpo_cli.miniature.build import renders as rendering
from srpo_cli.miniature.build.transformer import Schedule

if TYPE_CHECKING:  # only the stages that train rewards need open_clip
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    from srpo_cli.miniature.build import reward

TRAIN_SEED, TRAIN_COUNT = 1_000, 20_000
VAE_STEPS = 6_000
CONTRASTIVE_STEPS, PREFERENCE_STEPS, PREFERENCE_ROUNDS = 1_000, 160, 3
CLIP_SEED = 7  # not the reward's 0: a second opinion starts from weights and batches of its own
CLASSIFIER_STEPS, PHOTOGRAPHS = 4_000, 6_000
TRANSFORMER = Schedule(steps=9_000, decay=3_500)
PIPELINE = "pipeline/model_index.json"  # tells a folder of weights from any other


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m srpo_cli.miniature.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate results")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="folder to export to; if not given the package's")
    parser.add_argument("--stage", choices=["all", *STAGES], default="all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes on a CPU")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of pictures and steps; a small one only tries the stages out"
    )
    args = parser.parse_args()
    if args.scale != 1:  # a trial's results are no use to a rebuild: they stay apart
        args.work /= f"scale-{args.scale:g}"
        if args.output == WEIGHTS:
            parser.error("--scale makes no weights for the package: name another --output")
    stages = list(STAGES) if args.stage == "all" else [args.stage]
    if "export" in stages and _holds_something_else(args.output):
        parser.error(f"{args.output} is not a folder of the miniature's weights: choose another --output")
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in stages:
        started = time.time()
        STAGES[name](args)
        print(f"{name}: done in {time.time() - started:.0f} s", flush=True)


def _holds_something_else(output: Path) -> bool:
    """Whether an export, which replaces the folder, would destroy anything but earlier weights."""
    if not output.is_dir():
        return output.exists()
    return any(output.iterdir()) and not (output / PIPELINE).is_file()


def scaled(args: argparse.Namespace, full: int, least: int) -> int:
    """``full`` times ``--scale``, but no fewer than the stages need to run at all."""
    return max(round(full * args.scale), least)


def log(text: str) -> None:
    print(text, flush=True)


def train_set(args: argparse.Namespace) -> rendering.Renders:
    return rendering.load_renders(args.work, scaled(args, TRAIN_COUNT, 400), TRAIN_SEED, args.workers)


def stage_renders(args: argparse.Namespace) -> None:
    train_set(args)


def stage_vae(args: argparse.Namespace) -> None:
    from srpo_cli.miniature.build.vae import train_vae

    folder = args.work / "vae"
    if not folder.exists():
        steps = scaled(args, VAE_STEPS, 24)
        train_vae(train_set(args), steps, args.device, log=log).save_pretrained(folder)


def contrastive(args: argparse.Namespace, seed: int) -> tuple[open_clip.CLIP, reward.Batches, SimpleTokenizer]:
    """A CLIP of the world that no preference has touched, what it was trained on, and its tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer

    from srpo_cli.miniature.build import reward, text

    text.write_bpe(args.work / "bpe.txt.gz")
    tokenizer = SimpleTokenizer(bpe_path=str(args.work / "bpe.txt.gz"), context_length=text.CLIP_LENGTH)
    batches = reward.make_batches(train_set(args), tokenizer, args.device)
    model = reward.train_contrastive(batches, tokenizer, scaled(args, CONTRASTIVE_STEPS, 24), seed, log)
    log(f"reward: after the contrastive stage {reward.measure(model, batches, tokenizer)}")
    return model, batches, tokenizer


def stage_reward(args: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    from srpo_cli.miniature.build import reward

    path = args.work / "reward.safetensors"
    if not path.exists():
        model, batches, tokenizer = contrastive(args, seed=0)
        steps = scaled(args, PREFERENCE_STEPS, 8)
        for round_ in range(PREFERENCE_ROUNDS):
            reward.train_preference(model.train(), batches, tokenizer, steps, seed=1 + round_, log=log)
            log(f"reward: after preference round {round_ + 1} {reward.measure(model, batches, tokenizer)}")
        save_file(model.state_dict(), path)


def stage_clip(args: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    path = args.work / "clip.safetensors"
    if not path.exists():
        model, *_ = contrastive(args, CLIP_SEED)
        save_file(model.state_dict(), path)


def stage_transformer(args: argparse.Namespace) -> None:
    from diffusers import AutoencoderKL

    from srpo_cli.miniature.build import text, transformer, vae

    folder = args.work / "transformer"
    if folder.exists():
        return
    renders = train_set(args)
    autoencoder = AutoencoderKL.from_pretrained(args.work / "vae").to(args.device)
    config = autoencoder.config
    latents = (vae.encode(autoencoder, renders, args.device) - config.shift_factor) * config.scaling_factor
    packed = latents.view(-1, 16, 6, 2, 6, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 36, 64)
    distinct = sorted(set(renders.texts))
    number = {caption: i for i, caption in enumerate(distinct)}
    sequence, pooled = text.embed(distinct, *text.text_encoders())
    data = transformer.TrainingSet(packed, torch.tensor([number[t] for t in renders.texts]), sequence, pooled)
    schedule = transformer.Schedule(scaled(args, TRANSFORMER.steps, 24), scaled(args, TRANSFORMER.decay, 8))
    transformer.train_transformer(data, args.work, schedule, args.device, args.workers).save_pretrained(folder)


def stage_oracle(args: argparse.Namespace) -> None:
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    from srpo_cli.miniature.build import oracle

    path = args.work / "oracle.safetensors"
    if path.exists():
        return
    renders = train_set(args)
    autoencoder = AutoencoderKL.from_pretrained(args.work / "vae").to(args.device)

    @torch.no_grad()
    def round_trip(images: torch.Tensor) -> torch.Tensor:
        latents = autoencoder.encode(images.to(args.device) * 2 - 1).latent_dist.mean
        return (autoencoder.decode(latents).sample / 2 + 0.5).clamp(0, 1).cpu()

    parts = [(round_trip(part.float() / 255) * 255).round().byte() for part in renders.images.split(64)]
    steps = scaled(args, CLASSIFIER_STEPS, 24)
    classifier = oracle.train_classifier(renders, torch.cat(parts), steps, args.device, log=log)
    measured = oracle.measure_photographs(round_trip, scaled(args, PHOTOGRAPHS, 600))
    state = {name: value.cpu().contiguous() for name, value in classifier.state_dict().items()}
    save_file({**state, **{name: value.contiguous() for name, value in measured.items()}}, path)


def stage_export(args: argparse.Namespace) -> None:
    export(args.work, args.output)


def export(work: Path, output: Path) -> None:
    """Write a folder of weights in place of ``output``: half precision, but for the oracle's measured reference."""
    unfinished = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "reward").mkdir(parents=True)
    _export_pipeline(work, unfinished / "pipeline")
    _export_reward(work, unfinished / "reward")
    _export_oracle(work, unfinished / "oracle.safetensors")
    files = [path for path in unfinished.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    for path in files:
        path.chmod(0o644)  # safetensors writes for its owner alone, and an installed package is for everyone
    shutil.rmtree(output, ignore_errors=True)
    unfinished.replace(output)
    log(f"export: {size / 1e6:.1f} MB in {output}")


def _export_pipeline(work: Path, folder: Path) -> None:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from srpo_cli.miniature.build import text

    clip, t5 = text.text_encoders()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=clip,
        tokenizer=text.clip_tokenizer(),
        text_encoder_2=t5,
        tokenizer_2=text.t5_tokenizer(),
        transformer=FluxTransformer2DModel.from_pretrained(work / "transformer"),
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    for path in folder.rglob("*.json"):  # diffusers notes the folder that a model was read from, which nobody else has
        config = json.loads(path.read_text())
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


def _export_reward(work: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    from srpo_cli.miniature.build import reward, text

    for file in ("reward.safetensors", "clip.safetensors"):
        save_file({name: value.half() for name, value in load_file(work / file).items()}, folder / file)
    shutil.copy(work / "bpe.txt.gz", folder)
    text_config = {"context_length": text.CLIP_LENGTH, "vocab_size": len(text.clip_tokenizer())}
    config = {
        "embed_dim": reward.EMBED_DIM,
        "vision_cfg": reward.VISION,
        "text_cfg": {**text_config, **reward.TEXT},
        "mean": reward.MEAN,
        "std": reward.STD,
        "bpe": "bpe.txt.gz",
    }
    (folder / "reward.json").write_text(json.dumps(config, indent=2) + "\n")


def _export_oracle(work: Path, path: Path) -> None:
    from safetensors.torch import load_file, save_file

    measured = {"cells", "precision", "spread", "radius"}
    state = load_file(work / "oracle.safetensors")
    save_file({name: value if name in measured else value.half() for name, value in state.items()}, path)


STAGES = {
    "renders": stage_renders,
    "vae": stage_vae,
    "reward": stage_reward,
    "clip": stage_clip,
    "oracle": stage_oracle,
    "transformer": stage_transformer,
    "export": stage_export,
}

if __name__ == "__main__":
    main()
