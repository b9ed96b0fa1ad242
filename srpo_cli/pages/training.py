"""One HTML page of a training run: did it hack its reward, how does one know, and which checkpoint is to be used."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from srpo_cli.pages.charts import Event, Line, curve
from srpo_cli.pages.frame import asset, policy, templates
from srpo_cli.pages.writing import number
from srpo_cli.runtime.folder import CONFIG, SUMMARY, disk_errors, write_atomically

REPORT = "report.html"

_WIDEST = 1200  # pixels of a sheet in the page
_QUALITY = 85
_STEP = re.compile(r"step-(\d+)\.png")

MEANINGS = {
    "saturation": "How colourful the pictures are.",
    "contrast": "Spread of light and dark.",
    "highlights": "Glossy spots: colourless and far brighter than what is around them.",
    "high_frequency": "Fine detail and grain on even surfaces.",
    "grid": "A pattern with the period of the model's tokens; more of it is bad.",
    "clipping": "Logarithm of the share of values that are black or white; more of it is bad.",
    "statistics": "All statistics of the look in one figure: 0 is the base model, 1 what it draws when asked for the "
    "positive word.",
    "reward": "Reward for the plain prompt. Bad where it goes the other way than asked pictures do.",
    "caption_margin": "How much better a picture fits its own prompt than another one; less is loss of content.",
    "sgp_gap": "Reward with the positive word minus that with the negative word.",
    "base_distance": "How far pictures of held-out prompts have moved from the base model's from the same noise.",
    "diversity": "How far apart two pictures of one held-out prompt are; less is bad.",
}
"""What each signal is; one of a held-out reward has that reward's name and a slash before it."""


def write_training_report(folder: Path, guard: Mapping[str, Any]) -> Path:
    """Write ``report.html`` into a run's folder and return its path; it holds all that it shows.

    Args:
        folder: of the run, with its configuration, samples and, of a run that has ended, summary.
        guard: what ``guard.json`` holds.
    """
    environment = templates()
    style, script = (asset(environment, name) for name in ("style.css", "page.js"))
    with disk_errors(folder):
        config = yaml.safe_load((folder / CONFIG).read_text())
        summary = json.loads((folder / SUMMARY).read_text()) if (folder / SUMMARY).is_file() else None
        sheets = _sheets(folder / "samples", guard)
    best, stopped = guard["best"], guard["stopped"]
    page = environment.get_template("training.html.j2").render(
        name=folder.resolve().name,
        method=config["algorithm"]["name"],
        reward=config["reward"]["name"],
        model=config["model"]["name"],
        guard=guard,
        steps=summary["steps"] if summary else _last_step(guard),
        summary=summary,
        heading=_heading(best, stopped, guard),
        command=f"srpo sample PROMPT --model {shlex.quote(str(folder))}",
        axes=_axes(guard),
        signals=_signals(guard),
        checkpoints=_checkpoints(guard),
        figures=_figures(summary),
        sheets=sheets,
        style=style,
        page_script=script,
        policy=policy(style, script),
    )
    write_atomically(folder / REPORT, page.encode(errors="replace"))
    return folder / REPORT


def _heading(best: Mapping[str, Any] | None, stopped: Mapping[str, Any] | None, guard: Mapping[str, Any]) -> str:
    if best is None and guard["checkpoints"]:
        return "No checkpoint is better than the base model"
    if best is None:
        return "The checkpoints could not be ranked"
    if stopped:
        return f"Stopped at step {stopped['step']}; step {best['step']} is the best"
    return f"Step {best['step']} is the best"


def _last_step(guard: Mapping[str, Any]) -> int:
    return max([0, *(step + 1 for step in guard["series"]["step"])])


def _events(guard: Mapping[str, Any], signal: str | None = None) -> list[Event]:
    """The best checkpoint, the first crossing of a signal, and where the run was stopped."""
    best = guard["best"]
    events = [Event(best["step"], "best", f"best checkpoint: step {best['step']}")] if best else []
    crossings = [warning for warning in guard["warnings"] if warning["signal"] == signal]
    events += [Event(one["step"], "worse", f"left its corridor at step {one['step']}") for one in crossings]
    if signal is None and guard["collapsed"]:
        events.append(Event(guard["collapsed"]["step"], "worse", f"collapsed at step {guard['collapsed']['step']}"))
    return events


