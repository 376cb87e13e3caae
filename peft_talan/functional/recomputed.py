"""A causal pass by chunks, for mixers that are not linear in the memory; backward computes each chunk again."""

from __future__ import annotations

from typing import Any, cast

import torch

from . import reference
from .chunked import relative_segments

CHUNK = 64
"""Tokens taken at a time: as many [slots, width] memories exist at once."""


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
        for start in range(0, values.shape[1], CHUNK):
            piece = slice(start, start + CHUNK)
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
            piece = slice(index * CHUNK, (index + 1) * CHUNK)
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
