"""The chunked memory read as one function for autograd: long sequences in tiles, with the backward pass by hand."""

from __future__ import annotations

from typing import Any, cast

import torch

from . import reference
from .chunked import (
    CHUNK_SIZE,
    ChunkMasks,
    Probabilities,
    Tile,
    backward_tile,
    cut_tile,
    forward_tile,
    part_of,
    probabilities,
    to_chunks,
    to_tokens,
)
from .parameters import full_precision

TILE_TOKENS = 4096
"""Tokens of all sequences that are taken at a time: the temporaries stay in the processor's cache."""


def _tiles(tokens: int, sequences: int) -> list[slice]:
    length = max(TILE_TOKENS // sequences // CHUNK_SIZE, 1) * CHUNK_SIZE
    return [slice(start, min(start + length, tokens)) for start in range(0, tokens, length)]


def relative_segments(segment_ids: torch.Tensor | None, piece: slice) -> torch.Tensor | None:
    """The segments of one piece of the tokens, numbered from the one that the memory at its start is of.

    Args:
        segment_ids: [sequences, tokens], int, not falling; None: one segment.
        piece: Which tokens.

    Returns:
        [sequences, tokens of the piece], int, or None.
    """
    if segment_ids is None or piece.start == 0:
        return segment_ids if segment_ids is None else segment_ids[:, piece]
    return segment_ids[:, piece] - segment_ids[:, piece.start - 1 : piece.start]


def _put(part: torch.Tensor, piece: slice, whole: torch.Tensor | None) -> torch.Tensor:
    """Collect the parts of a tensor; the only part of a short sequence is the whole, without a copy."""
    if whole is None:
        return part
    whole[:, piece] = part
    return whole


def _differentiable_backward(
    mixer: str, saved: tuple[Any, ...], grad_outputs: tuple[Any, ...]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients as functions that autograd differentiates again: those of the readable equations."""
    values, queries, weights, segment_ids, parameter, state, *_ = saved
    inputs = (values, queries, weights, state, parameter)
    outputs = reference.remix(values, queries, weights, mixer, (parameter,), segment_ids, state)
    used = [(output, grad) for output, grad in zip(outputs, grad_outputs, strict=True) if grad is not None]
    outputs, grad_outputs = zip(*used, strict=True)
    asked = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(outputs, asked, grad_outputs, create_graph=True, materialize_grads=True))
    *gradients, grad_parameter = (next(found) if tensor.requires_grad else None for tensor in inputs)
    return *gradients, None, None, grad_parameter


def _backward(mixer: str, saved: tuple[Any, ...], grad_outputs: tuple[Any, ...]) -> tuple[torch.Tensor | None, ...]:
    values, queries, weights, segment_ids, parameter, *memory = saved
    grad_readouts, grad_state = grad_outputs
    if grad_readouts is None:
        grad_readouts = torch.zeros_like(values)
    sequences, tokens, _ = values.shape
    tiles = _tiles(tokens, sequences)
    states, kept = memory[: len(tiles)], memory[len(tiles) :]
    gradients = [tensor.new_empty(tensor.shape) if len(tiles) > 1 else None for tensor in (values, queries, weights)]
    grad_parameter: torch.Tensor | None = None
    for piece, state in reversed(list(zip(tiles, states, strict=True))):
        if kept:
            z, q, e, s, d, *masks = kept[:10]
            tile, read = Tile(z, q, e, ChunkMasks(*masks), s, d, state), Probabilities(*kept[10:])
        else:
            z, q, e = (part_of(tensor, piece) for tensor in (values, queries, weights))
            tile = cut_tile(z, q, e, state, relative_segments(segment_ids, piece))
            read = probabilities(tile, mixer, parameter)
        grad_r = to_chunks(part_of(grad_readouts, piece), tile.z.shape[1])
        *by_item, grad_state, by_parameter = backward_tile(tile, read, parameter, grad_r, grad_state)
        by_token = (to_tokens(gradient, sequences, piece.stop - piece.start) for gradient in by_item)
        gradients = [_put(part, piece, whole) for part, whole in zip(by_token, gradients, strict=True)]
        grad_parameter = by_parameter if grad_parameter is None else grad_parameter + by_parameter
    return *gradients, grad_state, None, None, grad_parameter


class ChunkwiseRemix(torch.autograd.Function):
    """`reference.remix` with a causal scope for the mixers that are linear in N: `attention` and `linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        queries: torch.Tensor,
        weights: torch.Tensor,
        state: torch.Tensor,
        segment_ids: torch.Tensor | None,
        mixer: str,
        parameter: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute read-outs and final memory, and keep the memory at each tile's start.

        Args:
            ctx: The autograd context.
            values: z, [sequences, tokens, width].
            queries: q, [sequences, tokens, width].
            weights: e, [sequences, tokens, slots].
            state: [sequences, slots, width + 1].
            segment_ids: [sequences, tokens] or None.
            mixer: `attention` or `linear`.
            parameter: The mixer's one tensor: slot bias [slots] or slot readout [width, slots].

        Returns:
            r, [sequences, tokens, width], and the final memory, [sequences, slots, width + 1].
        """
        sequences, tokens, _ = values.shape
        tiles = _tiles(tokens, sequences)
        readouts = values.new_empty(values.shape) if len(tiles) > 1 else None
        states = [state]
        for piece in tiles:
            z, q, e = (part_of(tensor, piece) for tensor in (values, queries, weights))
            tile = cut_tile(z, q, e, states[-1], relative_segments(segment_ids, piece))
            read = probabilities(tile, mixer, parameter)
            part = to_tokens(forward_tile(tile, read), sequences, piece.stop - piece.start)
            readouts = _put(part, piece, readouts)
            states.append(tile.final_state)
        ctx.mixer = mixer
        ctx.set_materialize_grads(False)
        # Of a short sequence all is kept, some slots a token; of a long one what a tile begins with.
        kept = () if len(tiles) > 1 else (tile.z, tile.q, tile.e, tile.s, tile.d, *tile.masks, *read)
        ctx.save_for_backward(values, queries, weights, segment_ids, parameter, *states[:-1], *kept)
        return cast("torch.Tensor", readouts), states[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        """Walk the tiles backwards; of several, each is computed again from the memory at its start."""
        if all(grad is None for grad in grad_outputs):
            return (None,) * 7
        saved = ctx.saved_tensors  # Once: torch's checkpoints hand each tensor out a single time.
        # On a CPU, a backward pass inside of autocast runs under it.
        with full_precision(saved[0].device.type):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return _differentiable_backward(ctx.mixer, saved, grad_outputs)  # create_graph=True
            return _backward(ctx.mixer, saved, grad_outputs)
