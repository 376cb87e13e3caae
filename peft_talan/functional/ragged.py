"""The side path on the flat tokens of many requests: no loop over requests, and no question to the device.

Each request is cut into chunks of its own, so every chunk has one state to continue from, and what lies inside of a
chunk is `chunked.forward_tile` or `delta`. The number of chunks is bounded by the shapes alone; chunks that are not
needed are empty. The results are those of `ragged_reference` up to rounding. Gradients are not supported: it serves
generation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

from . import stacked
from .chunked import CHUNK_SIZE, ChunkMasks, Tile, chunk_states, forward_tile, make_tile, probabilities
from .delta import DeltaChunks, make_chunks
from .fused import read, remix, write_back
from .parameters import (
    RaggedOutput,
    RemixInputs,
    SidePathOptions,
    SidePathParameters,
    full_precision,
    working_dtype,
)
from .recomputed import TILE_TOKENS, remix_tile
from .records import memory_after
from .reference import enter
from .stacked import StackedParameters

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

    def place_of(self, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """The places of some tokens, or of all; padding gets the last one, which holds something finite."""
        place = self.place if tokens is None else self.place.index_select(0, tokens)
        return place.clamp(max=self.num_chunks * self.chunk_size - 1)


def request_of(index: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Find the request of each token (or chunk); what comes after the last request's end counts as its.

    Args:
        index: [tokens], int.
        ends: Where each request ends, [requests], int, not falling.

    Returns:
        [tokens], int64.
    """
    # From the right: a request without tokens ends where the one before does, and has none of them.
    return torch.searchsorted(ends, index, right=True).clamp_(max=ends.shape[0] - 1)


