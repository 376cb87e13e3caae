"""The side path on the flat tokens of many requests, one request after the other: the oracle of `ragged`."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from . import reference
from .parameters import RaggedOutput, SidePathOptions, SidePathParameters
from .stacked import StackedParameters


def ragged_side_path(
    hidden_states: torch.Tensor,
    parameters: SidePathParameters,
    options: SidePathOptions,
    *,
    cu_seqlens: torch.Tensor | None,
    state: torch.Tensor,
    max_query_length: int,
    snapshot_positions: torch.Tensor | None = None,
    alpha: float | torch.Tensor = 1.0,
) -> RaggedOutput:
    """Run a side path with a causal memory on requests of different lengths, laid end to end.

    Args:
        hidden_states: h, [tokens, hidden_size].
        parameters: The side path's tensors.
        options: The side path's axes.
        cu_seqlens: Where each request starts and the last one ends, [requests + 1], int, not falling and starting
            at 0. Equal neighbours: a request without tokens. Tokens from the last number on are padding. None: each
            token is a request.
        state: The state before each request's first token, [requests, *state_shape].
        max_query_length: The number of tokens of the longest request, or more, known without asking the device.
        snapshot_positions: The tokens after which the state is returned, [snapshots], int64; for a number that is no
            token's, some state. None: after each request's last token. Default None.
        alpha: The strength of the perturbation, or that of each token's, [tokens]. Default 1.

    Returns:
        h' and the states; a request without tokens keeps the one before.
    """
    if cu_seqlens is None:
        cu_seqlens = torch.arange(hidden_states.shape[0] + 1)
    written = hidden_states.clone()
    snapshots = state.new_zeros(hidden_states.shape[0] + 1, *state.shape[1:])
    after = state.clone()
    bounds = cu_seqlens.tolist()
    for request, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        before = state[request : request + 1]
        strength = alpha[start:end].unsqueeze(1) if isinstance(alpha, torch.Tensor) else alpha
        output = reference.side_path(hidden_states[None, start:end], parameters, options, alpha=strength, state=before)
        written[start:end] = output.hidden_states[0]
        weights, values = output.record[:2]
        snapshots[start:end] = reference.memories(values, weights, options.mixer, state=before)[0][0]
        after[request] = snapshots[end - 1]
    if snapshot_positions is None:
        return RaggedOutput(written, after)
    tokens = torch.where(
        (snapshot_positions >= 0) & (snapshot_positions < bounds[-1]), snapshot_positions, hidden_states.shape[0]
    )
    return RaggedOutput(written, snapshots[tokens])


def ragged_adapters(
    hidden_states: torch.Tensor,
    parameters: StackedParameters,
    options: SidePathOptions,
    *,
    adapters: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    state: torch.Tensor,
    max_query_length: int,
    snapshot_positions: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
) -> RaggedOutput:
    """Run the side paths of several adapters, each request's own, on requests laid end to end.

    Args:
        hidden_states: As in `ragged_side_path`, and so are all that are not named here.
        parameters: The adapters' tensors.
        options: The axes, without dropout and with the cap of `parameters`.
        adapters: Each token's adapter, [tokens], int64, equal inside of a request; -1: none, and h' is h.
        cu_seqlens: Where requests start and end.
        state: The states before the requests.
        max_query_length: The tokens of the longest request, or more.
        snapshot_positions: The tokens after which the state is returned; where a token has no adapter, some state.
        alpha: What scales each token's perturbation beside its adapter's strength, [tokens]. Default None: nothing.

    Returns:
        h' and the states.
    """
    outputs = []
    for index, trained in enumerate(parameters.alpha.tolist()):
        gate = None if parameters.gate is None else parameters.gate[index]
        mixer = tuple(tensor[index] for tensor in parameters.mixer)
        one = SidePathParameters(parameters.read[index], mixer, parameters.write[index].T, gate)
        output = ragged_side_path(
            hidden_states,
            one,
            replace(options, cap=float(parameters.cap[index])),
            cu_seqlens=cu_seqlens,
            state=state,
            max_query_length=max_query_length,
            snapshot_positions=snapshot_positions,
            alpha=trained if alpha is None else trained * alpha,
        )
        outputs.append(output)
    written, states = hidden_states.clone(), outputs[0].states.clone()
    bounds = torch.arange(len(hidden_states) + 1) if cu_seqlens is None else cu_seqlens
    positions = bounds[1:] - 1 if snapshot_positions is None else snapshot_positions
    at_snapshots = adapters[positions.clamp(0, len(adapters) - 1)]
    for index, output in enumerate(outputs):
        written[adapters == index] = output.hidden_states[adapters == index]
        states[at_snapshots == index] = output.states[at_snapshots == index]
    return RaggedOutput(written, states)
