"""The side path as few and large operations: the fast twin of `peft_talan.functional.reference`.

Same names, same signatures, same results up to rounding. The causal memory never exists as a [tokens, slots, width]
tensor (see `chunked`), and one decoded token is a rank-one update of the memory and a read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from . import reference
from .chunked_autograd import ChunkwiseRemix
from .parameters import (
    NORM_EPSILON,
    SMALLEST_DENOMINATOR,
    SOFT_CAP,
    SidePathOptions,
    SidePathOutput,
    SidePathParameters,
    full_precision,
    working_dtype,
)
from .recomputed import recomputed_remix
from .writeback import WRITEBACK_RULES as READABLE_RULES
from .writeback import scale_gradient


def _inverse_rms(hidden_states: torch.Tensor) -> torch.Tensor:
    """1 / sqrt(mean(h^2) + eps) as [batch, tokens, 1], without a squared copy of h."""
    length = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True)
    return torch.rsqrt(length.square() / hidden_states.shape[-1] + NORM_EPSILON)


def read(hidden_states: torch.Tensor, weight: torch.Tensor, slots: int) -> tuple[torch.Tensor, ...]:
    """Project the normalised residual stream; see `reference.read`.

    The norm of a token is one number, so it scales the small projection instead of the hidden state.
    """
    dtype = working_dtype(hidden_states.dtype)
    hidden_states = hidden_states.to(dtype)
    projected = F.linear(hidden_states, weight.to(dtype)) * _inverse_rms(hidden_states)
    width = (weight.shape[0] - slots) // 2
    return projected.split([width, width, slots], dim=-1)


def slot_weights(logits: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Turn slot logits into positive weights; see `reference.slot_weights`."""
    weights = torch.exp(SOFT_CAP * torch.tanh(logits / SOFT_CAP))
    return weights if valid is None else weights * valid.unsqueeze(-1)


