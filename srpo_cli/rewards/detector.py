"""Mask2Former: which of COCO's eighty kinds of things are in a picture, where, and how surely (arXiv:2112.01527)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

from srpo_cli.errors import SrpoError, one_line
from srpo_cli.registry import METRIC_FILES
from srpo_cli.rewards.weights import Announce, find_weights

# The size that GenEval's detector looks at, and that these weights were measured at: the shorter side to 800 px, the
# longer to 1333 at most, both to multiples of 32. The release's own preprocessing makes small squares of all pictures.
_SIZE = {"shortest_edge": 800, "longest_edge": 1333}
_DIVISOR = 32


@dataclass(frozen=True)
class Segments:
    """What was found in one picture of (H, W) px: N labels, scores (N,) in [0, 1], masks (N, H, W) bool; on the CPU."""

    labels: list[str]
    scores: Tensor
    masks: Tensor


class Detector:
    """Finds things in pictures.

    Args:
        model: frozen here; its configuration names the labels.
        processor: of the same weights; normalises.
        weights: which weights these are.
    """

    def __init__(
        self, model: Mask2FormerForUniversalSegmentation, processor: Mask2FormerImageProcessor, weights: str = ""
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.processor = processor
        self.weights = weights

    @property
    def labels(self) -> list[str]:
        """All that it can find."""
        return list(self.model.config.id2label.values())

    @torch.no_grad()
    def __call__(self, pixels: Tensor, threshold: float) -> Segments:
        """Find what is in 8-bit pixels (H, W, 3) with a score of ``threshold`` or more; masks may overlap."""
        inputs = self.processor([pixels.movedim(-1, 0)], size=_SIZE, size_divisor=_DIVISOR, return_tensors="pt")
        outputs = self.model(inputs["pixel_values"].to(self.model.device, self.model.dtype))
        (found,) = self.processor.post_process_instance_segmentation(
            outputs, threshold=threshold, target_sizes=[tuple(pixels.shape[:2])], return_binary_maps=True
        )
        segments = found["segments_info"]
        names = self.model.config.id2label
        return Segments(
            [names[segment["label_id"]] for segment in segments],
            torch.tensor([segment["score"] for segment in segments]),
            # Without any segment the processor gives a map of -1, not a stack of none.
            found["segmentation"].bool().cpu() if segments else torch.zeros(0, *pixels.shape[:2], dtype=torch.bool),
        )


def load_detector(
    name: str = "mask2former",
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    announce: Announce | None = None,
) -> Detector:
    """Mask2Former with a small Swin backbone, trained on COCO's instances, in float32.

    Args:
        name: its name in ``registry.METRIC_FILES``.
        weights: a folder with the release's ``model.safetensors``, ``config.json`` and ``preprocessor_config.json``;
            the Hub cache if not given.
        device: where it runs.
        announce: told about a download before it starts; None: nothing is downloaded.

    Raises MissingError with the command that fetches what is not here; SrpoError for files of another layout.
    """
    found = find_weights(name, weights, announce, METRIC_FILES[name])
    file = found["model.safetensors"]
    try:
        config = Mask2FormerConfig.from_pretrained(found["config.json"])
        model, report = Mask2FormerForUniversalSegmentation.from_pretrained(
            file.parent,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        processor = Mask2FormerImageProcessor.from_pretrained(found["preprocessor_config.json"].parent)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise SrpoError(f"{file} is not Mask2Former as transformers saves it: {one_line(error)}") from error
    # Weights that a file lacks would be random ones.
    absent = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if absent or report["mismatched_keys"]:
        lacking = ", ".join(absent[:3]) or f"{report['mismatched_keys']}"[:120]
        raise SrpoError(f"{file} does not fit the Mask2Former of its config.json: {lacking}")
    return Detector(model.to(device), processor, found.record)
