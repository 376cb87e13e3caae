"""The causal memory piece by piece, for the `mlp` mixer: backward computes each piece again from its first memory."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from . import reference
from .chunked_autograd import relative_segments

PIECE = 128
"""Tokens that `recomputed_remix` takes at a time: this number of [slots, width] memories exists at once."""


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
            r, state = reference.remix(*arguments)
        # The memory is a view of those that each token saw: without a copy it would keep them all.
        state = state.clone()
        readouts.append(r)
        start += PIECE
    return torch.cat(readouts, dim=1), state
