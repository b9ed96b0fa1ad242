"""Rebuild every weight of the miniature from fixed seeds.

    python -m srpo_cli.miniature.build --work build-miniature            # all stages, then export
    python -m srpo_cli.miniature.build --work build-miniature --stage vae

Each stage leaves its result in ``--work`` and is skipped when that is there. On two CPU cores the whole takes about
two and a half hours; on a GPU, minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from srpo_cli.miniature.build import renders as rendering
from srpo_cli.miniature.build.transformer import Schedule

TRAIN_SEED, TRAIN_COUNT = 1_000, 20_000
VAE_STEPS = 6_000
CONTRASTIVE_STEPS, PREFERENCE_STEPS, PREFERENCE_ROUNDS = 1_000, 160, 3
CLASSIFIER_STEPS = 4_000
TRANSFORMER = Schedule(steps=14_000, decay=5_000)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m srpo_cli.miniature.build", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate results")
    parser.add_argument("--stage", choices=["all", *STAGES], default="all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes on a CPU")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in STAGES if args.stage == "all" else [args.stage]:
        started = time.time()
        STAGES[name](args)
        print(f"{name}: done in {time.time() - started:.0f} s", flush=True)


def log(text: str) -> None:
    print(text, flush=True)


def train_set(args: argparse.Namespace) -> rendering.Renders:
    return rendering.load_renders(args.work, TRAIN_COUNT, TRAIN_SEED, args.workers)


def stage_renders(args: argparse.Namespace) -> None:
    train_set(args)


def stage_vae(args: argparse.Namespace) -> None:
    from srpo_cli.miniature.build.vae import train_vae

    folder = args.work / "vae"
    if not folder.exists():
        train_vae(train_set(args), VAE_STEPS, args.device, log=log).save_pretrained(folder)


def stage_reward(args: argparse.Namespace) -> None:
    from open_clip.tokenizer import SimpleTokenizer
    from safetensors.torch import save_file

    from srpo_cli.miniature.build import reward, text

    path = args.work / "reward.safetensors"
    if not path.exists():
        text.write_bpe(args.work / "bpe.txt.gz")
        tokenizer = SimpleTokenizer(bpe_path=str(args.work / "bpe.txt.gz"), context_length=text.CLIP_LENGTH)
        batches = reward.make_batches(train_set(args), tokenizer, args.device)
        model = reward.train_contrastive(batches, tokenizer, CONTRASTIVE_STEPS, log=log)
        log(f"reward: after the contrastive stage {reward.measure(model, batches, tokenizer)}")
        for round_ in range(PREFERENCE_ROUNDS):
            reward.train_preference(model.train(), batches, tokenizer, PREFERENCE_STEPS, seed=1 + round_, log=log)
            log(f"reward: after preference round {round_ + 1} {reward.measure(model, batches, tokenizer)}")
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
    transformer.train_transformer(data, args.work, TRANSFORMER, args.device, args.workers).save_pretrained(folder)


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
    classifier = oracle.train_classifier(renders, torch.cat(parts), CLASSIFIER_STEPS, args.device, log=log)
    measured = oracle.measure_photographs(round_trip)
    state = {name: value.cpu().contiguous() for name, value in classifier.state_dict().items()}
    save_file({**state, **{name: value.contiguous() for name, value in measured.items()}}, path)


def stage_export(args: argparse.Namespace) -> None:
    """Write the weights folder of the package: half precision, but for the oracle's measured reference."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from safetensors.torch import load_file, save_file

    from srpo_cli.miniature import WEIGHTS
    from srpo_cli.miniature.build import reward, text

    shutil.rmtree(WEIGHTS, ignore_errors=True)
    clip, t5 = text.text_encoders()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=AutoencoderKL.from_pretrained(args.work / "vae"),
        text_encoder=clip,
        tokenizer=text.clip_tokenizer(),
        text_encoder_2=t5,
        tokenizer_2=text.t5_tokenizer(),
        transformer=FluxTransformer2DModel.from_pretrained(args.work / "transformer"),
    )
    pipeline.to(torch.float16).save_pretrained(WEIGHTS / "pipeline")
    folder = WEIGHTS / "reward"
    folder.mkdir()
    state = load_file(args.work / "reward.safetensors")
    save_file({name: value.half() for name, value in state.items()}, folder / "reward.safetensors")
    shutil.copy(args.work / "bpe.txt.gz", folder)
    text_config = {"context_length": text.CLIP_LENGTH, "vocab_size": len(text.clip_tokenizer())}
    config = {
        "embed_dim": 96,
        "vision_cfg": reward.VISION,
        "text_cfg": {**text_config, **reward.TEXT},
        "mean": reward.MEAN,
        "std": reward.STD,
        "bpe": "bpe.txt.gz",
    }
    (folder / "reward.json").write_text(json.dumps(config, indent=2) + "\n")
    state = load_file(args.work / "oracle.safetensors")
    measured = {"cells", "precision", "spread", "radius"}
    state = {name: value if name in measured else value.half() for name, value in state.items()}
    save_file(state, WEIGHTS / "oracle.safetensors")
    size = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
    log(f"export: {size / 1e6:.1f} MB in {WEIGHTS}")


STAGES = {
    "renders": stage_renders,
    "vae": stage_vae,
    "reward": stage_reward,
    "oracle": stage_oracle,
    "transformer": stage_transformer,
    "export": stage_export,
}

if __name__ == "__main__":
    main()
