"""What a side path does to its tokens, in numbers: how much it writes, through which gate, from which slots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..functional import reference, slot_reference
from ..functional.parameters import SidePathOptions, SidePathParameters, full_precision
from ..functional.writeback import gate_openings


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


@dataclass(frozen=True)
class TokenMeasures:
    """What a side path did to each token.

    Args:
        relative_norm: |h' - h| / |h|, [batch, tokens].
        gates: In [0, 1], [batch, tokens]; None where the writeback has none.
        slot_shares: The share of each slot in what a token reads; [batch, tokens, slots], 1 in sum.
    """

    relative_norm: torch.Tensor
    gates: torch.Tensor | None
    slot_shares: torch.Tensor

    @property
    def read_entropy(self) -> torch.Tensor:
        """The entropy of each token's slot shares, divided by log(slots), [batch, tokens]; 0 with a single slot."""
        return _normalised_entropy(self.slot_shares)


def _normalised_entropy(shares: torch.Tensor) -> torch.Tensor:
    """The entropy of shares, [..., slots], divided by its largest value, [...]; 0 with a single slot."""
    slots = shares.shape[-1]
    return torch.special.entr(shares).sum(-1) / math.log(slots) if slots > 1 else torch.zeros_like(shares[..., 0])


def _slot_shares(
    memory: torch.Tensor, queries: torch.Tensor, options: SidePathOptions, parameters: SidePathParameters
) -> torch.Tensor:
    """What tokens read of each slot, [batch, tokens, slots]: p for `attention` and `mlp`, |p| / sum |p| for `linear`.

    For `delta` it is |q| / sum |q|. The memory mu is [batch, tokens, slots, width], the queries q are [batch, tokens,
    channels].
    """
    if options.mixer in ("linear", "delta"):
        weights = (queries if options.mixer == "delta" else queries @ parameters.mixer[0].to(queries.dtype)).abs()
        return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    if options.mixer == "mlp":
        memory = slot_reference.remix_slots(memory, parameters.mixer)
    return slot_reference.attend_to_slots(memory, queries, parameters.mixer)


@torch.no_grad()
def token_measures(
    hidden_states: torch.Tensor,
    parameters: SidePathParameters,
    options: SidePathOptions,
    *,
    alpha: float = 1.0,
    valid: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
) -> TokenMeasures:
    """Measure what a side path does to each token; the readable equations, so O(tokens slots width) memory.

    Autocast is off inside: in half precision, a small change rounds to another one.

    Args:
        hidden_states: h, [batch, tokens, hidden_size].
        parameters: The side path's tensors.
        options: The side path's axes.
        alpha: The strength of the perturbation. Default 1.
        valid: [batch, tokens], bool; padding stays out of the memory. None: no padding.
        segment_ids: [batch, tokens], int; None: one segment.

    Returns:
        One number per token, padding included.
    """
    with full_precision(hidden_states.device.type):
        sizes = parameters.read_sizes(options.mixer)
        values, queries, logits = reference.read(hidden_states, parameters.read, sizes)
        weights = reference.enter(logits, valid, options, parameters.mixer)
        states, _ = reference.memories(values, weights, options.mixer, segment_ids, scope=options.scope)
        mean = reference.slots_of(states, options.mixer)
        readout = reference.READ_RULES[options.mixer](mean, queries, parameters.mixer)
        stream = hidden_states.to(readout.dtype)
        written = reference.write_back(stream, readout, parameters, options, alpha)
        norm = torch.linalg.vector_norm
        relative = norm(written - stream, dim=-1) / norm(stream, dim=-1).clamp_min(torch.finfo(stream.dtype).tiny)
        gates = gate_openings(stream, parameters.gate) if options.writeback == "gated" else None
        return TokenMeasures(relative, gates, _slot_shares(mean, queries, options, parameters))


def side_path_statistics(
    hidden_states: torch.Tensor,
    parameters: SidePathParameters,
    options: SidePathOptions,
    *,
    alpha: float = 1.0,
    valid: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
) -> SidePathStatistics:
    """Measure what a side path does to a residual stream; arguments as in `token_measures`.

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
    measures = token_measures(hidden_states, parameters, options, alpha=alpha, valid=valid, segment_ids=segment_ids)
    real = torch.ones_like(measures.relative_norm, dtype=torch.bool) if valid is None else valid
    return SidePathStatistics(
        relative_norm=float(measures.relative_norm[real].mean()),
        gate=None if measures.gates is None else float(measures.gates[real].mean()),
        slot_entropy=float(_normalised_entropy(measures.slot_shares[real].mean(0))),
    )
