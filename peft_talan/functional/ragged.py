"""The side path on the flat tokens of many requests: no loop over requests, and no question to the device.

Each request is cut into chunks of its own, so every chunk has one memory to go on from, and what lies inside of a
chunk is `chunked.forward_slab`. The number of chunks is bounded by the shapes alone; chunks that are not needed are
empty. The results are those of `ragged_reference` up to rounding. Gradients are not supported: it serves generation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from .chunked import CHUNK, Plan, Slab, forward_slab, probabilities
from .fused import read, read_mean, slot_weights, write_back
from .parameters import (
    SMALLEST_DENOMINATOR,
    RaggedOutput,
    SidePathOptions,
    SidePathParameters,
    full_precision,
    working_dtype,
)
from .recomputed import PIECE, remix_piece

SMALLEST_CHUNK = 8
"""Tokens a chunk where requests are short: fewer would make the products small and their number large."""


class Layout(NamedTuple):
    """Where the tokens of a call lie once each request is cut into chunks of its own.

    Args:
        chunk: Tokens a chunk.
        items: The number of chunks.
        slot: Each token's place among the items x chunk places, [tokens], int64; padding: the place after the last.
        request: Each chunk's request, [items], int64.
    """

    chunk: int
    items: int
    slot: torch.Tensor
    request: torch.Tensor


def request_of(index: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Find the request of each token (or chunk); what comes after the last request's end counts as its.

    Args:
        index: [tokens], int.
        ends: Where each request ends, [requests], int, not falling.

    Returns:
        [tokens], int64.
    """
    return torch.searchsorted(ends, index, right=True).clamp_(max=ends.shape[0] - 1)


