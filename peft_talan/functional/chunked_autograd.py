"""The chunked memory read as one function for autograd: long sequences in tiles, with the backward pass by hand."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

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
    probabilities,
    slice_tokens,
    to_chunks,
    to_tokens,
)
from .parameters import full_precision
from .records import relative_segments

TILE_TOKENS = 4096
"""Tokens of all sequences that are taken at a time: the temporaries stay in the processor's cache."""


class _Saved(NamedTuple):
    """What the backward pass needs: the inputs, each tile's initial state and, where there is one tile, the tile."""

    values: torch.Tensor
    queries: torch.Tensor
    weights: torch.Tensor
    segment_ids: torch.Tensor | None
    parameter: torch.Tensor
    states: tuple[torch.Tensor, ...]
    tile: Tile | None = None
    read: Probabilities | None = None

    def flatten(self) -> tuple[torch.Tensor | None, ...]:
        """All tensors in a row: `save_for_backward` takes no others."""
        only = () if self.tile is None or self.read is None else (*self.tile[:-1], *self.tile.masks, *self.read)
        return *self[:5], *self.states, *only

    @classmethod
    def unflatten(cls, tensors: tuple[Any, ...]) -> _Saved:
        """Undo `flatten`: there are as many states as tiles."""
        values, queries, weights, segment_ids, parameter, *others = tensors
        tiles = len(_tiles(*values.shape[:2]))
        inputs, states = (values, queries, weights, segment_ids, parameter), tuple(others[:tiles])
        if len(others) == tiles:
            return cls(*inputs, states)
        z, q, e, state, d, *others = others[tiles:]
        intra_chunk, inter_chunk, has_initial_state, reads_chunk_state, in_chunk_sum, *read = others
        masks = ChunkMasks(intra_chunk, inter_chunk, has_initial_state, reads_chunk_state, in_chunk_sum)
        return cls(*inputs, states, Tile(z, q, e, state, d, masks), Probabilities(*read))


def _tiles(sequences: int, tokens: int) -> list[slice]:
    # Whole chunks, so that only the end of the sequence is padded.
    length = max(TILE_TOKENS // sequences // CHUNK_SIZE, 1) * CHUNK_SIZE
    return [slice(start, min(start + length, tokens)) for start in range(0, tokens, length)]


def _put(part: torch.Tensor, tokens: slice, whole: torch.Tensor | None) -> torch.Tensor:
    """Collect the parts of a tensor; the only part of a short sequence is the whole, without a copy."""
    if whole is None:
        return part
    whole[:, tokens] = part
    return whole


def _differentiable_backward(
    mixer: str, saved: _Saved, grad_outputs: tuple[Any, ...]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients as functions that autograd differentiates again: those of the readable equations."""
    # `backward_tile` works in place, which autograd can't differentiate.
    inputs = (saved.values, saved.queries, saved.weights, saved.states[0], saved.parameter)
    outputs = reference.remix(*inputs[:3], mixer, (saved.parameter,), saved.segment_ids, saved.states[0])
    # An output without a gradient is one that nothing used.
    used = [(output, grad) for output, grad in zip(outputs, grad_outputs, strict=True) if grad is not None]
    outputs, grad_outputs = zip(*used, strict=True)
    trained = [tensor for tensor in inputs if tensor.requires_grad]
    results = iter(torch.autograd.grad(outputs, trained, grad_outputs, create_graph=True, materialize_grads=True))
    *gradients, grad_parameter = (next(results) if tensor.requires_grad else None for tensor in inputs)
    return *gradients, None, None, grad_parameter


def _backward(mixer: str, saved: _Saved, grad_outputs: tuple[Any, ...]) -> tuple[torch.Tensor | None, ...]:
    inputs, parameter = saved[:3], saved.parameter
    grad_readouts, grad_state = grad_outputs
    if grad_readouts is None:  # The final state alone was used.
        grad_readouts = torch.zeros_like(saved.values)
    sequences, tokens, _ = saved.values.shape
    tiles = _tiles(sequences, tokens)
    # Several tiles fill one tensor; a single one returns its own.
    gradients = [tensor.new_empty(tensor.shape) if len(tiles) > 1 else None for tensor in inputs]
    grad_parameter: torch.Tensor | None = None
    # From the last tile to the first: the gradient of a tile's initial state is that of the final state before it.
    for span, state in reversed(list(zip(tiles, saved.states, strict=True))):
        tile, read = saved.tile, saved.read
        if tile is None or read is None:
            z, q, e = (slice_tokens(tensor, span) for tensor in inputs)
            tile, _ = cut_tile(z, q, e, state, relative_segments(saved.segment_ids, span))
            read = probabilities(tile, mixer, parameter)
        grad_r = to_chunks(slice_tokens(grad_readouts, span), tile.z.shape[1])
        *by_chunk, grad_state, by_parameter = backward_tile(tile, read, parameter, grad_r, grad_state)
        by_token = (to_tokens(gradient, sequences, span.stop - span.start) for gradient in by_chunk)
        gradients = [_put(part, span, whole) for part, whole in zip(by_token, gradients, strict=True)]
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
        """The read-outs and the final state; `parameter` is the mixer's one tensor."""
        sequences, tokens, _ = values.shape
        tiles = _tiles(sequences, tokens)
        readouts = values.new_empty(values.shape) if len(tiles) > 1 else None
        states = [state]
        for span in tiles:
            z, q, e = (slice_tokens(tensor, span) for tensor in (values, queries, weights))
            tile, final_state = cut_tile(z, q, e, states[-1], relative_segments(segment_ids, span))
            read = probabilities(tile, mixer, parameter)
            part = to_tokens(forward_tile(tile, read), sequences, span.stop - span.start)
            readouts = _put(part, span, readouts)
            # What comes later sees this tile through its final state alone.
            states.append(final_state)
        ctx.mixer = mixer
        # An unused output costs nothing in backward: None instead of zeros.
        ctx.set_materialize_grads(False)
        # Of a short sequence all is kept, some slots per token; of a long one the states, and the rest is recomputed.
        only = (tile, read) if len(tiles) == 1 else ()
        saved = _Saved(values, queries, weights, segment_ids, parameter, tuple(states[:-1]), *only)
        ctx.save_for_backward(*saved.flatten())
        # The final state is a view of the states of all chunks.
        return cast("torch.Tensor", readouts), states[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        """Walk the tiles backwards; of several, each is computed again from the state at its start."""
        if all(grad is None for grad in grad_outputs):
            return (None,) * 7
        saved = _Saved.unflatten(ctx.saved_tensors)  # Read once: torch's checkpoints return each tensor a single time.
        # On a CPU, a backward pass inside of autocast runs under it.
        with full_precision(saved.values.device.type):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return _differentiable_backward(ctx.mixer, saved, grad_outputs)  # create_graph=True
            return _backward(ctx.mixer, saved, grad_outputs)
