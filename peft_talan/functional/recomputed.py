"""Causal passes that take a sequence piece by piece; backward computes each piece again from its first memory."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from . import reference
from .chunked import CHUNK, backward_slab, cut_slab, forward_slab, to_chunks, to_tokens

SLAB = 4096
"""Tokens of all sequences that `ChunkwiseRemix` takes at a time: the temporaries stay in the processor's cache."""

PIECE = 128
"""Tokens that `recomputed_remix` takes at a time: so many [slots, width] memories exist at once."""


def _slabs(tokens: int, sequences: int) -> list[slice]:
    length = max(SLAB // sequences // CHUNK, 1) * CHUNK
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
        """Compute read-outs and final memory, and keep the memory at each slab's start.

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
        slabs = _slabs(tokens, sequences)
        readouts = values.new_empty(values.shape) if len(slabs) > 1 else None
        states = [state]
        for piece in slabs:
            slab = cut_slab(
                values[:, piece],
                queries[:, piece],
                weights[:, piece],
                states[-1],
                relative_segments(segment_ids, piece),
            )
            part = to_tokens(forward_slab(slab, mixer, parameter), sequences, piece.stop - piece.start)
            readouts = _put(part, piece, readouts)
            states.append(slab.final_state)
        ctx.mixer = mixer
        ctx.save_for_backward(values, queries, weights, segment_ids, parameter, *states[:-1])
        return cast("torch.Tensor", readouts), states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        """Walk the slabs backwards; each is computed again from the memory at its start."""
        values, queries, weights, segment_ids, parameter, *states = ctx.saved_tensors
        grad_readouts, grad_state = grad_outputs
        sequences, tokens, _ = values.shape
        slabs = _slabs(tokens, sequences)
        gradients = [
            tensor.new_empty(tensor.shape) if len(slabs) > 1 else None for tensor in (values, queries, weights)
        ]
        grad_parameter = torch.zeros_like(parameter)
        for piece, state in reversed(list(zip(slabs, states, strict=True))):
            slab = cut_slab(
                values[:, piece], queries[:, piece], weights[:, piece], state, relative_segments(segment_ids, piece)
            )
            grad_r = to_chunks(grad_readouts[:, piece], slab.z.shape[1])
            *by_item, grad_state, by_parameter = backward_slab(slab, ctx.mixer, parameter, grad_r, grad_state)
            parts = (to_tokens(gradient, sequences, piece.stop - piece.start) for gradient in by_item)
            gradients = [_put(part, piece, whole) for part, whole in zip(parts, gradients, strict=True)]
            grad_parameter = grad_parameter + by_parameter
        return *gradients, grad_state, None, None, grad_parameter


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
    # Split and not sliced: the gradient of a slice would be as long as the sequence, once a piece.
    for z, q, e in zip(values.split(PIECE, 1), queries.split(PIECE, 1), weights.split(PIECE, 1), strict=True):
        piece = slice(start, start + PIECE)
        arguments = (z, q, e, mixer, parameters, relative_segments(segment_ids, piece), state)
        if torch.is_grad_enabled():
            r, state = checkpoint(reference.remix, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            r, state = cast("tuple[torch.Tensor, torch.Tensor]", reference.remix(*arguments))
        # The memory is a view of those that each token saw: without a copy it would keep them all.
        state = state.clone()
        readouts.append(r)
        start += PIECE
    return torch.cat(readouts, dim=1), state
