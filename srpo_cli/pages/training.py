"""One HTML page of a training run: did it hack its reward, how does one know, and which checkpoint is to be used."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from srpo_cli.pages.charts import Event, Line, curve
from srpo_cli.pages.frame import asset, policy, templates
from srpo_cli.pages.glossary import MEASURES
from srpo_cli.pages.writing import NONE, interval, is_number, listed, number
from srpo_cli.runtime.folder import CONFIG, SUMMARY, RunFolder, disk_errors, write_atomically

REPORT = "report.html"

_EMBEDDED = 1_500_000  # characters that the main sheets may take in the page, and all others together
_WIDTHS = (1200, 900, 600, 400, 250, 150)  # pixels of a sheet: the widest at which they do
_SHEETS = 24  # of a long run, evenly spaced
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

_RECORDED = {
    "photo_distance": "The miniature's oracle: distance of recent rollouts from photographs. Not seen by the guard.",
    "held_margin": "How much better rollouts fit their own prompts than three others, by the trained reward.",
    "captions_weight": "Weight of that margin beside the reward: above 0 pictures are brought back to their prompts.",
    "loss": "What the run minimised.",
    "grad_norm": "Length of the gradient before it is clipped.",
}
"""What is shown of a run's records besides the signals."""


def write_training_report(folder: Path, guard: Mapping[str, Any], reward: str) -> Path:
    """Write ``report.html`` into a run's folder and return its path; it holds all that it shows.

    Args:
        folder: of the run, with its configuration, records, samples and, of a run that has ended, summary.
        guard: what ``guard.json`` holds.
        reward: what was trained, in words.

    SrpoError where the folder cannot be read or written.
    """
    environment = templates()
    style, script = (asset(environment, name) for name in ("style.css", "page.js"))
    with disk_errors(folder):
        config = yaml.safe_load((folder / CONFIG).read_text())
        summary = json.loads((folder / SUMMARY).read_text()) if (folder / SUMMARY).is_file() else None
        sheets = _sheets(folder / "samples", guard)
        records = RunFolder(folder).records()
    page = environment.get_template("training.html.j2").render(
        name=folder.resolve().name,
        method=config["algorithm"]["name"],
        reward=reward,
        model=config["model"]["name"],
        guard=guard,
        steps=summary["steps"] if summary else _last_step(guard),
        summary=summary,
        heading=_heading(guard, summary),
        verdict=_verdict(guard, summary),
        command=f"srpo sample PROMPT --model {shlex.quote(str(folder))}",
        axes=_axes(guard),
        signals=_signals(guard),
        recorded=_recorded(records, guard),
        checkpoints=_checkpoints(guard),
        figures=_figures(summary),
        sheets=sheets,
        style=style,
        page_script=script,
        policy=policy(style, script),
    )
    write_atomically(folder / REPORT, page.encode(errors="replace"))
    return folder / REPORT


def _heading(guard: Mapping[str, Any], summary: Mapping[str, Any] | None) -> str:
    """What to take away; of a run that is not over, so far."""
    best, stopped, collapsed = guard["best"], guard["stopped"], guard["collapsed"]
    if best is None and guard["checkpoints"]:
        text = "No checkpoint is better than the base model"
    elif best is None:
        text = "The checkpoints could not be ranked"
    elif collapsed:
        end = "Stopped" if stopped and collapsed["step"] < guard["plan"]["steps"] else "Collapsed"
        text = f"{end} at step {collapsed['step']}; step {best['step']} is the best"
    else:
        text = f"Step {best['step']} is the {'best' if len(guard['checkpoints']) > 1 else 'only checkpoint'}"
    return text if summary else f"{text} so far"


def _verdict(guard: Mapping[str, Any], summary: Mapping[str, Any] | None) -> dict[str, str]:
    """Plain sentences: what happened, how the run ended, which checkpoint to use, and who judged."""
    return {
        "happened": _happened(guard),
        "ended": _ended(summary),
        "choice": _choice(guard),
        "judges": _judges(guard),
    }


