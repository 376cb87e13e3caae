"""The causal memory read by matrix products over chunks of tokens, with a backward pass written by hand.

Nothing of shape [tokens, slots, width] is made: a token sees the sum S over earlier chunks and, inside its own chunk,
a masked [C, C] product, C being the chunk size. Everything that has a slot is laid out [slots, C]: a product or a
softmax then runs along the tokens, of which there are many, and not along the slots, of which there are few.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .parameters import SMALLEST_DENOMINATOR

CHUNK_SIZE = 32
"""Tokens per chunk: a token costs this many multiplications inside its chunk, and slots x width outside of it."""


class ChunkMasks(NamedTuple):
    """Which tokens see which, in one tile. `sequences` is the batch, `num_chunks` is sequences x chunks.

    Args:
        intra_chunk: [1 or num_chunks, C, C], float: 1 where row t sees column i of the same chunk.
        inter_chunk: [1 or sequences, chunks + 1, chunks], float: 1 where the state at the start of chunk c has the sum
            of chunk c' in it; the last row is the final state's.
        from_initial_state: [sequences, chunks + 1, 1, 1], float: 1 where it has the initial state in it; None: all.
        reads_chunk_state: [num_chunks, C, 1], float: 1 where t's segment is that of its chunk's first state; None: all.
        adds_to_chunk_sum: [num_chunks, C, 1], float: 1 where i's segment is the last one of its chunk; None: all.
    """

    intra_chunk: torch.Tensor
    inter_chunk: torch.Tensor
    from_initial_state: torch.Tensor | None = None
    reads_chunk_state: torch.Tensor | None = None
    adds_to_chunk_sum: torch.Tensor | None = None


class Tile(NamedTuple):
    """One tile, cut into chunks and padded with tokens of no weight.

    Args:
        z: [num_chunks, C, width].
        q: [num_chunks, C, width].
        e: [num_chunks, slots, C].
        masks: Which tokens see which.
        s: S, N at the start of each chunk, [num_chunks, slots, width].
        d: D, the denominators, [num_chunks, slots, C].
        final_state: The memory after the tile, [sequences, slots, width + 1].
    """

    z: torch.Tensor
    q: torch.Tensor
    e: torch.Tensor
    masks: ChunkMasks
    s: torch.Tensor
    d: torch.Tensor
    final_state: torch.Tensor


def chunk_masks(segment_ids: torch.Tensor | None, chunks: int, chunk_size: int, like: torch.Tensor) -> ChunkMasks:
    """Lay out the masks of a tile.

    Args:
        segment_ids: [sequences, chunks * C], int, not falling; the initial state belongs to segment 0. None: one
            segment.
        chunks: Chunks in the tile.
        chunk_size: Tokens per chunk.
        like: A tensor whose dtype and device the masks take.

    Returns:
        The masks.
    """
    triangle = torch.ones(1, chunk_size, chunk_size, dtype=like.dtype, device=like.device).tril()
    earlier = torch.ones(1, chunks + 1, chunks, dtype=like.dtype, device=like.device).tril(-1)
    if segment_ids is None:
        return ChunkMasks(triangle, earlier)
    ids = segment_ids.unflatten(1, (chunks, chunk_size))
    last = ids[:, :, -1]
    before = F.pad(last, (1, 0))
    intra_chunk = ids.unsqueeze(-1) == ids.unsqueeze(-2)
    return ChunkMasks(
        intra_chunk=intra_chunk.flatten(0, 1) * triangle,
        inter_chunk=(before.unsqueeze(-1) == last.unsqueeze(-2)) * earlier,
        from_initial_state=(before == 0).to(like.dtype)[..., None, None],
        reads_chunk_state=(ids == before[:, :-1, None]).to(like.dtype).flatten(0, 1).unsqueeze(-1),
        adds_to_chunk_sum=(ids == last.unsqueeze(-1)).to(like.dtype).flatten(0, 1).unsqueeze(-1),
    )


def _masked(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return tensor if mask is None else tensor * mask


def part_of(tensor: torch.Tensor, piece: slice) -> torch.Tensor:
    """Some of the tokens of [sequences, tokens, channels], without an operation if they are all of them."""
    return tensor if piece.start == 0 and piece.stop == tensor.shape[1] else tensor[:, piece]


def to_chunks(tensor: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Give [sequences, tokens, channels] as [num_chunks, C, channels], padded with zeros."""
    missing = -tensor.shape[1] % chunk_size
    if missing:
        tensor = F.pad(tensor, (0, 0, 0, missing))
    return tensor.reshape(-1, chunk_size, tensor.shape[-1])


