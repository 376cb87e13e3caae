"""The side path as few and large operations: the fast twin of `peft_talan.functional.reference`.

`read`, `remix`, `write_back` and `side_path` take the arguments of their readable twins and return the same up to
rounding; `alpha` is a number here. The causal memory never exists as a [tokens, slots, width] tensor of all tokens
(see `chunked`, `recomputed` and `delta`). One decoded token is a rank-one update of the state and a read.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from . import delta, reference, slot_reference
from .chunked_autograd import ChunkwiseRemix
from .delta import record_of
from .parameters import (
    NORM_EPSILON,
    RemixInputs,
    SidePathOptions,
    SidePathOutput,
    SidePathParameters,
    full_precision,
    mean_of,
    working_dtype,
)
from .recomputed import recomputed_remix
from .records import memory_after as memory_after
from .writeback import WRITEBACK_RULES, required_gate, scale_gradient


def inverse_rms(hidden_states: torch.Tensor) -> torch.Tensor:
    """1 / sqrt(mean(h^2) + eps) as [batch, tokens, 1], without a squared copy of h."""
    length = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True)
    return torch.rsqrt(length.square() / hidden_states.shape[-1] + NORM_EPSILON)


def read(hidden_states: torch.Tensor, weight: torch.Tensor, sizes: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    """Project the normalised residual stream; see `reference.read`."""
    dtype = working_dtype(hidden_states.dtype)
    hidden_states = hidden_states.to(dtype)
    # The norm of a token is one number, so it scales the small projection instead of the hidden state.
    projected = F.linear(hidden_states, weight.to(dtype)) * inverse_rms(hidden_states)
    return projected.split(sizes, dim=-1)


def read_mean(
    mean: torch.Tensor, queries: torch.Tensor, mixer: str, parameters: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Read one memory by all tokens of a call: a decoded token's, or a bidirectional segment's.

    Args:
        mean: mu, [batch, slots, width].
        queries: q, [batch, tokens, width].
        mixer: One of `reference.READ_RULES`.
        parameters: The mixer's tensors.

    Returns:
        r, [batch, tokens, width].
    """
    parameter = parameters[0].to(mean.dtype)
    if mixer == "linear":
        return torch.bmm(queries @ parameter, mean)
    if mixer == "mlp":
        mean = slot_reference.remix_slots(mean, parameters)
    scores = torch.baddbmm(parameter, queries, mean.mT, alpha=1 / math.sqrt(queries.shape[-1]))
    return torch.bmm(scores.softmax(-1), mean)


