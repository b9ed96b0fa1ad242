"""ImageReward v1.0 (Xu et al., arXiv:2304.05977): BLIP reads the prompt while it looks at the picture.

The text encoder attends to the picture in every layer, so there are no features of a text alone to keep; what
several prompts of one picture share is the vision pass. Its own package resizes in Pillow (``crop-pil``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from srpo_cli.errors import SrpoError, one_line
from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.head import linear_head
from srpo_cli.rewards.preprocess import Images, Preprocess
from srpo_cli.rewards.weights import Announce, find_weights, read_state

VISION: Mapping[str, Any] = MappingProxyType(
    {
        "image_size": 224,
        "patch_size": 16,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "layer_norm_eps": 1e-6,
    }
)
"""BLIP's ViT-L/16."""

TEXT: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 30524,
        "max_position_embeddings": 512,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "layer_norm_eps": 1e-12,
    }
)
"""BERT-base with cross-attention; two tokens more than BERT's own 30522."""

MAX_TOKENS = 35
"""What a prompt is padded and cut to; two prompts with the same first 35 tokens score alike."""

# Of the scores that the authors standardised theirs by; constants of their package.
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072

_HEAD_PLACES = (0, 2, 4, 6, 7)

# The file's names, and transformers' for the same tensors; the text encoder's are alike.
_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)
# BLIP's contrastive projections, and a buffer that older versions of transformers wrote.
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")


