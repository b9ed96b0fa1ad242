"""A FLUX-layout pipeline of real classes with random weights, small enough to make in a test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from srpo_cli.models.flux_layout import bfl_pieces


def make_tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Both tokenizers over lower-case letters; 10 CLIP tokens, 12 T5 tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=10)
    unigrams = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((letter, -3.0) for letter in letters),
    ]
    return clip, T5TokenizerFast(vocab=unigrams, extra_ids=0, model_max_length=12)


def make_pipeline(**scheduler: object) -> FluxPipeline:
    """16 px per token side, 2x2 packed: 8 px granularity comes from a VAE of three levels."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = make_tokenizers()
    vocabulary = len(tokenizer)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=10,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer_2), d_model=24, d_kv=12, d_ff=32, num_layers=1, num_heads=2)
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with FLUX.1-dev's scheduler: its shift grows with the picture."""
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(shift=3.0, use_dynamic_shifting=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fixed_shift_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with the miniature's kind of scheduler: one shift for every size."""
    folder = tmp_path_factory.mktemp("fixed")
    make_pipeline(shift=1.7, use_dynamic_shifting=False).save_pretrained(folder)
    return folder


def to_bfl(state: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """A transformer's tensors as Black Forest Labs' code names and stacks them: the way back of what is read."""
    stacked: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, piece in bfl_pieces({name: tensor.shape for name, tensor in state.items()}).items():
        tensor = torch.cat(state[name].chunk(2)[::-1]) if piece.swapped else state[name]
        stacked.setdefault(prefix + piece.name, []).append((piece.start, tensor))
    return {
        name: torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])
        for name, parts in stacked.items()
    }


@pytest.fixture(name="to_bfl")
def give_to_bfl():
    return to_bfl