def to_tokens(tensor: torch.Tensor, sequences: int, tokens: int) -> torch.Tensor:
    """Take back what `to_chunks` did."""
    return part_of(tensor.reshape(sequences, -1, tensor.shape[-1]), slice(0, tokens))


def cut_tile(
    values: torch.Tensor,
    queries: torch.Tensor,
    weights: torch.Tensor,
    state: torch.Tensor,
    segment_ids: torch.Tensor | None,
) -> Tile:
    """Cut a tile into chunks and sum the state at the start of each.

    Args:
        values: z, [sequences, tokens, width].
        queries: q, [sequences, tokens, width].
        weights: e, [sequences, tokens, slots].
        state: [sequences, slots, width + 1].
        segment_ids: [sequences, tokens], counted from the state's segment; None: one segment.

    Returns:
        The tile.
    """
    sequences, tokens, _ = values.shape
    chunk_size = min(CHUNK_SIZE, tokens)
    z, q, e = (
        to_chunks(values, chunk_size),
        to_chunks(queries, chunk_size),
        to_chunks(weights, chunk_size).mT.contiguous(),
    )
    chunks = z.shape[0] // sequences
    if segment_ids is not None and tokens % chunk_size:
        segment_ids = torch.cat([segment_ids, segment_ids[:, -1:].expand(-1, -tokens % chunk_size)], dim=1)
    masks = chunk_masks(segment_ids, chunks, chunk_size, values)
    entering = _masked(e, None if masks.adds_to_chunk_sum is None else masks.adds_to_chunk_sum.mT)
    chunk_sums = torch.cat([torch.bmm(entering, z), entering.sum(-1, keepdim=True)], dim=-1).unflatten(
        0, (sequences, chunks)
    )
    sums = (masks.inter_chunk @ chunk_sums.flatten(2)).unflatten(2, chunk_sums.shape[2:]) + _masked(
        state.unsqueeze(1), masks.from_initial_state
    )
    chunk_states = sums[:, :-1].flatten(0, 1)
    # D[t] = sum_{i <= t} e[i]: inside the chunk E L^T, and the state at its start.
    inside = torch.matmul(e, masks.intra_chunk.mT)
    d = inside.add_(
        chunk_states[..., -1:]
        if masks.reads_chunk_state is None
        else chunk_states[..., -1:] * masks.reads_chunk_state.mT
    )
    return Tile(z, q, e, masks, chunk_states[..., :-1], d.clamp_min_(SMALLEST_DENOMINATOR), sums[:, -1])


