"""The side path on the flat tokens of many requests: no loop over requests, and no question to the device.

Each request is cut into chunks of its own, so every chunk has one memory to go on from, and what lies inside of a
chunk is `chunked.forward_tile`. The number of chunks is bounded by the shapes alone; chunks that are not needed are
empty. The results are those of `ragged_reference` up to rounding. Gradients are not supported: it serves generation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from .chunked import CHUNK_SIZE, ChunkMasks, Tile, forward_tile, probabilities
from .fused import read, read_mean, slot_weights, write_back
from .parameters import (
    SMALLEST_DENOMINATOR,
    RaggedOutput,
    SidePathOptions,
    SidePathParameters,
    full_precision,
    working_dtype,
)
from .recomputed import TILE_TOKENS, remix_tile

SMALLEST_CHUNK_SIZE = 8
"""Tokens per chunk where requests are short: fewer would make the products small and their number large."""


class ChunkLayout(NamedTuple):
    """Where the tokens of a call lie once each request is cut into chunks of its own.

    Args:
        chunk_size: Tokens per chunk.
        num_chunks: The number of chunks.
        place: Each token's among the num_chunks x chunk_size places, [tokens], int64; padding: the one after the last.
        request: Each chunk's request, [num_chunks], int64.
    """

    chunk_size: int
    num_chunks: int
    place: torch.Tensor
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


def choose_chunk_size(tokens: int, requests: int, max_query_length: int) -> int:
    """Choose the tokens per chunk: a power of two near the mean length, since a request's last chunk is half empty.

    Args:
        tokens: Of the call.
        requests: Of the call.
        max_query_length: The tokens of the longest request.

    Returns:
        Between `SMALLEST_CHUNK_SIZE` and `chunked.CHUNK_SIZE`.
    """
    length = min(max(tokens // max(requests, 1), SMALLEST_CHUNK_SIZE), max_query_length, CHUNK_SIZE)
    return 1 << (length - 1).bit_length()


def lay_out(cu_seqlens: torch.Tensor, tokens: int, max_query_length: int) -> ChunkLayout:
    """Cut every request into chunks.

    Args:
        cu_seqlens: [requests + 1], int64.
        tokens: Of the call, padding included.
        max_query_length: The tokens of the longest request.

    Returns:
        The layout.
    """
    requests = cu_seqlens.shape[0] - 1
    chunk_size = choose_chunk_size(tokens, requests, max_query_length)
    num_chunks = min(tokens // chunk_size + requests, tokens)
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    chunk_ends = ((ends - starts + chunk_size - 1) // chunk_size).cumsum(0)
    # A request's first chunk minus its first token, so that a token's own place falls out of one addition.
    shift = F.pad(chunk_ends[:-1], (1, 0)) * chunk_size - starts
    token = torch.arange(tokens, device=cu_seqlens.device)
    place = torch.where(
        token < ends[-1], token + shift.index_select(0, request_of(token, ends)), num_chunks * chunk_size
    )
    request = request_of(torch.arange(num_chunks, device=cu_seqlens.device), chunk_ends)
    return ChunkLayout(chunk_size, num_chunks, place, request)


def _cut(
    values: torch.Tensor, queries: torch.Tensor, weights: torch.Tensor, state: torch.Tensor, layout: ChunkLayout
) -> Tile:
    """Put the tokens into their chunks and sum the state at the start of each chunk, `Tile.final_state`."""
    width = values.shape[1]
    flat = torch.cat([values, queries, weights], dim=-1)
    placed = flat.new_zeros(layout.num_chunks * layout.chunk_size + 1, flat.shape[1]).index_copy_(
        0, layout.place, flat
    )
    z, q, e = (
        placed[:-1]
        .unflatten(0, (layout.num_chunks, layout.chunk_size))
        .split([width, width, weights.shape[1]], dim=-1)
    )
    e = e.mT.contiguous()
    chunk_sums = torch.cat([e @ z, e.sum(-1, keepdim=True)], dim=-1)
    earlier = (layout.request.unsqueeze(1) == layout.request).to(flat.dtype).tril_(-1)
    chunk_states = torch.addmm(
        state.index_select(0, layout.request).flatten(1), earlier, chunk_sums.flatten(1)
    ).view_as(chunk_sums)
    triangle = torch.ones(1, layout.chunk_size, layout.chunk_size, dtype=flat.dtype, device=flat.device).tril_()
    d = torch.matmul(e, triangle.mT).add_(chunk_states[..., -1:]).clamp_min_(SMALLEST_DENOMINATOR)
    return Tile(z, q, e, ChunkMasks(triangle, earlier), chunk_states[..., :-1], d, chunk_states)


def _remix_mlp(tile: Tile, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The `mlp` mixer is not linear in the memory: some chunks at a time, with the memory of each of their tokens."""
    count = max(TILE_TOKENS // tile.z.shape[1], 1)
    pieces = (part.split(count) for part in (tile.z, tile.q, tile.e, tile.final_state))
    readouts = [
        remix_tile(z, q, e.mT, "mlp", parameters, None, chunk_states)[0]
        for z, q, e, chunk_states in zip(*pieces, strict=True)
    ]
    return torch.cat(readouts)


def _memories_after(tokens: torch.Tensor, tile: Tile, layout: ChunkLayout) -> torch.Tensor:
    """The state after each of some tokens: that at the start of its chunk, and what the chunk put in up to the token."""
    index = layout.place.index_select(0, tokens).clamp_(max=layout.num_chunks * layout.chunk_size - 1)
    chunk, place = index // layout.chunk_size, index % layout.chunk_size
    upto = torch.arange(layout.chunk_size, device=tokens.device) <= place.unsqueeze(1)
    e = tile.e.index_select(0, chunk) * upto.unsqueeze(1)
    z = F.pad(tile.z.index_select(0, chunk), (0, 1), value=1.0)
    return torch.baddbmm(tile.final_state.index_select(0, chunk), e, z)


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
    layout = lay_out(cu_seqlens, tokens, max_query_length)
    tile = _cut(values, queries, weights, state, layout)
    if mixer == "mlp":
        remixed = _remix_mlp(tile, parameters)
    else:
        remixed = forward_tile(tile, probabilities(tile, mixer, parameters[0]))
    readout = remixed.flatten(0, 1).index_select(0, layout.place.clamp(max=layout.num_chunks * layout.chunk_size - 1))
    wanted = cu_seqlens[1:] - 1 if snapshot_positions is None else snapshot_positions
    states = _memories_after(wanted.clamp(0, tokens - 1), tile, layout)
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
