"""The memory of the `delta` mixer over chunks of tokens: one unit-triangular solve a chunk, all chunks' at once.

In the equations, t and i are tokens of one chunk, S is the state at its start, g[t] the product of a over the chunk up
to t, and G[t, i] = g[t] / g[i] where t sees i, else 0:

    (I + diag(b) strictLower(G . K K^T)) U = diag(w) V - diag(b g) K S
    R = RMSNorm(diag(g) Q S + (G . Q K^T) U),  S' = g[C] S + (diag(G[C]) K)^T U

U is linear in S, so a chunk maps S to S' by one small matrix and one addition.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .chunked import CHUNK_SIZE, ChunkMasks, chunk_masks, to_chunks, to_tokens
from .delta_reference import normalised, scaled, split_weights
from .records import TokenRecord


class DeltaChunks(NamedTuple):
    """Chunks of tokens, of which each has a state to continue from.

    Args:
        keys: k, [num_chunks, C, slots].
        queries: q of length 1, [num_chunks, C, slots].
        decay: G, [num_chunks, C, C].
        from_start: g, [num_chunks, C, 1]; 0 where t is of another segment than the chunk's state.
        own: What U is without a state, [num_chunks, C, width].
        seen: What of the state is taken off it: U = own - seen S, [num_chunks, C, slots].
    """

    keys: torch.Tensor
    queries: torch.Tensor
    decay: torch.Tensor
    from_start: torch.Tensor
    own: torch.Tensor
    seen: torch.Tensor

    def transitions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The M and A of S' = M S + A: [num_chunks, slots, slots] and [num_chunks, slots, width]."""
        entering = (self.keys * self.decay[:, -1].unsqueeze(-1)).mT
        kept = self.from_start[:, -1:] * torch.eye(self.keys.shape[-1], dtype=entering.dtype, device=entering.device)
        return torch.baddbmm(kept, entering, self.seen, alpha=-1), torch.bmm(entering, self.own)

    def written(self, states: torch.Tensor) -> torch.Tensor:
        """U, [num_chunks, C, width], from the states at the chunks' starts, [num_chunks, slots, width]."""
        return torch.baddbmm(self.own, self.seen, states, alpha=-1)

    def readouts(self, states: torch.Tensor) -> torch.Tensor:
        """r, [num_chunks, C, width], from the states at the chunks' starts."""
        inside = self.decay * torch.bmm(self.queries, self.keys.mT)
        carried = torch.bmm(self.from_start * self.queries, states)
        return scaled(torch.baddbmm(carried, inside, self.written(states)))

    def states_after(self, chunk: torch.Tensor, place: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The states after some tokens, [tokens, slots, width]: those at given places of given chunks, int64."""
        row = torch.arange(chunk.shape[0], device=chunk.device)
        decay, from_start = (part.index_select(0, chunk)[row, place] for part in (self.decay, self.from_start))
        keys, written = self.keys.index_select(0, chunk), self.written(states).index_select(0, chunk)
        kept = from_start.unsqueeze(-1) * states.index_select(0, chunk)
        return torch.baddbmm(kept, (keys * decay.unsqueeze(-1)).mT, written)


def make_chunks(values: torch.Tensor, queries: torch.Tensor, weights: torch.Tensor, masks: ChunkMasks) -> DeltaChunks:
    """Solve what the tokens of each chunk write, from [num_chunks, C, channels], at least float32.

    solve_triangular has no half precision on processors.
    """
    write, erase, log_kept, keys = split_weights(weights)
    # Sums from i to t, not differences of sums: these would have no digits left after a token that forgets everything.
    decay = log_kept.expand(-1, -1, log_kept.shape[1]).tril(-1).cumsum(1).exp() * masks.intra_chunk
    from_start = log_kept.cumsum(1).exp()
    if masks.reads_chunk_state is not None:
        from_start = from_start * masks.reads_chunk_state
    right = torch.cat([write * values, erase * from_start * keys], dim=-1)
    # Of the matrix, what is below the diagonal is read alone.
    overlaps = erase * decay * torch.bmm(keys, keys.mT)
    solved = torch.linalg.solve_triangular(overlaps, right, upper=False, unitriangular=True)
    own, seen = solved.split([values.shape[-1], keys.shape[-1]], dim=-1)
    return DeltaChunks(keys, normalised(queries), decay, from_start, own, seen)


def remix(
    values: torch.Tensor,
    queries: torch.Tensor,
    weights: torch.Tensor,
    segment_ids: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Update the memory by every token and read it there.

    Args:
        values: v, [batch, tokens, width].
        queries: q, [batch, tokens, slots].
        weights: As `delta_weights` returns them, [batch, tokens, 3 + slots].
        segment_ids: [batch, tokens], int, not falling and starting at 0; None: one segment.
        state: [batch, slots, width], of the same dtype or more precise; None: empty.

    Returns:
        r, [batch, tokens, width], and the state after the last token, in the state's dtype.
    """
    sequences, tokens, width = values.shape
    if state is None:
        state = values.new_zeros(sequences, queries.shape[-1], width)
    if tokens == 0:
        return values, state
    if tokens == 1:
        return _remix_one_token(values, queries, weights, segment_ids, state)
    chunk_size = min(CHUNK_SIZE, tokens)
    if segment_ids is not None and tokens % chunk_size:
        # Padding continues the last segment, or the final state would be that of another one.
        segment_ids = torch.cat([segment_ids, segment_ids[:, -1:].expand(-1, -tokens % chunk_size)], dim=1)
    v, q, entering = (to_chunks(tensor, chunk_size) for tensor in (values, queries, weights))
    chunks = make_chunks(v, q, entering, chunk_masks(segment_ids, v.shape[0] // sequences, chunk_size, values))
    # A state may be more precise than the tokens: it is updated as it is, and rounded for the read.
    moves, additions = (part.to(state.dtype).unflatten(0, (sequences, -1)) for part in chunks.transitions())
    starts = []
    for chunk in range(moves.shape[1]):
        starts.append(state)
        state = torch.baddbmm(additions[:, chunk], moves[:, chunk], state)
    states = torch.stack(starts, dim=1).flatten(0, 1).to(values.dtype)
    return to_tokens(chunks.readouts(states), sequences, tokens), state


def _remix_one_token(
    values: torch.Tensor,
    queries: torch.Tensor,
    weights: torch.Tensor,
    segment_ids: torch.Tensor | None,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank-one update of the state and a read."""
    if segment_ids is not None:
        state = state * (segment_ids == 0).unsqueeze(-1)
    write, erase, log_kept, keys = (part.to(state.dtype) for part in split_weights(weights))
    kept = log_kept.exp() * state
    written = torch.baddbmm(write * values, keys, kept * erase, alpha=-1)
    state = torch.baddbmm(kept, keys.mT, written)
    return scaled(torch.bmm(normalised(queries), state.to(queries.dtype))), state


class DeltaRecord(TokenRecord):
    """What consecutive tokens did to a memory of the `delta` mixer.

    The weights are those of `delta_weights`. What a token writes depends on the tokens before it, so none can be
    subtracted: a state is computed again from an earlier one, which is exact whichever tokens have gone.
    """

    @property
    def can_be_subtracted(self) -> bool:
        """No."""
        return False

    def state_after(self, state: torch.Tensor | None) -> torch.Tensor:
        """The state after the last token, from that before the first one; in float64 if one of the two is."""
        dtype = self.values.dtype if state is None else torch.promote_types(state.dtype, self.values.dtype)
        values, weights = self.values.to(dtype), self.weights.to(dtype)
        keys = split_weights(weights)[-1]
        return remix(values, keys, weights, self.segment_ids, None if state is None else state.to(dtype))[1]

    def subtract_from(self, state: torch.Tensor) -> torch.Tensor:
        """Not possible; see above."""
        raise NotImplementedError("tokens can't be subtracted from a memory of the 'delta' mixer; use state_after")


def record_of(
    mixer: str, weights: torch.Tensor, values: torch.Tensor, segment_ids: torch.Tensor | None
) -> TokenRecord:
    """What a mixer records of its tokens; arguments as in `TokenRecord`."""
    return (DeltaRecord if mixer == "delta" else TokenRecord)(weights, values, segment_ids)