def _read_state(inputs: RemixInputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one state, [batch, slots, width + 1], by all tokens: r, [batch, tokens, width], and the state."""
    _, queries, _, mixer, parameters, _, _ = inputs
    return read_mean(mean_of(state).to(queries.dtype), queries, mixer, parameters), state


def remix_one_token(inputs: RemixInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank-one update of the state and a read."""
    values, _, weights, _, _, segment_ids, state = inputs
    column, padded = weights.mT, F.pad(values, (0, 1), value=1.0)
    if state is None:
        return _read_state(inputs, column * padded)
    if segment_ids is not None:
        state = state * (segment_ids == 0).unsqueeze(-1)
    return _read_state(inputs, torch.addcmul(state, column, padded))


def _remix_bidirectional(inputs: RemixInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """One state per segment; without segments, one for all tokens."""
    values, queries, weights, mixer, parameters, segment_ids, state = inputs
    if segment_ids is None:
        return _read_state(inputs, memory_after(values, weights, None, state))
    batch, tokens, slots = weights.shape
    # There are at most as many segments as tokens, and segment 0. Their number itself is on the device.
    row = torch.arange(batch, device=segment_ids.device).unsqueeze(1)
    index = (segment_ids + row * (tokens + 1)).flatten()
    contributions = (weights.unsqueeze(-1) * F.pad(values, (0, 1), value=1.0).unsqueeze(-2)).flatten(0, 1)
    sums = contributions.new_zeros(batch * (tokens + 1), *contributions.shape[1:]).index_add(0, index, contributions)
    seen = sums.index_select(0, index).view(batch, tokens, slots, -1)
    if state is not None:
        seen = seen + state.unsqueeze(1) * (segment_ids == 0)[..., None, None]
    return reference.READ_RULES[mixer](mean_of(seen).to(queries.dtype), queries, parameters), seen[:, -1]


def _remix_chunkwise(inputs: RemixInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` and `linear`, which are linear in N: all in matrix products."""
    values, queries, weights, mixer, parameters, segment_ids, state = inputs
    parameter = parameters[0].to(values.dtype)
    readouts, final_state = ChunkwiseRemix.apply(values, queries, weights, state, segment_ids, mixer, parameter)
    return readouts, final_state


REMIX_RULES: dict[str, Callable[[RemixInputs], tuple[torch.Tensor, torch.Tensor]]] = {
    "attention": _remix_chunkwise,
    "linear": _remix_chunkwise,
    "mlp": recomputed_remix,
}
"""How each mixer runs over a causal sequence: inputs, whose state is never None, to read-outs and final state."""


def remix(
    values: torch.Tensor,
    queries: torch.Tensor,
    weights: torch.Tensor,
    mixer: str,
    parameters: tuple[torch.Tensor, ...],
    segment_ids: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    scope: str = "causal",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compress the sequence into the latent memory and read it at every token; see `reference.remix`."""
    if mixer == "delta":
        return delta.remix(values, queries, weights, segment_ids, state)
    batch, tokens, slots = weights.shape
    if scope == "bidirectional" or tokens == 1:
        rule = _remix_bidirectional if scope == "bidirectional" else remix_one_token
        return rule(RemixInputs(values, queries, weights, mixer, parameters, segment_ids, state))
    # A state may be more precise than the tokens: it is rounded for the read, and added to as it is.
    rounded = values.new_zeros(batch, slots, values.shape[2] + 1) if state is None else state.to(values.dtype)
    inputs = RemixInputs(values, queries, weights, mixer, parameters, segment_ids, rounded)
    readouts, final_state = REMIX_RULES[mixer](inputs)
    if state is not None and state.dtype is not values.dtype:
        final_state = memory_after(values, weights, segment_ids, state)
    return readouts, final_state


def _gate_openings(hidden_states: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """`writeback.gate_openings` as [batch, tokens, 1], without a normalised copy of h."""
    # A copy, which lies aligned: by a tensor that is mapped from a file, the product would round as it lies there.
    gate = required_gate(gate).to(hidden_states.dtype, copy=True)
    opening = F.linear(hidden_states, gate[:-1].unsqueeze(0)) * inverse_rms(hidden_states) + gate[-1]
    return torch.sigmoid(opening)


def write_back(
    hidden_states: torch.Tensor,
    readout: torch.Tensor,
    parameters: SidePathParameters,
    options: SidePathOptions,
    alpha: float = 1.0,
) -> torch.Tensor:
    """Change the residual stream by the read-out; see `reference.write_back`."""
    stream, weight = hidden_states.to(readout.dtype), parameters.write.to(readout.dtype)
    if options.writeback == "add" and options.grad_scale == 1.0:
        # Product, strength and addition in one operation.
        rows = torch.addmm(stream.flatten(0, -2), readout.flatten(0, -2), weight.T, alpha=alpha)
        return rows.view_as(hidden_states).to(hidden_states.dtype)
    delta = F.linear(readout, weight)
    if alpha != 1.0:
        delta = delta * alpha
    if options.writeback == "gated":
        change = _gate_openings(stream, parameters.gate) * delta
    else:
        change = WRITEBACK_RULES[options.writeback](stream, delta, parameters.gate, options.cap)
    return (stream + scale_gradient(change, options.grad_scale)).to(hidden_states.dtype)


def _needs_the_reference(hidden_states: torch.Tensor) -> bool:
    """Whether only the readable equations can do it: the backward pass of the fused ones is written by hand.

    That is the case under `torch.func` (vmap, grad, jvp), in forward mode, for a graph that `torch.export` makes for
    any length, and where there is nothing to compute.
    """
    if torch.compiler.is_compiling():
        return bool(getattr(torch.compiler, "is_exporting", bool)())  # PyTorch 2.6 can't tell
    # No public function says whether a transform is active.
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or hidden_states.numel() == 0


def side_path(
    hidden_states: torch.Tensor,
    parameters: SidePathParameters,
    options: SidePathOptions,
    *,
    alpha: float = 1.0,
    valid: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    training: bool = False,
) -> SidePathOutput:
    """Run a whole side path: read, compress, mix, write back; see `reference.side_path`."""
    with full_precision(hidden_states.device.type):
        if _needs_the_reference(hidden_states):
            return reference.side_path(
                hidden_states,
                parameters,
                options,
                alpha=alpha,
                valid=valid,
                segment_ids=segment_ids,
                state=state,
                training=training,
            )
        stream = hidden_states.to(working_dtype(hidden_states.dtype))
        values, queries, logits = read(stream, parameters.read, parameters.read_sizes(options.mixer))
        weights = reference.enter(logits, valid, options, parameters.mixer)
        readout, final_state = remix(
            values, queries, weights, options.mixer, parameters.mixer, segment_ids, state, options.scope
        )
        if training and options.dropout:
            readout = F.dropout(readout, options.dropout)
        written = write_back(stream, readout, parameters, options, alpha).to(hidden_states.dtype)
    return SidePathOutput(written, final_state, record_of(options.mixer, weights, values, segment_ids))