def read_mean(
    mean: torch.Tensor, queries: torch.Tensor, mixer: str, parameters: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Read one memory by all tokens of a call: a decoded token's, or a bidirectional segment's.

    Args:
        mean: mu, [batch, slots, width].
        queries: q, [batch, tokens, width].
        mixer: One of `reference.MIXER_RULES`.
        parameters: The mixer's tensors.

    Returns:
        r, [batch, tokens, width].
    """
    parameters = tuple(tensor.to(mean.dtype) for tensor in parameters)
    if mixer == "linear":
        return torch.bmm(queries @ parameters[0], mean)
    if mixer == "mlp":
        mean = reference.remix_slots(mean, parameters)
    scores = torch.baddbmm(parameters[0], queries, mean.mT, alpha=1 / math.sqrt(queries.shape[-1]))
    return torch.bmm(scores.softmax(-1), mean)


class Remix(NamedTuple):
    """The arguments of a remix, which every rule takes; see `reference.remix`.

    Args:
        values: z, [batch, tokens, width].
        queries: q, [batch, tokens, width].
        weights: e, [batch, tokens, slots].
        mixer: One of `reference.MIXER_RULES`.
        parameters: The mixer's tensors.
        segment_ids: [batch, tokens] or None.
        state: The memory of earlier tokens, [batch, slots, width + 1]; None: empty.
    """

    values: torch.Tensor
    queries: torch.Tensor
    weights: torch.Tensor
    mixer: str
    parameters: tuple[torch.Tensor, ...]
    segment_ids: torch.Tensor | None
    state: torch.Tensor | None

    @property
    def state_or_zeros(self) -> torch.Tensor:
        """The memory of earlier tokens, or an empty one."""
        if self.state is not None:
            return self.state
        slots, width = self.weights.shape[2], self.values.shape[2]
        return self.values.new_zeros(self.values.shape[0], slots, width + 1)

    def read(self, memory: torch.Tensor) -> torch.Tensor:
        """Read N and D, [batch, slots, width + 1], by all tokens: r, [batch, tokens, width]."""
        width = self.queries.shape[-1]
        mean = memory[..., :width] / memory[..., width:].clamp_min(SMALLEST_DENOMINATOR)
        return read_mean(mean.to(self.queries.dtype), self.queries, self.mixer, self.parameters)


def _remix_one_token(call: Remix) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank-one update of the memory and a read."""
    padded, state = F.pad(call.values, (0, 1), value=1.0), call.state
    if state is None:
        memory = call.weights.mT * padded
    else:
        if call.segment_ids is not None:
            state = state * (call.segment_ids == 0).unsqueeze(-1)
        memory = torch.addcmul(state, call.weights.mT, padded)
    return call.read(memory), memory


def _remix_bidirectional(call: Remix) -> tuple[torch.Tensor, torch.Tensor]:
    """One memory a segment; without segments, one for all tokens."""
    values, queries, weights, mixer, parameters, segment_ids, state = call
    padded = F.pad(values, (0, 1), value=1.0)
    if segment_ids is None:
        memory = weights.mT @ padded
        memory = memory if state is None else memory + state
        return call.read(memory), memory
    batch, tokens, slots = weights.shape
    # There are at most as many segments as tokens, and segment 0. Their number itself is on the device.
    row = torch.arange(batch, device=segment_ids.device).unsqueeze(1)
    index = (segment_ids + row * (tokens + 1)).flatten()
    contributions = (weights.unsqueeze(-1) * padded.unsqueeze(-2)).flatten(0, 1)
    sums = contributions.new_zeros(batch * (tokens + 1), *contributions.shape[1:]).index_add(0, index, contributions)
    seen = sums.index_select(0, index).view(batch, tokens, slots, -1)
    if state is not None:
        seen = seen + state.unsqueeze(1) * (segment_ids == 0)[..., None, None]
    mean = seen[..., :-1] / seen[..., -1:].clamp_min(SMALLEST_DENOMINATOR)
    return reference.MIXER_RULES[mixer](mean.to(queries.dtype), queries, parameters), seen[:, -1]


def memory_after(
    values: torch.Tensor, weights: torch.Tensor, segment_ids: torch.Tensor | None, state: torch.Tensor | None
) -> torch.Tensor:
    """The memory after the last token: all that its segment has put in."""
    if segment_ids is not None:
        last = segment_ids[:, -1:]
        weights = weights * (segment_ids == last).unsqueeze(-1)
        state = None if state is None else state * (last == 0).unsqueeze(-1)
    memory = weights.mT @ F.pad(values, (0, 1), value=1.0)
    return memory if state is None else memory + state


def _remix_chunkwise(call: Remix) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` and `linear`, which are linear in N: all in matrix products."""
    parameter = call.parameters[0].to(call.values.dtype)
    readouts, final_state = ChunkwiseRemix.apply(
        call.values, call.queries, call.weights, call.state_or_zeros, call.segment_ids, call.mixer, parameter
    )
    return readouts, final_state


def _remix_recomputed(call: Remix) -> tuple[torch.Tensor, torch.Tensor]:
    """`mlp`, which is not linear in the memory: chunk by chunk, computed again in backward."""
    values, queries, weights, mixer, parameters, segment_ids, _ = call
    return recomputed_remix(values, queries, weights, mixer, parameters, segment_ids, call.state_or_zeros)


MIXER_RULES: dict[str, Callable[[Remix], tuple[torch.Tensor, torch.Tensor]]] = {
    "attention": _remix_chunkwise,
    "linear": _remix_chunkwise,
    "mlp": _remix_recomputed,
}


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
    call = Remix(values, queries, weights, mixer, parameters, segment_ids, state)
    if scope == "bidirectional":
        return _remix_bidirectional(call)
    if values.shape[1] == 1:
        return _remix_one_token(call)
    rule = MIXER_RULES[mixer]
    if state is None or state.dtype is values.dtype:
        return rule(call)
    # A state may be more precise than the tokens: it is rounded for the read, and added to as it is.
    readouts, _ = rule(call._replace(state=state.to(values.dtype)))
    return readouts, memory_after(values, weights, segment_ids, state)


def change_gated(
    hidden_states: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor | None, cap: float
) -> torch.Tensor:
    """Write through one gate a token; see `writeback.change_gated`."""
    if gate is None:
        raise ValueError("gate=None, but the 'gated' writeback needs its row of shape [hidden_size + 1]")
    # A copy, which lies aligned: by a tensor that is mapped from a file, the product would round as it lies there.
    gate = gate.to(hidden_states.dtype, copy=True)
    opening = F.linear(hidden_states, gate[:-1].unsqueeze(0)) * _inverse_rms(hidden_states) + gate[-1]
    return torch.sigmoid(opening) * delta


WRITEBACK_RULES: dict[str, Callable[..., torch.Tensor]] = {**READABLE_RULES, "gated": change_gated}


def write_back(
    hidden_states: torch.Tensor,
    readout: torch.Tensor,
    weight: torch.Tensor,
    writeback: str,
    *,
    alpha: float = 1.0,
    gate: torch.Tensor | None = None,
    cap: float = 0.1,
    grad_scale: float = 1.0,
) -> torch.Tensor:
    """Change the residual stream by the read-out; see `reference.write_back`."""
    dtype = readout.dtype
    stream, weight = hidden_states.to(dtype), weight.to(dtype)
    if writeback == "add" and grad_scale == 1.0:
        rows = torch.addmm(stream.flatten(0, -2), readout.flatten(0, -2), weight.T, alpha=alpha)
        return rows.view_as(hidden_states).to(hidden_states.dtype)
    delta = F.linear(readout, weight)
    if alpha != 1.0:
        delta = delta * alpha
    change = WRITEBACK_RULES[writeback](stream, delta, gate, cap)
    return (stream + scale_gradient(change, grad_scale)).to(hidden_states.dtype)


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
        slots = parameters.read.shape[0] - 2 * parameters.write.shape[1]
        stream = hidden_states.to(working_dtype(hidden_states.dtype))
        values, queries, logits = read(stream, parameters.read, slots)
        weights = slot_weights(logits, valid)
        readout, final_state = remix(
            values,
            queries,
            weights,
            options.mixer,
            parameters.mixer,
            segment_ids,
            state,
            options.scope,
        )
        if training and options.dropout:
            readout = F.dropout(readout, options.dropout)
        written = write_back(
            stream,
            readout,
            parameters.write,
            options.writeback,
            alpha=alpha,
            gate=parameters.gate,
            cap=options.cap,
            grad_scale=options.grad_scale,
        ).to(hidden_states.dtype)
    return SidePathOutput(written, final_state, weights, values)