def choose_chunk(tokens: int, requests: int, max_query_length: int) -> int:
    """Choose the tokens a chunk: a power of two near the mean length, since a request's last chunk is half empty.

    Args:
        tokens: Of the call.
        requests: Of the call.
        max_query_length: The tokens of the longest request.

    Returns:
        Between `SMALLEST_CHUNK` and `chunked.CHUNK`.
    """
    length = min(max(tokens // max(requests, 1), SMALLEST_CHUNK), max_query_length, CHUNK)
    return 1 << (length - 1).bit_length()


def lay_out(cu_seqlens: torch.Tensor, tokens: int, max_query_length: int) -> Layout:
    """Cut every request into chunks.

    Args:
        cu_seqlens: [requests + 1], int64.
        tokens: Of the call, padding included.
        max_query_length: The tokens of the longest request.

    Returns:
        The layout.
    """
    requests = cu_seqlens.shape[0] - 1
    chunk = choose_chunk(tokens, requests, max_query_length)
    items = min(tokens // chunk + requests, tokens)
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    chunk_ends = ((ends - starts + chunk - 1) // chunk).cumsum(0)
    # A request's first chunk minus its first token, so that a token's own place falls out of one addition.
    shift = F.pad(chunk_ends[:-1], (1, 0)) * chunk - starts
    token = torch.arange(tokens, device=cu_seqlens.device)
    slot = torch.where(token < ends[-1], token + shift.index_select(0, request_of(token, ends)), items * chunk)
    request = request_of(torch.arange(items, device=cu_seqlens.device), chunk_ends)
    return Layout(chunk, items, slot, request)


def _cut(values: torch.Tensor, queries: torch.Tensor, weights: torch.Tensor, state: torch.Tensor, lay: Layout) -> Slab:
    """Put the tokens into their chunks and sum the memory that each chunk finds; `Slab.final_state` is after it."""
    width = values.shape[1]
    flat = torch.cat([values, queries, weights], dim=-1)
    placed = flat.new_zeros(lay.items * lay.chunk + 1, flat.shape[1]).index_copy_(0, lay.slot, flat)
    z, q, e = placed[:-1].unflatten(0, (lay.items, lay.chunk)).split([width, width, weights.shape[1]], dim=-1)
    e = e.mT.contiguous()
    own = torch.cat([e @ z, e.sum(-1, keepdim=True)], dim=-1)
    earlier = (lay.request.unsqueeze(1) == lay.request).to(flat.dtype).tril_(-1)
    found = torch.addmm(state.index_select(0, lay.request).flatten(1), earlier, own.flatten(1)).view_as(own)
    triangle = torch.ones(1, lay.chunk, lay.chunk, dtype=flat.dtype, device=flat.device).tril_()
    d = torch.matmul(e, triangle.mT).add_(found[..., -1:]).clamp_min_(SMALLEST_DENOMINATOR)
    return Slab(z, q, e, Plan(triangle, earlier), found[..., :-1], d, found)


def _remix_mlp(slab: Slab, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The `mlp` mixer is not linear in the memory: some chunks at a time, with the memory of each of their tokens."""
    count = max(PIECE // slab.z.shape[1], 1)
    pieces = (part.split(count) for part in (slab.z, slab.q, slab.e, slab.final_state))
    readouts = [
        remix_piece(z, q, e.mT, "mlp", parameters, None, found)[0] for z, q, e, found in zip(*pieces, strict=True)
    ]
    return torch.cat(readouts)


def _memories_after(tokens: torch.Tensor, slab: Slab, lay: Layout) -> torch.Tensor:
    """The memory after each of some tokens: what its chunk found, and what the chunk put in up to the token."""
    slot = lay.slot.index_select(0, tokens).clamp_(max=lay.items * lay.chunk - 1)
    item, place = slot // lay.chunk, slot % lay.chunk
    upto = torch.arange(lay.chunk, device=tokens.device) <= place.unsqueeze(1)
    e = slab.e.index_select(0, item) * upto.unsqueeze(1)
    z = F.pad(slab.z.index_select(0, item), (0, 1), value=1.0)
    return torch.baddbmm(slab.final_state.index_select(0, item), e, z)


def _remix_one_token(
    values: torch.Tensor,
    queries: torch.Tensor,
    weights: torch.Tensor,
    mixer: str,
    parameters: tuple[torch.Tensor, ...],
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token is a request: a rank-one update of its memory and a read."""
    memory = torch.addcmul(state, weights.unsqueeze(-1), F.pad(values, (0, 1), value=1.0).unsqueeze(1))
    mean = memory[..., :-1] / memory[..., -1:].clamp_min(SMALLEST_DENOMINATOR)
    return read_mean(mean, queries.unsqueeze(1), mixer, parameters).squeeze(1), memory


def _remix_requests(
    values: torch.Tensor,
    queries: torch.Tensor,
    weights: torch.Tensor,
    mixer: str,
    parameters: tuple[torch.Tensor, ...],
    state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_query_length: int,
    snapshot_positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Requests of any lengths, in chunks: read-outs, and the memories that are wanted."""
    tokens, cu_seqlens = values.shape[0], cu_seqlens.long()
    lay = lay_out(cu_seqlens, tokens, max_query_length)
    slab = _cut(values, queries, weights, state, lay)
    if mixer == "mlp":
        remixed = _remix_mlp(slab, parameters)
    else:
        remixed = forward_slab(slab, probabilities(slab, mixer, parameters[0]))
    readout = remixed.flatten(0, 1).index_select(0, lay.slot.clamp(max=lay.items * lay.chunk - 1))
    wanted = cu_seqlens[1:] - 1 if snapshot_positions is None else snapshot_positions
    states = _memories_after(wanted.clamp(0, tokens - 1), slab, lay)
    if snapshot_positions is None:
        empty = cu_seqlens[1:] == cu_seqlens[:-1]
        states = torch.where(empty[:, None, None], state, states)
    return readout, states


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
    """Run a side path on requests laid end to end; see `ragged_reference.ragged_side_path`."""
    dtype = working_dtype(hidden_states.dtype)
    with full_precision(hidden_states.device.type):
        stream, before = hidden_states.to(dtype), state.to(dtype)
        slots = parameters.read.shape[0] - 2 * parameters.write.shape[1]
        values, queries, logits = read(stream, parameters.read, slots)
        mixer = tuple(tensor.to(dtype) for tensor in parameters.mixer)
        call = (values, queries, slot_weights(logits, None), options.mixer, mixer, before)
        if cu_seqlens is None:
            readout, states = _remix_one_token(*call)
            if snapshot_positions is not None:
                states = states.index_select(0, snapshot_positions.clamp(0, states.shape[0] - 1))
        else:
            readout, states = _remix_requests(*call, cu_seqlens, max_query_length, snapshot_positions)
        if isinstance(alpha, torch.Tensor):
            readout, alpha = readout * alpha.to(dtype).unsqueeze(1), 1.0
        written = write_back(
            stream,
            readout,
            parameters.write,
            options.writeback,
            alpha=alpha,
            gate=parameters.gate,
            cap=options.cap,
        )
    return RaggedOutput(written.to(hidden_states.dtype), states.to(state.dtype))
