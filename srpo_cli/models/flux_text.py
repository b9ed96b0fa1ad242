"""The text encoders of a FLUX-layout model, which can be used and let go before the rest of it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

EncodeOne = Callable[[str], tuple[Tensor, Tensor]]
"""T5 states (L, D) and pooled CLIP (D') of one prompt, on the CPU."""

LONGEST_PROMPT = 512
"""T5 tokens; FLUX was trained with no more."""


class PromptEncoder:
    """CLIP and T5 with their tokenizers; frozen here.

    Args:
        text_encoder, text_encoder_2, tokenizer, tokenizer_2: the parts of a ``FluxPipeline``.
        max_sequence_length: T5 tokens that every prompt is padded or cut to.
        fingerprint: says which encoders these are, where encodings are kept; see
            :func:`srpo_cli.models.flux_files.encoder_fingerprint`.
    """

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        text_encoder_2: T5EncoderModel,
        tokenizer: CLIPTokenizer,
        tokenizer_2: T5TokenizerFast,
        max_sequence_length: int = LONGEST_PROMPT,
        fingerprint: str = "",
    ) -> None:
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.text_encoder_2 = text_encoder_2.requires_grad_(False).eval()
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
        self.max_sequence_length = max_sequence_length
        self.fingerprint = fingerprint

    @torch.no_grad()
    def encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        """T5 states (L, D) and pooled CLIP (D') of one prompt, on the CPU."""
        clip = _read(self.text_encoder, self.tokenizer, prompt, self.tokenizer.model_max_length)
        t5 = _read(self.text_encoder_2, self.tokenizer_2, prompt, self.max_sequence_length)
        return t5.last_hidden_state[0].cpu(), clip.pooler_output[0].cpu()


def _read(encoder: Any, tokenizer: Any, prompt: str, length: int) -> Any:
    """A text encoder's output for one prompt, padded or cut to ``length`` tokens."""
    fixed = {"padding": "max_length", "max_length": length, "truncation": True}
    ids = tokenizer([prompt], return_tensors="pt", **fixed).input_ids.to(encoder.device)
    with torch.autocast(encoder.device.type, enabled=False):  # what is cached must not depend on the caller
        return encoder(ids)
