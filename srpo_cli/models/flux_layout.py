"""The names that Black Forest Labs' own code, and ComfyUI, give the tensors of a FLUX transformer.

Diffusers' loader of such files takes the width of FLUX.1 for granted and holds the file twice in memory; from this
table any width can be read, tensor by tensor. The tests hold it against diffusers' conversion.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ROOT = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_SWAPPED = "norm_out.linear"  # shift and scale in BFL's, scale and shift in diffusers' layout

# Several modules of diffusers' are one of BFL's, their rows below each other in this order.
_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
_BLOCKS = {"transformer_blocks": ("double_blocks", _DOUBLE), "single_transformer_blocks": ("single_blocks", _SINGLE)}


@dataclass(frozen=True)
class Piece:
    """Where a tensor of diffusers' layout is in BFL's: rows ``start`` to ``stop`` of the tensor ``name``.

    ``swapped``: the two halves of those rows change places.
    """

    name: str
    start: int
    stop: int
    swapped: bool = False


def bfl_pieces(shapes: Mapping[str, Sequence[int]]) -> dict[str, Piece]:
    """The place of every tensor of a transformer, whose ``shapes`` by diffusers' names are given."""
    fused: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in shapes:
        stored, order = _place(name)
        fused[stored].append((order, name))
    pieces = {}
    for stored, parts in fused.items():
        start = 0
        for _, name in sorted(parts):
            stop = start + shapes[name][0]
            pieces[name] = Piece(stored, start, stop, name.startswith(_SWAPPED + "."))
            start = stop
    return pieces


def _place(name: str) -> tuple[str, int]:
    """BFL's name for a tensor, or for the one that it is a part of, and the order among such parts."""
    module, _, leaf = name.rpartition(".")
    prefix, table = "", _ROOT
    if match := re.fullmatch(r"(\w+)\.(\d+)\.(.+)", module):
        blocks, number, module = match.groups()
        if blocks in _BLOCKS:
            theirs, table = _BLOCKS[blocks]
            prefix = f"{theirs}.{number}."
    stored = table[module]
    leaf = "scale" if stored.endswith(("query_norm", "key_norm")) else leaf
    return f"{prefix}{stored}.{leaf}", list(table).index(module)
