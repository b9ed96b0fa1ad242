"""GenEval's rules (Ghosh et al., arXiv:2310.11513): does a picture show the objects, counts, colours, places asked for?

They work on any detector's findings. With another detector than the authors' one the figures are GenEval-compatible,
not GenEval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from srpo_cli.errors import UsageError

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

COLOUR_TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
"""What an object's picture is compared with for each colour; the text features of the three are averaged."""

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""How sure a detection has to be, and in the counting task, where surplus ones count against the picture."""

MOST_OBJECTS = 16
"""Detections of one class that are kept, the surest ones."""

_NAMES = {  # a detector's word for a class of COCO: GenEval's
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "mouse": "computer mouse",
    "pottedplant": "potted plant",
    "remote": "tv remote",
    "sofa": "couch",
    "tvmonitor": "tv",
}
_POSITIONS = ("left of", "right of", "above", "below")
_GREY = 0x99  # what hides the surroundings of an object whose colour is asked for
_SLACK = 0.1  # share of both objects' extent by which their centres may differ and still count as level
_DIAGONAL = 0.5  # least part of the direction, a unit vector, that counts as a relation: 30 degrees off the other axis


@dataclass(frozen=True)
class Found:
    """One detected object: left, top, right, bottom in px with the last two exclusive, and its pixels (H, W), bool."""

    box: tuple[float, float, float, float]
    mask: Tensor


Objects = Mapping[str, Sequence[Found]]
"""By GenEval's name of a class its detections, the surest first."""

ColoursOf = Callable[[Sequence[Found], str], Sequence[str]]
"""Tells the colour of each of some objects of a class."""


def class_name(label: str) -> str:
    """GenEval's name of a COCO class, under whatever name a detector has it."""
    return _NAMES.get(label, label)


def sort_objects(labels: Sequence[str], scores: Tensor, masks: Tensor, threshold: float) -> dict[str, list[Found]]:
    """What is kept of a picture's detections, by class.

    Args:
        labels: N classes in a detector's words.
        scores: (N,) in [0, 1].
        masks: (N, H, W) bool, none of them empty.
        threshold: only what is surer is kept.
    """
    if not labels:
        return {}
    objects: dict[str, list[Found]] = {}
    boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
    for number in scores.argsort(descending=True, stable=True).tolist():
        of_class = objects.setdefault(class_name(labels[number]), [])
        if scores[number] > threshold and len(of_class) < MOST_OBJECTS:
            of_class.append(Found(tuple(boxes[number].tolist()), masks[number]))
    return {name: found for name, found in objects.items() if found}


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """How a box lies to another one: "left of" or "right of", "above" or "below", one of each at most."""
    edges, others = torch.tensor(box).double().view(2, 2), torch.tensor(other).double().view(2, 2)
    offset = edges.mean(0) - others.mean(0)
    slack = _SLACK * ((edges[1] - edges[0]) + (others[1] - others[0])).abs()
    beyond = offset.sign() * (offset.abs() - slack).clamp(min=0)
    if (beyond.abs() < 1e-3).all():
        return set()
    across, down = (beyond / offset.norm()).tolist()
    directions = zip(_POSITIONS, (-across, across, -down, down), strict=True)
    return {name for name, share in directions if share > _DIAGONAL}


def mistakes(wanted: Mapping[str, Any], objects: Objects, colours_of: ColoursOf) -> list[str]:
    """What a picture lacks or has too much of, a line each; none: it is correct.

    Of a class that is asked for ``count`` times the ``count`` surest objects are looked at: all must have the colour,
    and all must lie as asked to all of the objects that an earlier requirement found.

    Args:
        wanted: GenEval's ``include`` (class, count, and maybe color, position: [relation, number of an earlier
            requirement]) and ``exclude`` (class, count: as many are too many).
        objects: what was found.
        colours_of: tells colours; asked only where a colour is asked for.
    """
    wrong: list[str] = []
    earlier: list[Sequence[Found] | None] = []
    for asked in wanted["include"]:
        chosen = objects.get(asked["class"], [])[: asked["count"]]
        mistake = _mistake(asked, chosen, earlier, colours_of)
        wrong += [mistake] if mistake else []
        earlier.append(None if mistake else chosen)
    for asked in wanted.get("exclude", []):
        number = len(objects.get(asked["class"], []))
        if number >= asked["count"]:
            wrong.append(f"{number} {asked['class']}, fewer than {asked['count']} wanted")
    return wrong


def _mistake(
    asked: Mapping[str, Any],
    chosen: Sequence[Found],
    earlier: Sequence[Sequence[Found] | None],
    colours_of: ColoursOf,
) -> str | None:
    """Why a requirement is not met; None if it is."""
    name, count = asked["class"], asked["count"]
    if len(chosen) < count:
        return f"{len(chosen)} of {count} {name}"
    if "color" in asked:
        colours = list(colours_of(chosen, name))
        if colours.count(asked["color"]) < count:
            return f"{name} is {', '.join(colours)}, not {asked['color']}"
    if "position" in asked:
        relation, number = asked["position"]
        targets = earlier[number]
        if targets is None:
            return f"nothing that {name} could be {relation}"
        if not all(relation in relations(one.box, target.box) for one in chosen for target in targets):
            return f"{name} is not {relation} its target"
    return None


def cut_out(pixels: Tensor, found: Found) -> Tensor:
    """An object's box out of 8-bit pixels (H, W, 3), grey around its mask, (h, w, 3)."""
    left, top, right, bottom = map(round, found.box)
    grey = torch.full_like(pixels, _GREY)
    return torch.where(found.mask[..., None], pixels, grey)[top:bottom, left:right]


def check_metadata(wanted: Mapping[str, Any], prompt: str) -> None:
    """UsageError unless a prompt comes with what GenEval asks of its picture."""
    remedy = "use GenEval's evaluation_metadata.jsonl, or rows like it"
    include = wanted.get("include")
    if not include:
        raise UsageError(f"geneval: {prompt!r} comes without the objects to look for (include): {remedy}")
    for number, asked in enumerate([*include, *wanted.get("exclude", [])]):
        if not isinstance(asked, Mapping) or not {"class", "count"} <= asked.keys():
            raise UsageError(f"geneval: {prompt!r} asks for {asked!r}, without class and count: {remedy}")
        colour, position = asked.get("color", COLOURS[0]), asked.get("position", (_POSITIONS[0], 0))
        if colour not in COLOURS:
            raise UsageError.unknown(f"colour of {prompt!r}", colour, COLOURS)
        if "position" in asked and (position[0] not in _POSITIONS or not 0 <= position[1] < number):
            raise UsageError(f"geneval: {prompt!r} asks for the position {position!r}: {remedy}")
