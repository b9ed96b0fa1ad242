"""PickScore v1: a ViT-H CLIP fine-tuned on what people picked (Kirstain et al., arXiv:2305.01569).

Its numbers are ``exp(logit_scale) * cosine``, near 20; "pickscore:cosine" is the cosine alone, on the scale of HPSv2
and what a hinge made for HPSv2 takes. Its processor crops in Pillow (``crop-pil``) and starts the centre at the
floor. Its tokens are transformers': open_clip mends quotes and HTML entities first, and gets other ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from srpo_cli.errors import SrpoError, one_line
from srpo_cli.rewards.clip import ClipReward, Tokenizer
from srpo_cli.rewards.preprocess import Preprocess
from srpo_cli.rewards.weights import Announce, find_weights, read_state


class TransformersClip(nn.Module):
    """A CLIPModel of transformers under the two names that :class:`ClipReward` calls."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Projected features (B, D)."""
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def encode_text(self, ids: Tensor) -> Tensor:
        """Projected features (N, D); the tower is causal, so what is padded behind a text's end does not reach it."""
        return self.model.get_text_features(input_ids=ids).pooler_output


def load_pickscore(
    name: str = "pickscore",
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    announce: Announce | None = None,
) -> ClipReward:
    """PickScore, or its cosine.

    Args:
        name: "pickscore" for ``exp(logit_scale) * cosine``, "pickscore:cosine" for the cosine.
        weights: a folder with ``model.safetensors``, ``config.json`` and ``tokenizer.json``, or the first of them
            under any name; what is not there comes from the Hub cache.
        device, dtype: where and in what it runs.
        announce: told about a download before it starts; None: nothing is downloaded.

    Raises MissingError with the command that fetches what is not here; SrpoError for files of another layout.
    """
    found = find_weights(name, weights, announce)
    model = build_clip_model(found["config.json"], found["model.safetensors"])
    scale = 1.0 if name.endswith(":cosine") else model.logit_scale.float().exp().item()
    return ClipReward(
        TransformersClip(model.to(device, dtype)),
        read_tokenizer(found["tokenizer.json"], model.config.text_config.max_position_embeddings),
        preprocess=Preprocess(model.config.vision_config.image_size, "crop-pil", centre="floor"),
        modes=("crop-pil", "crop"),
        scale=scale,
        unit="cosine" if scale == 1 else f"{scale:.5g} x cosine",
        name=name,
        weights=found.record,
    )


def build_clip_model(config: Path, weights: Path) -> CLIPModel:
    """The CLIPModel of a ``config.json`` that holds exactly the tensors of ``weights``.

    Files written before transformers 4.31 hold ``position_ids`` as well, which count from 0 and are made anew.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model = CLIPModel(CLIPConfig.from_dict(json.loads(config.read_text(encoding="utf-8"))))
    except (ValueError, TypeError) as error:
        raise SrpoError(f"{config} is not a CLIP's configuration: {one_line(error)}") from error
    state = {key: tensor for key, tensor in read_state(weights).items() if not key.endswith(".position_ids")}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise SrpoError(f"{weights} is not a checkpoint of the CLIP in {config}: {one_line(error)}") from error
    return model


def read_tokenizer(file: Path, context_length: int) -> Tokenizer:
    """Texts to ids (N, context_length) by a ``tokenizer.json``, cut and padded behind the end."""
    try:
        tokenizer = FastTokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more exact
        raise SrpoError(f"Cannot read the tokenizer {file}: {one_line(error)}") from error
    tokenizer.enable_truncation(context_length)
    end = tokenizer.encode("").ids[-1]
    tokenizer.enable_padding(pad_id=end, length=context_length)
    return lambda texts: torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])