def _products(x: torch.Tensor, tile: Tile, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(X Z^T) . L, [num_chunks, C, C], and with it x[t] . N[t, m], scaled, as E ((X Z^T) . L)^T + S X^T."""
    inside = torch.bmm(x, tile.z.mT).mul_(tile.masks.intra_chunk)
    carried = torch.bmm(tile.s, _masked(x, tile.masks.reads_chunk_state).mT)
    return inside, carried.baddbmm_(tile.e, inside.mT, beta=scale, alpha=scale)


def _readouts(y: torch.Tensor, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """(Y^T E) . L, [num_chunks, C, C], and with it sum_m y[m, t] N[t, m] as ((Y^T E) . L) Z + Y^T S."""
    inside = torch.bmm(y.mT, tile.e).mul_(tile.masks.intra_chunk)
    carried = _masked(torch.bmm(y.mT, tile.s), tile.masks.reads_chunk_state)
    return inside, carried.baddbmm_(inside, tile.z)


class Probabilities(NamedTuple):
    """How much each token reads from each slot.

    Args:
        p: [num_chunks, slots, C].
        w: p / D.
        inside: For `attention` (Q Z^T) . L, [num_chunks, C, C], which the backward pass needs.
        scores: For `attention` s / (D sqrt(d)), [num_chunks, slots, C], likewise.
    """

    p: torch.Tensor
    w: torch.Tensor
    inside: torch.Tensor | None = None
    scores: torch.Tensor | None = None


def probabilities(tile: Tile, mixer: str, parameter: torch.Tensor) -> Probabilities:
    """Weigh the slots.

    Args:
        tile: The tile.
        mixer: `attention` or `linear`.
        parameter: The mixer's one tensor.

    Returns:
        The probabilities of `attention`, or the weights of `linear`.
    """
    if mixer == "linear":
        p = torch.matmul(parameter.mT, tile.q.mT)
        return Probabilities(p, p / tile.d)
    inside, scores = _products(tile.q, tile, 1 / math.sqrt(tile.q.shape[-1]))
    scores = scores.div_(tile.d)
    p = torch.softmax(scores + parameter.unsqueeze(-1), dim=1)
    return Probabilities(p, p / tile.d, inside, scores)


def forward_tile(tile: Tile, read: Probabilities) -> torch.Tensor:
    """Give the read-outs r, [num_chunks, C, width]."""
    return _readouts(read.w, tile)[1]


def backward_tile(
    tile: Tile,
    read: Probabilities,
    parameter: torch.Tensor,
    grad_r: torch.Tensor,
    grad_final_state: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Give the gradients of z, q, e (laid out as the tokens), the initial state and the mixer's parameter.

    With u[t, m] = grad_r[t] . N[t, m] and w = p / D, a token's memory gets
    grad_N[t, m] = w[t, m] grad_r[t] + grad_s[t, m] q[t] and grad_D = -(w u + grad_s s) / D.
    """
    z, q, e, masks, _, d, _ = tile
    p, _, inside_q, scores = read
    inside_r, u = _products(grad_r, tile)
    w, grad_p = read.w, u.div_(d)
    grad_d = (p * grad_p).neg_()
    # Each reader (x, y) puts y[m, t] x[t] into grad_N[t, m]. (Y^T E) . L of the first is made where it is used.
    readers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]] = [(grad_r, w, inside_r, None)]
    if inside_q is None or scores is None:
        grad_q = torch.matmul(grad_p.mT, parameter.mT)
        grad_parameter = torch.matmul(grad_p, q).sum(0).mT
    else:
        # The mean that the softmax takes away, sum_m p grad_p, stands in grad_d with a minus.
        grad_logits = grad_p.add_(grad_d.sum(1, keepdim=True)).mul_(p)
        grad_parameter = grad_logits.sum((0, 2))
        grad_d.addcmul_(scores, grad_logits, value=-1)
        grad_s = grad_logits.div_(d).div_(math.sqrt(q.shape[-1]))
        inside_s, grad_q = _readouts(grad_s, tile)
        readers.append((q, grad_s, inside_q, inside_s))
        del inside_s  # only the list has it now
    grad_d.div_(d)

    # A chunk's readers reach, through S and through D, all the chunks that S is the sum of.
    chunk_states, *others = (torch.bmm(y, _masked(x, masks.reads_chunk_state)) for x, y, _, _ in readers)
    grad_chunk_states = sum(others, chunk_states)
    grad_chunk_d = grad_d if masks.reads_chunk_state is None else grad_d * masks.reads_chunk_state.mT
    grad_chunk_states = torch.cat([grad_chunk_states, grad_chunk_d.sum(-1, keepdim=True)], dim=-1).unflatten(
        0, (-1, masks.inter_chunk.shape[2])
    )
    inter_chunk, grad_sums = masks.inter_chunk[:, :-1], grad_chunk_states
    if grad_final_state is not None:
        inter_chunk, grad_sums = (
            masks.inter_chunk,
            torch.cat([grad_chunk_states, grad_final_state.unsqueeze(1)], dim=1),
        )
    grad_chunk_sums = (inter_chunk.mT @ grad_sums.flatten(2)).unflatten(2, grad_sums.shape[2:]).flatten(0, 1)
    from_initial_state = (
        None if masks.from_initial_state is None else masks.from_initial_state[:, : grad_sums.shape[1]]
    )
    grad_state = _masked(grad_sums, from_initial_state).sum(1)

    later = torch.bmm(grad_chunk_sums[..., :-1], z.mT).add_(grad_chunk_sums[..., -1:])
    grad_e = _masked(later, None if masks.adds_to_chunk_sum is None else masks.adds_to_chunk_sum.mT).add_(
        torch.matmul(grad_d, masks.intra_chunk)
    )
    grad_z = _masked(torch.bmm(e.mT, grad_chunk_sums[..., :-1]), masks.adds_to_chunk_sum)
    while readers:  # Taken from the list, so that the memory of one is free for the next.
        x, y, inside_x, inside_y = readers.pop()
        if inside_y is None:
            inside_y = torch.bmm(y.mT, e).mul_(masks.intra_chunk)
        grad_z.baddbmm_(inside_y.mT, x)
        grad_e.baddbmm_(y, inside_x)
    return grad_z, grad_q, grad_e.mT, grad_state, grad_parameter
