"""Tokenizers of the world's vocabulary and frozen random text encoders.

The world speaks 34 words. At this scale frozen random encoders condition a transformer as well as trained ones and
their output can be computed once per caption. The classes are FLUX's own: CLIP gives the pooled vector, T5 the
sequence.
"""

from __future__ import annotations

import gzip
import json
import string
from pathlib import Path

import torch
from open_clip.tokenizer import bytes_to_unicode
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from srpo_cli.miniature.world import vocabulary

CLIP_LENGTH, T5_LENGTH, WIDTH = 20, 16, 96


def bpe_merges() -> list[tuple[str, str]]:
    """Byte-pair merges after which every word of the world is one token."""
    words = [word for word in vocabulary() if word.isalpha()]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def write_bpe(path: Path) -> None:
    """Write the merges in open_clip's format; the file is the same on every run."""
    lines = ["#version: 0.2", *(" ".join(pair) for pair in bpe_merges())]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with the same ids as open_clip's over the same merges."""
    merges = bpe_merges()
    alphabet = list(bytes_to_unicode().values())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def t5_pieces() -> list[str]:
    """T5's pieces: each word of the world in three cases, letters for anything else."""
    words = [form for word in vocabulary() for form in dict.fromkeys((word, word.capitalize(), word.upper()))]
    return [
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        *("▁" + word for word in words),
        *string.ascii_letters,
        *string.digits,
        *".,",
    ]


def t5_tokenizer() -> T5TokenizerFast:
    """T5's tokenizer over ``t5_pieces``: a known word is one token, an unknown one is spelled."""

    def score(piece: str) -> float:  # log probability: a word is always likelier than its letters
        return 0.0 if piece.startswith("<") else -3.0 if len(piece) > 2 else -10.0

    vocab = [(piece, score(piece)) for piece in t5_pieces()]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)


def text_encoders(seed: int = 0) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Frozen random CLIP and T5 text encoders, 137 k and 190 k parameters."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=1,
            num_attention_heads=3,
            projection_dim=WIDTH,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    for parameter in clip.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    pieces = t5_pieces()
    with torch.no_grad():  # T5's tokenizer keeps the case; the world does not: "Photo" means what "photo" means
        same = torch.tensor([pieces.index(piece.lower()) for piece in pieces])
        t5.shared.weight.copy_(t5.shared.weight[same])
    return clip.eval().requires_grad_(False), t5.eval().requires_grad_(False)


@torch.no_grad()
def embed(texts: list[str], clip: CLIPTextModel, t5: T5EncoderModel) -> tuple[Tensor, Tensor]:
    """T5 sequences (N, 16, 96) and CLIP pooled vectors (N, 96), as ``FluxPipeline.encode_prompt`` gives them."""
    clip_ids = clip_tokenizer()(
        texts, padding="max_length", max_length=CLIP_LENGTH, truncation=True, return_tensors="pt"
    )
    t5_ids = t5_tokenizer()(texts, padding="max_length", max_length=T5_LENGTH, truncation=True, return_tensors="pt")
    pooled = torch.cat([clip(ids).pooler_output for ids in clip_ids.input_ids.split(512)])
    sequence = torch.cat([t5(ids).last_hidden_state for ids in t5_ids.input_ids.split(512)])
    return sequence, pooled