def _happened(guard: Mapping[str, Any]) -> str:
    collapsed, out = guard["collapsed"], ", ".join(warning["signal"] for warning in guard["warnings"])
    if collapsed:
        signals = ", ".join(collapsed["signals"])
        then = "training was stopped" if guard["stopped"] else f"training went on: guard.action is {guard['action']}"
        return (
            f"The run collapsed at step {collapsed['step']}: {signals} left the corridor between the base model and "
            f"what it was asked for, and {then}."
        )
    if out:
        return f"No collapse, which takes two kinds of signals at one check, but {out} left the corridor."
    checks = [check for check in guard["checks"] if check["z"]]
    if not checks:
        return "Nothing that was watched left its corridor, but no check was made: whether the run hacked is not known."
    when = "the one check" if len(checks) == 1 else f"any of {len(checks)} checks"
    return f"Nothing that was watched left its corridor, at {when}."


def _ended(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return "The run has no summary: it was not over when this page was written."
    reached = summary.get("stopped_by") == "target"
    return "It ended because the semantic gap had reached its target." if reached else ""


def _choice(guard: Mapping[str, Any]) -> str:
    best, collapsed = guard["best"], guard["collapsed"]
    if best is None and guard["checkpoints"]:
        return "No checkpoint is clearly nearer to where it should be than the untrained model is: use the base model."
    if best is None and any(signal["axis"] for signal in guard["signals"]):
        return "There was no checkpoint to rank, or no picture near one."
    if best is None:
        return (
            "Checkpoints were not ranked: asked for the positive word, the base model draws much the same, so that "
            "nothing says which way is better."
        )
    distances = [place["distance"] for place in guard["checkpoints"] if is_number(place["distance"])]
    if best["distance"] > min(distances, default=math.inf):
        text = f"Step {best['step']} is the last, and no other checkpoint is clearly nearer to where it should be."
    else:
        text = f"Of the checkpoints that were kept, that of step {best['step']} is nearest to where it should be."
    if collapsed and best["step"] >= collapsed["step"]:
        text += " None from before the collapse is as near: look at its pictures before using it."
    return text


def _judges(guard: Mapping[str, Any]) -> str:
    rewards = {signal["name"].rpartition("/")[0] for signal in guard["signals"]} - {""}
    if rewards:
        return f"The guard judged by picture statistics and rewards; nothing was trained on {listed(sorted(rewards))}."
    return (
        "The guard judged by picture statistics and the reward itself: no second reward was watched (guard.rewards "
        "names some), so that what this reward cannot see was seen by statistics alone."
    )


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
    """Progress of the rollouts along each axis that ranks, with the checkpoints on it; None without an axis."""
    lines, steps = [], guard["series"]["step"]
    for signal in guard["signals"]:
        if signal["axis"]:
            name, way = signal["name"], signal["asked"] - signal["base"]
            progress = [(_number(value) - signal["base"]) / way for value in guard["series"][name]]
            points = [(place["step"], _number(place["axes"].get(name))) for place in guard["checkpoints"]]
            lines.append(Line(name, steps, progress, points=points))
    if not lines:
        return None
    ends = [min(steps, default=0), max(steps, default=0)]
    reach = Line("the end of the way", ends, [guard["reach"]] * 2)
    return curve([*lines, reach], "Progress of the rollouts", "step", "way to the asked pictures", marks=_events(guard))


def _signals(guard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A card for each signal, crossed ones first; points of its chart are the checks' means, or the panel's."""
    crossed = {warning["signal"]: warning["step"] for warning in guard["warnings"]}
    cards = []
    for signal in guard["signals"]:
        name = signal["name"]
        if signal["source"] == "panel":
            seen = [(row["step"], row[name]) for row in guard["panel"] if name in row]
            steps, values = [0, *(step for step, _ in seen)], [signal["base"], *(value for _, value in seen)]
            points = [(step, _number(value)) for step, value in seen]
        else:
            steps, values = guard["series"]["step"], guard["series"][name]
            points = [(check["step"], _number(check["values"].get(name))) for check in guard["checks"]]
        line = Line(name, steps, [_number(value) for value in values], points=points)
        ends = _number(signal["low"]), _number(signal["high"])
        chart = curve([line], _aloud(signal, points, crossed), "step", "", corridor=ends, marks=_events(guard, name))
        held_out, _, own = name.rpartition("/")
        meaning = MEANINGS.get(own, "")
        if held_out:
            meaning = f"Of {held_out}, which nothing is trained on. {meaning}"
        cards.append({**signal, "chart": chart, "meaning": meaning, "crossed": crossed.get(name)})
    return sorted(cards, key=lambda card: (card["crossed"] is None, card["crossed"] or 0))


def _aloud(signal: Mapping[str, Any], points: Sequence[tuple[int, float]], crossed: Mapping[str, int]) -> str:
    """A signal's chart in words, for those who do not see it."""
    name = signal["name"]
    ends = f"its corridor is {number(signal['low'])} to {number(signal['high'])}"
    last = f", and it ends at {number(points[-1][1])}" if points else ""
    out = f", out of it at step {crossed[name]}" if name in crossed else ""
    return f"{name} over the steps: it begins at {number(signal['base'])}{last}; {ends}{out}"


def _recorded(records: Sequence[Mapping[str, Any]], guard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A card for each figure of the run's records that has values."""
    cards = []
    for name, meaning in _RECORDED.items():
        steps, values = [record["step"] for record in records], [_number(record.get(name)) for record in records]
        if any(map(is_number, values)):
            chart = curve([Line(name, steps, values)], f"{name} over the steps", "step", "", marks=_events(guard))
            cards.append({"name": name, "meaning": meaning, "chart": chart})
    return cards


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


def _figures(summary: Mapping[str, Any] | None) -> list[tuple[str, str, str, str]]:
    """Name, meaning, and base and tuned figures of the evaluation, each with its interval."""
    if not summary:
        return []
    tuned = summary["tuned"]
    return [
        (name.replace("_", " "), MEASURES.get(name) or MEANINGS.get(name, ""), _told(base), _told(tuned.get(name, {})))
        for name, base in summary["base"].items()
    ]


def _told(figure: Mapping[str, float]) -> str:
    return f"{number(figure.get('mean'))} {interval(figure)}" if is_number(figure.get("mean")) else NONE


def _sheets(folder: Path, guard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The run's sheets of pictures: before, best and last first, then the rest in order."""
    found = {int(match[1]): path for path in sorted(folder.glob("*.png")) if (match := _STEP.fullmatch(path.name))}
    if not found:
        return []
    best = guard["best"] and guard["best"]["step"]
    first = list(dict.fromkeys(step for step in (0, best, max(found)) if step in found))
    others = [step for step in sorted(found) if step not in first]
    room = _SHEETS - len(first)
    if len(others) > room:
        others = [others[i * len(others) // room] for i in range(room)]
    order = [*first, *others]
    sources = [source for steps in (first, others) for source in _embedded([found[step] for step in steps])]
    return [
        {"step": step, "source": source, "main": step in first, "name": _sheet_name(step, best, max(found))}
        for step, source in zip(order, sources, strict=True)
    ]


def _sheet_name(step: int, best: int | None, last: int) -> str:
    said = {0: "the base model", best: "the best checkpoint", last: "the last step"}
    return f"Step {step}" + (f", {said[step]}" if step in said else "")


def _embedded(paths: Sequence[Path]) -> list[str]:
    """Pictures as data URIs: as wide as the page shows them or, where they are many, as leaves it small."""
    pictures = [_opened(path) for path in paths]
    for width in _WIDTHS:
        sources = [_data_uri(picture, width) for picture in pictures]
        if sum(map(len, sources)) <= _EMBEDDED:
            break
    return sources


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return _within(picture.convert("RGB"), _WIDTHS[0])


def _within(picture: Image.Image, width: int) -> Image.Image:
    smaller = picture.copy()
    smaller.thumbnail((width, 4 * width))
    return smaller


def _data_uri(picture: Image.Image, width: int) -> str:
    buffer = io.BytesIO()
    _within(picture, width).save(buffer, "WEBP", quality=_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _number(value: float | None) -> float:
    return math.nan if value is None else value
