"""``srpo recover``: how well one model step recovers a picture, from each noise level."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from srpo_cli.cli.models import BaseOption, ModelOption, default_model, find_sources
from srpo_cli.cli.options import OptionalPresetOption, OutputOption, TrustOption, WeightsOption, parse_weights
from srpo_cli.cli.output import OutputFormat, RowFormat, RowWriter, note, print_rows
from srpo_cli.cli.plugins import admit_plugin, check_plugin
from srpo_cli.cli.sample import GuidanceOption, SizeOption, parse_size
from srpo_cli.errors import UsageError
from srpo_cli.registry import REWARDS

if TYPE_CHECKING:  # it imports torch
    from srpo_cli.recipes.recover import Study
    from srpo_cli.runtime.sources import Source

EXAMPLES = """Examples:

srpo recover images/

srpo recover images/ --preset realism --delta-sigma 0.15 --output window

srpo recover --prompt "a red sphere on a wooden table" --num-images 8

srpo recover images/ --sigmas 0.9,0.95 --gain 0.025 --format csv > rows.csv

srpo recover images/ --noise-only"""

_HEADINGS = {
    "sigma": "sigma",
    "label": "method",
    "psnr": "psnr",
    "ssim": "ssim",
    "psnr_picture": "psnr*",
    "ssim_picture": "ssim*",
    "latent_error": "latent",
    "reward": "reward",
    "reward_deviation": "change",
    "rank_correlation": "rank",
}
_MEANINGS = {
    "psnr": "psnr (dB) and ssim: against the autoencoder's own round trip, with * against the picture",
    "latent_error": "latent: RMS error of the latents",
    "reward_deviation": "change: from the clean picture's reward",
    "rank_correlation": "rank: correlation with the ranking by the round trips' rewards (theirs: with the pictures')",
}
_LAST_SEED = 2**53 - 1
_DIGITS = {"sigma": "g", "psnr": ".2f", "psnr_picture": ".2f"}

PicturesArgument = Annotated[list[str] | None, typer.Argument(metavar="PICTURE", help="Pictures, folders or runs.")]
PromptOption = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        metavar="TEXT",
        help="Prompt of every picture instead of its own (a .txt beside it, PNG metadata); without pictures, drawn.",
    ),
]
SigmasOption = Annotated[
    str | None, typer.Option("--sigmas", metavar="S,S,...", help="Noise levels in (0, 1]; 1 is pure noise.")
]
DeltaOption = Annotated[
    list[float] | None,
    typer.Option("--delta-sigma", metavar="D", help="Step size of Direct-Align, repeatable; 0.025 and 0.075."),
]
GainOption = Annotated[
    list[float] | None,
    typer.Option(
        "--gain",
        metavar="G",
        help="Direct-Align with this factor on the velocity's error at every sigma, repeatable: the paper's eq. 5.",
    ),
]
RewardOption = Annotated[
    str | None,
    typer.Option("--reward", metavar="NAME", help="Reward of the recovered pictures; the miniature brings its own."),
]
NoiseOnlyOption = Annotated[
    bool,
    typer.Option("--noise-only", help="No transformer: noised pictures, round trip, and what a true velocity gives."),
]
CountOption = Annotated[
    int | None, typer.Option("--num-images", "-n", metavar="N", min=1, help="Pictures to draw of --prompt.")
]
StepsOption = Annotated[int | None, typer.Option("--steps", metavar="N", min=1, help="Sampling steps of these.")]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the noise and of drawn pictures.")]
RowFormatOption = Annotated[
    RowFormat,
    typer.Option("--format", help="Means over the pictures for people; every picture, sigma and method for scripts."),
]


def recover(
    pictures: PicturesArgument = None,
    prompt: PromptOption = None,
    model: ModelOption = None,
    base: BaseOption = None,
    preset: OptionalPresetOption = None,
    sigmas: SigmasOption = None,
    delta_sigma: DeltaOption = None,
    gain: GainOption = None,
    reward: RewardOption = None,
    weights: WeightsOption = None,
    noise_only: NoiseOnlyOption = False,
    num_images: CountOption = None,
    seed: SeedOption = 0,
    size: SizeOption = None,
    guidance: GuidanceOption = 3.5,
    steps: StepsOption = None,
    trust: TrustOption = False,
    row_format: RowFormatOption = RowFormat.TABLE,
    output: OutputOption = None,
) -> None:
    """Noise pictures, take one model step, and show what the one-step prediction and Direct-Align recover.

    Writes strips of pictures, curve.png, rows.jsonl and summary.json to --output, "recover" if not given.

    With eight pictures or more it recommends the sigmas in which the reward still ranks them as their clean versions.
    """
    if seed > _LAST_SEED:
        raise UsageError(f"--seed {seed} is too large: choose one below 2**53")
    _check_rollout(prompt, noise_only, {"--num-images": num_images, "--steps": steps}, bool(pictures))

    from srpo_cli.runtime.inputs import list_pictures

    listed = list_pictures(pictures or [])
    asked = {
        "sigmas": sorted(set(_fractions("--sigmas", sigmas.split(",")))) if sigmas else None,
        "delta_sigmas": _fractions("--delta-sigma", delta_sigma or []),
        "gains": _fractions("--gain", gain or []),
        "size": parse_size(size) if size else None,
        "num_images": num_images,
    }
    named_weights = parse_weights(weights or [], [reward] if reward else [])
    if reward:
        REWARDS.find(reward)
        check_plugin(reward, trust)
    source = _source(model, base, noise_only)
    algorithm = None
    if preset:
        from srpo_cli.config.load import MINIATURE, load_train_config

        algorithm = load_train_config(preset, miniature=source.base == MINIATURE).config.algorithm
    if reward:
        admit_plugin(reward, trust, note)

    from srpo_cli.recipes import recover as recipe

    request = recipe.Request(
        pictures=listed,
        prompt=prompt,
        noise_only=noise_only,
        seed=seed,
        guidance=guidance,
        steps=steps,
        reward=reward,
        weights=named_weights,
        **{name: value for name, value in asked.items() if value},
    )
    window = recipe.PresetWindow.of(preset, algorithm) if preset else None
    study = recipe.Study(source, request, output or Path("recover"), note, window)
    writer = None
    try:
        for row in study.rows():
            if row_format is not RowFormat.TABLE:
                writer = writer or RowWriter(dict.fromkeys(row), row_format)
                writer.write(row)
    except KeyboardInterrupt:
        if study.strips:
            note("stopped: what follows is of the pictures until now")
            _sum_up(study, row_format)
        raise
    _sum_up(study, row_format)


def _sum_up(study: Study, row_format: RowFormat) -> None:
    """The means as a table, where that is what is asked for, the windows, and what was written."""
    summary = study.finish()
    pictures, tell = summary["pictures"], note
    if row_format is RowFormat.TABLE:
        tell = typer.echo
        shown = [key for key in _HEADINGS if any(mean.get(key) is not None for mean in summary["means"])]
        print_rows([_cells(mean, shown) for mean in summary["means"]], OutputFormat.TABLE)
        tell("; ".join([f"pictures: {pictures}", *(text for key, text in _MEANINGS.items() if key in shown)]))
    if summary["windows"]:
        tell(
            f"where the reward ranks the {pictures} recovered pictures as their round trips (rank >= "
            f"{summary['rank_kept']}):"
        )
        for found in summary["windows"]:
            tell(f"  {found['label']}: {_interval(found['sigma_low'], found['sigma_high'])}")
    elif summary["velocity"] == "true":
        note("no recommended window: it needs the model's own velocity")
    elif summary["reward"] and pictures < summary["pictures_needed"]:
        note(
            f"no recommended window: it takes {summary['pictures_needed']} pictures to rank, here {_counted(pictures)}"
        )
    elif summary["reward"]:
        note(f"no recommended window: {summary['reward']} gives all {pictures} clean pictures the same reward")
    if study.window:
        tell(f"preset {study.window}")
    for path in [*study.strips, study.curve]:
        note(f"picture: {path}")


def _cells(mean: dict[str, Any], shown: list[str]) -> dict[str, str]:
    """A row of means as a table shows it."""
    cells = {}
    for key in shown:
        value = mean[key]
        text = "" if value is None else value if isinstance(value, str) else format(value, _DIGITS.get(key, ".3f"))
        cells[_HEADINGS[key]] = text
    return cells


def _interval(low: float | None, high: float | None) -> str:
    if low is None:
        return "nowhere"
    return f"sigma {low:g} only" if low == high else f"sigma {low:g} to {high:g}"


def _counted(pictures: int) -> str:
    return "is one" if pictures == 1 else f"are {pictures}"


def _check_rollout(prompt: str | None, noise_only: bool, rollout: dict[str, int | None], pictures: bool) -> None:
    """Refuse to draw nothing, or with nothing, and flags that are for drawn pictures where they are given."""
    if pictures:
        for flag, value in rollout.items():
            if value is not None:
                raise UsageError(f"{flag} {value} is for drawn pictures: leave it out, or the pictures")
        return
    if not (prompt or "").strip():
        raise UsageError(
            "srpo recover needs pictures, or a prompt to draw one: name files or folders, or give --prompt"
        )
    if noise_only:
        raise UsageError("--noise-only loads nothing that could draw --prompt: name pictures")


def _fractions(flag: str, given: list[Any]) -> list[float]:
    """Numbers in (0, 1), or for --sigmas in (0, 1], each once."""
    numbers = []
    for item in given:
        try:
            number = float(item)
        except ValueError as error:
            raise UsageError(f"{flag} {item}: not a number; give it as in {flag} 0.9,0.95") from error
        if not (0 < number < 1 or (number == 1 and flag == "--sigmas")):
            raise UsageError(
                f"{flag} {item}: must lie between 0 and 1, {'1 included' if flag == '--sigmas' else 'neither included'}"
            )
        numbers.append(number)
    return list(dict.fromkeys(numbers))


def _source(model: str | None, base: str | None, noise_only: bool) -> Source:
    """The model; for --noise-only also a folder that has no more than an autoencoder."""
    from srpo_cli.runtime.sources import Source

    name = model or base or default_model("recovering with")
    if noise_only and (Path(name) / "vae").is_dir():
        return Source(name)
    return find_sources({"": name}, base)[""]
