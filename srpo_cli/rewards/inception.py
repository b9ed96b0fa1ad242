"""The Inception network whose features FID and KID are published with, as torch-fidelity carried it to PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor
from torchmetrics.image.fid import NoTrainInceptionV3

from srpo_cli.errors import MissingError, SrpoError, one_line
from srpo_cli.registry import METRIC_FILES
from srpo_cli.rewards.weights import Announce, find_weights

_FEATURES = "2048"


class Inception:
    """Inception's pooled features; ``weights`` says which weights these are."""

    def __init__(self, network: NoTrainInceptionV3, weights: str) -> None:
        self.network = network.requires_grad_(False)
        self.weights = weights
        self.device = next(network.parameters()).device

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor]) -> Tensor:
        """Features (N, 2048) of 8-bit pictures (H, W, 3), each of its own size; the network resizes with antialias."""
        return torch.cat([self.network(pixels.movedim(-1, 0)[None].to(self.device)) for pixels in pictures])


def load_inception(
    name: str = "inception",
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    announce: Announce | None = None,
) -> Inception:
    """The network of the original FID.

    Args:
        name: its name in ``registry.METRIC_FILES``.
        weights: its file; torch.hub's cache if not given.
        device: where it runs.
        announce: told about a download before it starts; None: nothing is downloaded.

    Raises MissingError where torch-fidelity or the file is not here, with the command that fetches it; SrpoError
    for another file.
    """
    if find_spec("torch_fidelity") is None:
        raise MissingError("Inception's features need torch-fidelity, which is not here: pip install 'srpo-cli[fid]'")
    found = find_weights(name, weights, announce, METRIC_FILES[name])
    (file,) = found.files.values()
    try:
        network = NoTrainInceptionV3("inception-v3-compat", [_FEATURES], str(file))
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise SrpoError(f"{file} is not torch-fidelity's Inception: {one_line(error)}") from error
    return Inception(network.to(device), found.record)
