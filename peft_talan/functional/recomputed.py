"""The causal memory piece by piece, for the `mlp` mixer: backward computes each piece again from its first memory."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import reference
from .chunked_autograd import relative_segments
from .parameters import SMALLEST_DENOMINATOR

TILE_TOKENS, SHORTEST_TILE = 256, 64
"""Tokens of all sequences that are taken at a time, each with a [slots, width] memory; and of one, however many."""


def mix_mlp(memory: torch.Tensor, queries: torch.Tensor, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Remix the slots of all tokens in four large products, and read them without one small product a token.

    Args:
        memory: mu, [batch, tokens, slots, width].
        queries: q, [batch, tokens, width].
        parameters: As in `reference.remix_slots`.

    Returns:
        r, [batch, tokens, width].
    """
    # Copies, which lie aligned: by tensors that are mapped from a file, products would round as these lie in it.
    bias, slot_in, slot_out, channel_in, channel_out = (tensor.to(memory.dtype, copy=True) for tensor in parameters)
    memory = memory + F.linear(F.gelu(F.linear(memory.mT, slot_in)), slot_out).mT
    memory = memory + F.linear(F.gelu(F.linear(memory, channel_in)), channel_out)
    scores = (queries.unsqueeze(-2) * memory).sum(-1) / math.sqrt(queries.shape[-1])
    return ((scores + bias).softmax(-1).unsqueeze(-1) * memory).sum(-2)


MIXER_RULES = {**reference.MIXER_RULES, "mlp": mix_mlp}


def remix_tile(
    values: torch.Tensor,
    queries: torch.Tensor,
    weights: torch.Tensor,
    mixer: str,
    parameters: tuple[torch.Tensor, ...],
    segment_ids: torch.Tensor | None,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `reference.remix` with a causal scope on a piece that is short enough for the memory of every token.

    Args:
        values: z, [batch, tokens, width].
        queries: q, [batch, tokens, width].
        weights: e, [batch, tokens, slots].
        mixer: Any mixer.
        parameters: The mixer's tensors.
        segment_ids: [batch, tokens] or None.
        state: [batch, slots, width + 1].

    Returns:
        r, [batch, tokens, width], and the final memory, [batch, slots, width + 1].
    """
    memory, final_state = reference.compress(values, weights, segment_ids, state)
    mean = memory[..., :-1] / memory[..., -1:].clamp_min(SMALLEST_DENOMINATOR)
    return MIXER_RULES[mixer](mean, queries, parameters), final_state


def recomputed_remix(
    values: torch.Tensor,
    queries: torch.Tensor,
    weights: torch.Tensor,
    mixer: str,
    parameters: tuple[torch.Tensor, ...],
    segment_ids: torch.Tensor | None,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `reference.remix` with a causal scope over one piece of the tokens after the other.

    Args:
        values: z, [sequences, tokens, width].
        queries: q, [sequences, tokens, width].
        weights: e, [sequences, tokens, slots].
        mixer: Any mixer.
        parameters: The mixer's tensors.
        segment_ids: [sequences, tokens] or None.
        state: [sequences, slots, width + 1].

    Returns:
        r, [sequences, tokens, width], and the final memory, [sequences, slots, width + 1].
    """
    readouts, start = [], 0
    length = max(TILE_TOKENS // max(values.shape[0], 1), SHORTEST_TILE)
    # Split and not sliced: the gradient of a slice would be as long as the sequence, once a piece.
    for z, q, e in zip(*(tensor.split(length, 1) for tensor in (values, queries, weights)), strict=True):
        piece = slice(start, start + length)
        arguments = (z, q, e, mixer, parameters, relative_segments(segment_ids, piece), state)
        if torch.is_grad_enabled():
            r, state = checkpoint(remix_tile, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            r, state = remix_tile(*arguments)
        # The memory is a view of those that each token saw: without a copy it would keep them all.
        state = state.clone()
        readouts.append(r)
        start += length
    return torch.cat(readouts, dim=1), state