class Blip(nn.Module):
    """ImageReward's network.

    Args:
        vision: sizes of the vision tower, as :data:`VISION`.
        text: sizes of the text encoder, as :data:`TEXT`.
    """

    def __init__(self, vision: Mapping[str, Any] = VISION, text: Mapping[str, Any] = TEXT) -> None:
        super().__init__()
        self.visual_encoder = BlipVisionModel(BlipVisionConfig(**vision))
        # Only as a decoder has it cross-attention; it has eager attention alone, and another one asked for would
        # stay in the config and mask padding wrongly.
        config = BlipTextConfig(
            **text, encoder_hidden_size=vision["hidden_size"], is_decoder=True, attn_implementation="eager"
        )
        self.text_encoder = BlipTextModel(config, add_pooling_layer=False)
        self.mlp = linear_head(text["hidden_size"], _HEAD_PLACES)

    def look(self, pixels: Tensor) -> Tensor:
        """Normalised pictures (B, 3, size, size) to states (B, patches + 1, width)."""
        return self.visual_encoder(pixels).last_hidden_state

    def judge(self, seen: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Standardised rewards (B,) of prompts (B, MAX_TOKENS) for the pictures behind the states ``seen``."""
        states = self.text_encoder(
            tokens,
            attention_mask=mask,
            encoder_hidden_states=seen,
            is_decoder=False,  # every token sees every other; the other way masks the later ones
        ).last_hidden_state
        first = states[:, 0].to(self.mlp[0].weight.dtype)
        return (self.mlp(first).squeeze(-1) - _MEAN) / _STD


class ImageReward(Reward):
    """How well a picture serves its prompt, in people's eyes; standardised over the authors' pictures.

    Args:
        blip: the network; frozen here.
        tokenizer: BERT's, with BLIP's two tokens.
        name, weights: as for every :class:`Reward`.
    """

    unit = "standardised, about -2.3 to 2"
    thread_safe = True
    modes = ("crop-pil", "crop")

    def __init__(self, blip: Blip, tokenizer: BertTokenizer, *, name: str = "imagereward", weights: str = "") -> None:
        self.blip = blip.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.preprocess = Preprocess(blip.visual_encoder.config.image_size, self.modes[0])
        self.name, self.weights = name, weights
        self._tokens: dict[str, tuple[Tensor, Tensor]] = {}
        self._lock = Lock()  # the tokenizer is one for all threads

    @property
    def dtype(self) -> torch.dtype:
        return self.blip.visual_encoder.dtype

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both (N, MAX_TOKENS), computed once per distinct text."""
        with self._lock:
            new = [text for text in dict.fromkeys(texts) if text not in self._tokens]
            if new:
                encoded = self.tokenizer(
                    new, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
                )
                self._tokens.update(zip(new, zip(encoded.input_ids, encoded.attention_mask, strict=True), strict=True))
        ids, mask = zip(*(self._tokens[text] for text in texts), strict=True)
        return torch.stack(ids).to(self.device), torch.stack(mask).to(self.device)

    def scores(self, images: Images, *texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Rewards of the same pictures for several lists of B texts, at the price of one vision pass.

        Returns one (B,) per list, float32 or wider, differentiable in ``images``.
        """
        pixels = self.preprocess(images).to(self.device, self.dtype)
        # A caller's autocast stays out: the difference of two prompts' rewards needs the digits.
        with torch.autocast(self.device.type, enabled=False):
            seen = self.blip.look(pixels)
            return tuple(self.blip.judge(seen, *self.tokens(column)) for column in texts)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return self.scores(images, prompts)[0].float()


def load_imagereward(
    name: str = "imagereward",
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    announce: Announce | None = None,
    *,
    vision: Mapping[str, Any] = VISION,
    text: Mapping[str, Any] = TEXT,
) -> ImageReward:
    """ImageReward v1.0.

    Args:
        name: its name in the registry.
        weights: ``ImageReward.pt``, with BERT's ``vocab.txt`` beside it or in the cache; the caches if not given.
        device, dtype: where and in what it runs; the head in float32 or wider.
        announce: told about a download before it starts; None: nothing is downloaded.
        vision, text: sizes of the network; the release's if not given.

    Raises MissingError with the command that fetches a file that is not here, SrpoError for one that does not fit.
    """
    found = find_weights(name, weights, announce)
    file, vocabulary = found.files.values()
    tokenizer = read_tokenizer(vocabulary, text["vocab_size"])
    try:
        blip = build_blip(read_state(file), vision, text)
    except RuntimeError as error:
        raise SrpoError(f"{file} is not a checkpoint of ImageReward: {one_line(error)}") from error
    blip.to(device, dtype).mlp.to(torch.promote_types(dtype, torch.float32))
    return ImageReward(blip, tokenizer, name=name, weights=found.record)


def build_blip(state: Mapping[str, Tensor], vision: Mapping[str, Any] = VISION, text: Mapping[str, Any] = TEXT) -> Blip:
    """The network that holds exactly the tensors of ``state``, named as in ``ImageReward.pt``.

    Raises RuntimeError for a tensor too many, too few, or of another shape.
    """
    with init_empty_weights():
        blip = Blip(vision, text)
    blip.load_state_dict(
        {_our_name(name): tensor for name, tensor in state.items() if not _UNUSED.fullmatch(name)}, assign=True
    )
    return blip


def read_tokenizer(vocabulary: Path, size: int) -> BertTokenizer:
    """BERT's uncased tokenizer from its ``vocab.txt``, with BLIP's two tokens; SrpoError unless ``size`` in all."""
    try:
        with vocabulary.open(encoding="utf-8") as lines:
            tokenizer = BertTokenizer(vocab={line.rstrip("\n"): index for index, line in enumerate(lines)})
    except UnicodeDecodeError as error:
        raise SrpoError(f"{vocabulary} is not a vocabulary: {one_line(error)}") from error
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) != size:
        raise SrpoError(
            f"{vocabulary} is not the vocabulary of bert-base-uncased: "
            f"it has {len(tokenizer) - 2} tokens, not {size - 2}"
        )
    return tokenizer


def _our_name(name: str) -> str:
    """A tensor's name in :class:`Blip`, from the one that it has in the file."""
    tower = "blip.visual_encoder."
    if not name.startswith(tower):
        return name.removeprefix("blip.").replace("mlp.layers.", "mlp.")
    name = name.removeprefix(tower)
    for pattern, ours in _VISION_NAMES:
        name = re.sub(pattern, ours, name)
    return f"visual_encoder.{name}"
