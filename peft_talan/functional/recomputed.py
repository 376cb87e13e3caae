"""Causal passes that take a sequence piece by piece; backward computes each piece again from its first memory."""

from __future__ import annotations

from typing import Any, cast

import torch

from . import reference
from .chunked import CHUNK, backward_slab, cut_slab, forward_slab, to_chunks, to_tokens

SLAB = 4096
"""Tokens of all sequences that `ChunkwiseRemix` takes at a time: the temporaries stay in the processor's cache."""

PIECE = 64
"""Tokens that `RecomputedRemix` takes at a time: so many [slots, width] memories exist at once."""


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


class RecomputedRemix(torch.autograd.Function):
    """`reference.remix` over one chunk of tokens after the other: memory for one chunk at a time, in both passes."""

    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        queries: torch.Tensor,
        weights: torch.Tensor,
        state: torch.Tensor,
        segment_ids: torch.Tensor | None,
        mixer: str,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute read-outs and final memory, and keep the memory at each chunk's start.

        Args:
            ctx: The autograd context.
            values: z, [batch, tokens, width].
            queries: q, [batch, tokens, width].
            weights: e, [batch, tokens, slots].
            state: [batch, slots, width + 1].
            segment_ids: [batch, tokens] or None.
            mixer: The mixer's name.
            *parameters: The mixer's tensors.

        Returns:
            r, [batch, tokens, width], and the final memory, [batch, slots, width + 1].
        """
        states, readouts = [state], []
        for start in range(0, values.shape[1], PIECE):
            piece = slice(start, start + PIECE)
            readout, after = reference.remix(
                values[:, piece],
                queries[:, piece],
                weights[:, piece],
                mixer,
                parameters,
                relative_segments(segment_ids, piece),
                states[-1],
            )
            readouts.append(readout)
            states.append(cast(torch.Tensor, after))
        ctx.mixer, ctx.number_of_parameters = mixer, len(parameters)
        ctx.save_for_backward(values, queries, weights, segment_ids, *parameters, *states[:-1])
        return torch.cat(readouts, dim=1), states[-1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        """Walk the chunks backwards; each is computed again from the memory at its start."""
        values, queries, weights, segment_ids, *rest = ctx.saved_tensors
        parameters, states = rest[: ctx.number_of_parameters], rest[ctx.number_of_parameters :]
        grad_readouts, grad_state = grad_outputs
        token_gradients: list[tuple[torch.Tensor, ...]] = []
        parameter_gradients = [torch.zeros_like(parameter) for parameter in parameters]
        for index in reversed(range(len(states))):
            piece = slice(index * PIECE, (index + 1) * PIECE)
            inputs = [
                tensor.detach().requires_grad_()
                for tensor in (values[:, piece], queries[:, piece], weights[:, piece], states[index], *parameters)
            ]
            with torch.enable_grad():
                outputs = reference.remix(
                    inputs[0],
                    inputs[1],
                    inputs[2],
                    ctx.mixer,
                    tuple(inputs[4:]),
                    relative_segments(segment_ids, piece),
                    inputs[3],
                )
            gradients = torch.autograd.grad(
                cast(tuple[torch.Tensor, ...], outputs), inputs, (grad_readouts[:, piece], grad_state)
            )
            grad_state = gradients[3]
            token_gradients.append(gradients[:3])
            for total, gradient in zip(parameter_gradients, gradients[4:], strict=True):
                total.add_(gradient)
        by_tensor = (torch.cat(pieces[::-1], dim=1) for pieces in zip(*token_gradients, strict=True))
        return *by_tensor, grad_state, None, None, *parameter_gradients
