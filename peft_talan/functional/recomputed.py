"""The causal memory tile by tile, for the `mlp` mixer: backward computes each tile again from its initial state."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import reference, slot_reference
from .parameters import RemixInputs, mean_of
from .records import relative_segments

TILE_TOKENS, SHORTEST_TILE = 256, 64
"""Tokens of all sequences that are taken at a time, each with a [slots, width] memory; and of one, however many."""


def mix_mlp(memory: torch.Tensor, queries: torch.Tensor, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """`slot_reference.mix_mlp` in four large products, and without one small product per token for the read."""
    # Copies, which lie aligned: by tensors that are mapped from a file, products would round as these lie in it.
    bias, slot_in, slot_out, channel_in, channel_out = (tensor.to(memory.dtype, copy=True) for tensor in parameters)
    memory = memory + (F.gelu(memory.mT @ slot_in.mT) @ slot_out.mT).mT
    memory = memory + F.gelu(memory @ channel_in.mT) @ channel_out.mT
    scores = (queries.unsqueeze(-2) * memory).sum(-1) / math.sqrt(queries.shape[-1])
    return ((scores + bias).softmax(-1).unsqueeze(-1) * memory).sum(-2)


def remix_tile(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.remix` of some `RemixInputs`, few enough tokens for the memory of every one, and the fast `mlp`."""
    values, queries, weights, mixer, parameters, segment_ids, state = RemixInputs(*inputs)
    memory, final_state = slot_reference.compress(values, weights, segment_ids, state)
    rule = mix_mlp if mixer == "mlp" else reference.READ_RULES[mixer]
    return rule(mean_of(memory), queries, parameters), final_state


def recomputed_remix(inputs: RemixInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.remix` with a causal scope for any mixer, one tile after the other."""
    readouts, start, state = [], 0, cast("torch.Tensor", inputs.state)
    length = max(TILE_TOKENS // max(inputs.values.shape[0], 1), SHORTEST_TILE)
    # Split and not sliced: the gradient of a slice would be as long as the sequence, once per tile.
    for z, q, e in zip(*(tensor.split(length, 1) for tensor in inputs[:3]), strict=True):
        segment_ids = relative_segments(inputs.segment_ids, slice(start, start + length))
        tile = RemixInputs(z, q, e, inputs.mixer, inputs.parameters, segment_ids, state)
        if torch.is_grad_enabled():
            r, state = checkpoint(remix_tile, *tile, use_reentrant=False, preserve_rng_state=False)
        else:
            r, state = remix_tile(*tile)
        # The state is a view of the memories that each token saw: without a copy it would keep them all.
        state = state.clone()
        readouts.append(r)
        start += length
    return torch.cat(readouts, dim=1), state