def _choose_chunk_size(tokens: int, requests: int, max_query_length: int) -> int:
    """The tokens per chunk: a power of two near the mean length."""
    # A request's last chunk is half empty on average, and a token costs as many products as its chunk has tokens.
    length = min(max(tokens // max(requests, 1), SMALLEST_CHUNK_SIZE), max_query_length, CHUNK_SIZE)
    return 1 << (length - 1).bit_length()


def _lay_out(cu_seqlens: torch.Tensor, tokens: int, max_query_length: int) -> ChunkLayout:
    """Cut every request of [requests + 1] int64 bounds into chunks; `tokens` includes padding."""
    requests = cu_seqlens.shape[0] - 1
    chunk_size = _choose_chunk_size(tokens, requests, max_query_length)
    # At most one chunk per request is not full, so this is enough for any lengths; the lengths are on the device.
    num_chunks = min(tokens // chunk_size + requests, tokens)
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    chunk_ends = ((ends - starts + chunk_size - 1) // chunk_size).cumsum(0)
    # A request's first chunk minus its first token, so that a token's own place falls out of one addition.
    shift = F.pad(chunk_ends[:-1], (1, 0)) * chunk_size - starts
    token = torch.arange(tokens, device=cu_seqlens.device)
    place = token + shift.index_select(0, request_of(token, ends))
    place = torch.where(token < ends[-1], place, num_chunks * chunk_size)
    request = request_of(torch.arange(num_chunks, device=cu_seqlens.device), chunk_ends)
    return ChunkLayout(chunk_size, num_chunks, place, request)


def _cut(inputs: RemixInputs, layout: ChunkLayout) -> tuple[tuple[torch.Tensor, ...], ChunkMasks]:
    """Put the flat tokens into their chunks: z, q and e, [num_chunks, C, channels], and their masks."""
    flat = torch.cat(inputs[:3], dim=-1)
    # One row more than there are places takes the padding.
    rows = flat.new_zeros(layout.num_chunks * layout.chunk_size + 1, flat.shape[1])
    placed = rows.index_copy_(0, layout.place, flat)[:-1].unflatten(0, (layout.num_chunks, layout.chunk_size))
    # Earlier chunks of the same request, and its initial state: the requests are one sequence to the masks.
    earlier = (layout.request.unsqueeze(1) == layout.request).to(flat.dtype).tril_(-1)
    triangle = torch.ones(1, layout.chunk_size, layout.chunk_size, dtype=flat.dtype, device=flat.device).tril_()
    return placed.split([tensor.shape[1] for tensor in inputs[:3]], dim=-1), ChunkMasks(triangle, earlier.unsqueeze(0))


def _sum(inputs: RemixInputs, state: torch.Tensor, layout: ChunkLayout) -> Tile:
    """Cut the tokens into chunks and sum the state at the start of each."""
    (z, q, e), masks = _cut(inputs, layout)
    # As in `chunked`, products over slots run along the tokens.
    e = e.mT.contiguous()
    states = chunk_states(z, e, masks, state.index_select(0, layout.request).unsqueeze(0), 1)
    return make_tile(z, q, e, states.squeeze(0), masks)


def _delta_starts(
    chunks: DeltaChunks, state: torch.Tensor, layout: ChunkLayout, max_query_length: int
) -> torch.Tensor:
    """The states at the chunks' starts: all requests' first chunks, then all second ones, as many as there may be."""
    moves, additions = chunks.transitions()
    requests = torch.arange(state.shape[0], device=state.device)
    first = torch.searchsorted(layout.request, requests)
    count = torch.searchsorted(layout.request, requests, right=True) - first
    # One row more than there are chunks takes what requests without such a chunk would store.
    starts = state.new_zeros(layout.num_chunks + 1, *state.shape[1:])
    for step in range(-(-max_query_length // layout.chunk_size)):
        # The last request also has the chunks that are not needed.
        has_chunk = step < count
        chunk = torch.where(has_chunk, first + step, layout.num_chunks)
        starts = starts.index_copy(0, chunk, state)
        chunk = chunk.clamp(max=layout.num_chunks - 1)
        moved = torch.baddbmm(additions.index_select(0, chunk), moves.index_select(0, chunk), state)
        state = torch.where(has_chunk[:, None, None], moved, state)
    return starts[:-1]


def _remix_mlp(tile: Tile, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The `mlp` mixer is not linear in the memory: some chunks at a time, with the memory of each of their tokens."""
    count = max(TILE_TOKENS // tile.z.shape[1], 1)
    parts = zip(*(tensor.split(count) for tensor in tile[:4]), strict=True)
    if parameters[0].dim() == 1:
        return torch.cat([remix_tile(z, q, e.mT, "mlp", parameters, None, state)[0] for z, q, e, state in parts])
    # Each chunk has tensors of its own, for all of its tokens.
    per_chunk = zip(*(tensor.unsqueeze(1).split(count) for tensor in parameters), strict=True)
    pairs = zip(parts, per_chunk, strict=True)
    return torch.cat([remix_tile(z, q, e.mT, "mlp", own, None, state)[0] for (z, q, e, state), own in pairs])


def _states_after(chunk: torch.Tensor, place: torch.Tensor, tile: Tile) -> torch.Tensor:
    """The state after each of some tokens: that at the start of its chunk, and what the chunk adds up to the token."""
    z, e, state = (tensor.index_select(0, chunk) for tensor in (tile.z, tile.e, tile.state))
    # Later tokens of the chunk as padding: of no weight.
    up_to = torch.arange(e.shape[-1], device=place.device) <= place.unsqueeze(1)
    return memory_after(z, (e * up_to.unsqueeze(1)).mT, None, state)


def _remix_requests(
    inputs: RemixInputs,
    state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_query_length: int,
    snapshot_positions: torch.Tensor | None,
    adapters: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Requests of any lengths, in chunks: read-outs, and the states at the snapshots."""
    # Servers count in int32, indices are int64.
    tokens, cu_seqlens = inputs.values.shape[0], cu_seqlens.long()
    layout = _lay_out(cu_seqlens, tokens, max_query_length)
    states_after: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    if inputs.mixer == "delta":
        (v, q, entering), masks = _cut(inputs, layout)
        chunks = make_chunks(v, q, entering, masks)
        starts = _delta_starts(chunks, state, layout, max_query_length)
        remixed, states_after = chunks.readouts(starts), partial(chunks.states_after, states=starts)
    else:
        tile, parameters = _sum(inputs, state, layout), inputs.parameters
        states_after = partial(_states_after, tile=tile)
        if adapters is not None:
            # All of a request's tokens have the adapter of the first.
            first = cu_seqlens[:-1].index_select(0, layout.request).clamp_(max=tokens - 1)
            parameters = _rows_of(parameters, adapters.index_select(0, first))
        if inputs.mixer == "mlp":
            remixed = _remix_mlp(tile, parameters)
        else:
            remixed = forward_tile(tile, probabilities(tile, inputs.mixer, parameters[0].to(tile.z.dtype)))
    readout = remixed.flatten(0, 1).index_select(0, layout.place_of())
    # Positions that are no token's get the state of some token, which nobody reads: to leave them out, their number
    # would have to be known.
    positions = cu_seqlens[1:] - 1 if snapshot_positions is None else snapshot_positions
    place = layout.place_of(positions.clamp(0, tokens - 1))
    states = states_after(place // layout.chunk_size, place % layout.chunk_size)
    if snapshot_positions is None:
        # Without tokens, the state stays as it is.
        empty = cu_seqlens[1:] == cu_seqlens[:-1]
        states = torch.where(empty[:, None, None], state, states)
    return readout, states


def _rows_of(parameters: tuple[torch.Tensor, ...], rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.index_select(0, rows) for tensor in parameters)


def _remix(
    inputs: RemixInputs,
    cu_seqlens: torch.Tensor | None,
    state: torch.Tensor,
    max_query_length: int,
    snapshot_positions: torch.Tensor | None,
    adapters: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read-outs, and the states at the snapshots; with adapters, the mixer's tensors are stacked, [adapters, ...]."""
    if cu_seqlens is not None:
        return _remix_requests(inputs, state, cu_seqlens, max_query_length, snapshot_positions, adapters)
    # Each token is a request, and so a batch row of one token.
    z, q, e = (tensor.unsqueeze(1) for tensor in inputs[:3])
    parameters = inputs.parameters
    if adapters is not None:
        first, *others = _rows_of(parameters, adapters)
        # A bias is added to [batch, tokens, slots].
        parameters = (first if inputs.mixer == "linear" else first.unsqueeze(1), *others)
    readout, states = remix(z, q, e, inputs.mixer, parameters, None, state)
    if snapshot_positions is not None:
        states = states.index_select(0, snapshot_positions.clamp(0, states.shape[0] - 1))
    return readout.squeeze(1), states


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
        # A pool may be in another dtype than the tokens are computed in.
        stream, initial_state = hidden_states.to(dtype), state.to(dtype)
        values, queries, logits = read(stream, parameters.read, parameters.read_sizes(options.mixer))
        weights = enter(logits, None, options, parameters.mixer)
        inputs = RemixInputs(values, queries, weights, options.mixer, parameters.mixer, None, None)
        readout, states = _remix(inputs, cu_seqlens, initial_state, max_query_length, snapshot_positions)
        # delta = alpha r W_write^T: a strength per token scales r.
        if isinstance(alpha, torch.Tensor):
            readout, alpha = readout * alpha.to(dtype).unsqueeze(1), 1.0
        written = write_back(stream, readout, parameters, options, alpha)
    return RaggedOutput(written.to(hidden_states.dtype), states.to(state.dtype))


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
    """Run each request's own side path on requests laid end to end; see `ragged_reference.ragged_adapters`."""
    dtype = working_dtype(hidden_states.dtype)
    with full_precision(hidden_states.device.type):
        stream, initial_state = hidden_states.to(dtype), state.to(dtype)
        own = adapters.clamp(min=0)
        values, queries, logits = stacked.read(stream, parameters, parameters.read_sizes(options.mixer), own)
        # Tokens enter by a tensor of their adapter with `delta` alone: its gates' bias.
        entered_by = _rows_of(parameters.mixer, own) if options.mixer == "delta" else parameters.mixer
        weights = enter(logits, None, options, entered_by)
        inputs = RemixInputs(values, queries, weights, options.mixer, parameters.mixer, None, None)
        readout, states = _remix(inputs, cu_seqlens, initial_state, max_query_length, snapshot_positions, own)
        strength = parameters.alpha.index_select(0, own)
        strength = strength if alpha is None else strength * alpha.to(dtype)
        # Without an adapter nothing is read, and so nothing is written: h' is h.
        readout = (readout * strength.unsqueeze(1)).masked_fill(adapters.unsqueeze(1) < 0, 0.0)
        written = stacked.write_back(stream, readout, parameters, own, options.writeback)
    return RaggedOutput(written.to(hidden_states.dtype), states.to(state.dtype))
