"""What a side path does to a residual stream, in numbers: how much it writes, through which gate, from which slots."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .functional import reference
from .functional.parameters import SMALLEST_DENOMINATOR, SidePathOptions, SidePathParameters
from .functional.writeback import gate_openings


class SidePathStatistics(NamedTuple):
    """What a side path did to some tokens.

    Args:
        relative_norm: The mean of |h' - h| / |h|.
        gate: The mean of the gates, in [0, 1]; None where the writeback has none.
        slot_entropy: The entropy of the mean read-out weights over the slots, divided by log(slots): 1 where all slots
            are used alike, 0 where one is used alone.
    """

    relative_norm: float
    gate: float | None
    slot_entropy: float


def slot_shares(
    memory: torch.Tensor, queries: torch.Tensor, options: SidePathOptions, parameters: SidePathParameters
) -> torch.Tensor:
    """The share of each slot in what a token reads.

    Args:
        memory: mu, [batch, tokens, slots, width].
        queries: q, [batch, tokens, width].
        options: The side path's axes.
        parameters: The side path's tensors.

    Returns:
        p for `attention` and `mlp`, |p| / sum |p| for `linear`; [batch, tokens, slots].
    """
    if options.mixer == "linear":
        weights = (queries @ parameters.mixer[0].to(queries.dtype)).abs()
        return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    if options.mixer == "mlp":
        memory = reference.remix_slots(memory, parameters.mixer)
    return reference.attend_to_slots(memory, queries, parameters.mixer)


@torch.no_grad()
def side_path_statistics(
    hidden_states: torch.Tensor,
    parameters: SidePathParameters,
    options: SidePathOptions,
    *,
    alpha: float = 1.0,
    valid: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
) -> SidePathStatistics:
    """Measure what a side path does to a residual stream; the readable equations, so O(tokens slots width) memory.

    Args:
        hidden_states: h, [batch, tokens, hidden_size].
        parameters: The side path's tensors.
        options: The side path's axes.
        alpha: The strength of the perturbation. Default 1.
        valid: [batch, tokens], bool; padding is left out of the means. None: no padding.
        segment_ids: [batch, tokens], int; None: one segment.

    Returns:
        Means over the real tokens.
    """
    slots = parameters.read.shape[0] - 2 * parameters.write.shape[1]
    values, queries, logits = reference.read(hidden_states, parameters.read, slots)
    weights = reference.slot_weights(logits, valid)
    memory, _ = reference.compress(values, weights, segment_ids, scope=options.scope)
    mean = memory[..., :-1] / memory[..., -1:].clamp_min(SMALLEST_DENOMINATOR)
    readout = reference.MIXER_RULES[options.mixer](mean, queries, parameters.mixer)
    stream = hidden_states.to(readout.dtype)
    written = reference.write_back(
        stream,
        readout,
        parameters.write,
        options.writeback,
        alpha=alpha,
        gate=parameters.gate,
        cap=options.cap,
    )
    real = torch.ones_like(stream[..., 0], dtype=torch.bool) if valid is None else valid
    norm = torch.linalg.vector_norm
    relative = norm(written - stream, dim=-1) / norm(stream, dim=-1).clamp_min(torch.finfo(stream.dtype).tiny)
    gate = None
    if options.writeback == "gated":
        gate = float(gate_openings(stream, parameters.gate)[real].mean())
    shares = slot_shares(mean, queries, options, parameters)[real].mean(0)
    entropy = float(torch.special.entr(shares).sum()) / math.log(slots) if slots > 1 else 0.0
    return SidePathStatistics(float(relative[real].mean()), gate, entropy)