def _axes(guard: Mapping[str, Any]) -> str | None:
    """Progress of the rollouts along each axis that ranks; None without an axis."""
    lines = []
    for signal in guard["signals"]:
        if signal["axis"]:
            way = signal["asked"] - signal["base"]
            progress = [(_number(value) - signal["base"]) / way for value in guard["series"][signal["name"]]]
            lines.append(Line(signal["name"], guard["series"]["step"], progress))
    if not lines:
        return None
    steps = guard["series"]["step"] or [0]
    reach = Line("the end of the way", [steps[0], steps[-1]], [guard["reach"]] * 2)
    return curve([*lines, reach], "Progress of the rollouts", "step", "way to the asked pictures", marks=_events(guard))


def _signals(guard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A card for each signal, those that have crossed first."""
    crossed = {warning["signal"]: warning["step"] for warning in guard["warnings"]}
    cards = []
    for signal in guard["signals"]:
        name = signal["name"]
        if signal["source"] == "panel":
            seen = [(row["step"], row[name]) for row in guard["panel"] if name in row]
            steps, values = [0, *(step for step, _ in seen)], [signal["base"], *(value for _, value in seen)]
        else:
            steps, values = guard["series"]["step"], guard["series"][name]
        line = Line(name, steps, [_number(value) for value in values])
        ends = signal["low"], signal["high"]
        chart = curve([line], f"{name} over the steps", "step", name, corridor=ends, marks=_events(guard, name))
        own = name.rpartition("/")[2]
        held_out = name.rpartition("/")[0]
        meaning = MEANINGS.get(own, "")
        if held_out:
            meaning = f"Of {held_out}, which nothing is trained on. {meaning}"
        cards.append({**signal, "chart": chart, "meaning": meaning, "crossed": crossed.get(name)})
    return sorted(cards, key=lambda card: (card["crossed"] is None, card["crossed"] or 0))


def _checkpoints(guard: Mapping[str, Any]) -> list[dict[str, Any]]:
    best = guard["best"] and guard["best"]["step"]
    return [
        {
            "step": place["step"],
            "distance": number(place["distance"], 2),
            "axes": [(name, number(value, 2)) for name, value in place["axes"].items()],
            "best": place["step"] == best,
        }
        for place in guard["checkpoints"]
    ]


def _figures(summary: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """Base and tuned figures of the evaluation, each with its interval."""

    def told(interval: Mapping[str, float]) -> str:
        low, high = number(interval["low"], 3), number(interval["high"], 3)
        return f"{number(interval['mean'], 3)} [{low}, {high}]"

    if not summary:
        return []
    tuned = summary["tuned"]
    return [(name.replace("_", " "), told(value), told(tuned[name])) for name, value in summary["base"].items()]


def _sheets(folder: Path, guard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The run's sheets of pictures: before, best and last first, then the rest in order."""
    found = {int(match[1]): path for path in sorted(folder.glob("*.png")) if (match := _STEP.fullmatch(path.name))}
    if not found:
        return []
    best = guard["best"] and guard["best"]["step"]
    first = dict.fromkeys(step for step in (0, best, max(found)) if step in found)
    order = [*first, *(step for step in sorted(found) if step not in first)]
    return [
        {
            "step": step,
            "source": _embedded(found[step]),
            "main": step in first,
            "name": _sheet_name(step, best, max(found)),
        }
        for step in order
    ]


def _sheet_name(step: int, best: int | None, last: int) -> str:
    said = {0: "the base model", best: "the best checkpoint", last: "the last step"}
    return f"Step {step}" + (f", {said[step]}" if step in said else "")


def _embedded(path: Path) -> str:
    """A picture as a data URI, no larger than a page shows it."""
    with Image.open(path) as picture:
        shown = picture.convert("RGB")
    shown.thumbnail((_WIDEST, 4 * _WIDEST))
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", quality=_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _number(value: float | None) -> float:
    return math.nan if value is None else value
