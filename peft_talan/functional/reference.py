"""The equations of the side path, readable and in any dtype: the oracle of the operators in `fused`.

The paper (arXiv 2606.06902) fixes the stages; it prints no equations. Those below are this project's reading of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from . import delta_reference, slot_reference
from .delta import record_of
from .parameters import (
    NORM_EPSILON,
    SidePathOptions,
    SidePathOutput,
    SidePathParameters,
    mean_of,
    working_dtype,
)
from .writeback import WRITEBACK_RULES


def read(hidden_states: torch.Tensor, weight: torch.Tensor, sizes: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    """Project the normalised residual stream to values, queries and logits.

    `x = RMSNorm(h); [z, q, a] = x W_read`. The norm has no weight of its own: `W_read` would absorb it.

    Args:
        hidden_states: h, [batch, tokens, hidden_size], any float dtype.
        weight: `W_read`, [sum(sizes), hidden_size].
        sizes: The channels of each part; see `SidePathParameters.read_sizes`.

    Returns:
        z, q and a, each [batch, tokens, channels], at least float32.
    """
    dtype = working_dtype(hidden_states.dtype)
    hidden_states = hidden_states.to(dtype)
    normalised = hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + NORM_EPSILON)
    return (normalised @ weight.to(dtype).T).split(sizes, dim=-1)


READ_RULES: dict[str, Callable[..., torch.Tensor]] = {
    "attention": slot_reference.mix_attention,
    "linear": slot_reference.mix_linear,
    "mlp": slot_reference.mix_mlp,
    "delta": delta_reference.mix_delta,
}
"""How each mixer reads the memory that a token sees: (mu, or S of `delta`, q, the mixer's tensors) to r."""


def enter(
    logits: torch.Tensor, valid: torch.Tensor | None, options: SidePathOptions, parameters: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Turn logits into what a token enters the memory by: `slot_reference.slot_weights`, of `delta` `delta_weights`.

    Args:
        logits: a, [batch, tokens, channels].
        valid: [batch, tokens], bool; False keeps a token (padding) out of the memory. Numbers: how many tokens each
            counts for. None: all are real.
        options: The side path's axes: `mixer` and `soft_cap`.
        parameters: The mixer's tensors.

    Returns:
        The weights, [batch, tokens, channels].
    """
    if options.mixer == "delta":
        return delta_reference.delta_weights(logits, parameters[0], valid)
    return slot_reference.slot_weights(logits, valid, options.soft_cap)


def memories(
    values: torch.Tensor,
    weights: torch.Tensor,
    mixer: str,
    segment_ids: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    scope: str = "causal",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Update the memory by each token: `slot_reference.compress`, or `delta_reference.compress` of `delta`.

    Args:
        values: As in `remix`, as are the others.
        weights: As in `remix`.
        mixer: As in `remix`.
        segment_ids: As in `remix`.
        state: As in `remix`.
        scope: As in `remix`.

    Returns:
        The states that each token sees, [batch, tokens, *state_shape], and that after the last token.
    """
    if mixer == "delta":
        return delta_reference.compress(values, weights, segment_ids, state)
    return slot_reference.compress(values, weights, segment_ids, state, scope)


def slots_of(states: torch.Tensor, mixer: str) -> torch.Tensor:
    """What a mixer reads of states, [..., slots, width]: mu, or of `delta` the state itself."""
    return states if mixer == "delta" else mean_of(states)


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
    """Compress the sequence into the latent memory and read it at every token.

    `mu[t, m] = N[t, m] / D[t, m]` (zero while nothing has entered the slot), then the mixer's read rule.

    Args:
        values: z, [batch, tokens, width].
        queries: q, [batch, tokens, width]; of `delta` [batch, tokens, slots].
        weights: What `enter` returns: e, [batch, tokens, slots]; of `delta` [batch, tokens, 3 + slots].
        mixer: One of `READ_RULES`.
        parameters: The mixer's tensors, see `SidePathParameters`.
        segment_ids: As in `slot_reference.compress`.
        state: As there; of `delta` [batch, slots, width].
        scope: As there.

    Returns:
        r, [batch, tokens, width], and the memory after the last token, as the state.
    """
    states, final_state = memories(values, weights, mixer, segment_ids, state, scope)
    # A state may be more precise than the tokens: a long sum needs it, its mean does not.
    return READ_RULES[mixer](slots_of(states, mixer).to(values.dtype), queries, parameters), final_state


def scale_gradient(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """Pass a tensor on as it is and multiply the gradient that comes back by `scale`."""
    return tensor.detach() + scale * (tensor - tensor.detach())


def write_back(
    hidden_states: torch.Tensor,
    readout: torch.Tensor,
    parameters: SidePathParameters,
    options: SidePathOptions,
    alpha: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """Change the residual stream by the read-out: `delta = alpha r W_write^T`, then the writeback's rule.

    Args:
        hidden_states: h, [batch, tokens, hidden_size].
        readout: r, [batch, tokens, width].
        parameters: The side path's tensors: `write`, and `gate` for the `gated` rule.
        options: The side path's axes: `writeback`, `cap` and `grad_scale`.
        alpha: The strength of the perturbation, or that of each token's, [..., tokens, 1]. Default 1.

    Returns:
        h', [batch, tokens, hidden_size], in the dtype of the hidden states.
    """
    stream = hidden_states.to(readout.dtype)
    delta = alpha * (readout @ parameters.write.to(readout.dtype).T)
    change = WRITEBACK_RULES[options.writeback](stream, delta, parameters.gate, options.cap)
    return (stream + scale_gradient(change, options.grad_scale)).to(hidden_states.dtype)


def side_path(
    hidden_states: torch.Tensor,
    parameters: SidePathParameters,
    options: SidePathOptions,
    *,
    alpha: float | torch.Tensor = 1.0,
    valid: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    training: bool = False,
) -> SidePathOutput:
    """Run a whole side path: read, compress, mix, write back.

    Args:
        hidden_states: h, [batch, tokens, hidden_size].
        parameters: The side path's tensors.
        options: The side path's axes.
        alpha: The strength of the perturbation, or that of each token's, [..., tokens, 1]. Default 1.
        valid: [batch, tokens], bool, or numbers of tokens; None: no padding.
        segment_ids: [batch, tokens], int; None: one segment.
        state: The memory of earlier tokens, [batch, *state_shape]; None: empty.
        training: Whether dropout is active. Default False.

    Returns:
        h', and state and record, from which a later call continues.
    """
    values, queries, logits = read(hidden_states, parameters.read, parameters.read_sizes(options.mixer))
    weights = enter(logits, valid, options, parameters.mixer)
    readout, final_state = remix(
        values, queries, weights, options.mixer, parameters.mixer, segment_ids, state, options.scope
    )
    readout = F.dropout(readout, options.dropout, training)
    written = write_back(hidden_states, readout, parameters, options, alpha)
    return SidePathOutput(written, final_state, record_of(options.mixer, weights, values, segment_ids))
