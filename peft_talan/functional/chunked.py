"""The causal memory read by matrix products over chunks of tokens, with a backward pass written by hand.

Nothing of shape [tokens, slots, width] is made: a token sees the state at the start of its chunk and, inside of it, a
masked [C, C] product, C being the chunk size. Everything that has a slot is laid out [slots, C]: a product or a
softmax then runs along the tokens, of which there are many, and not along the slots, of which there are few.

In the equations, t and i are tokens of one chunk, m is a slot, `.` between matrices is the product of their elements,
and L is the intra-chunk mask: 1 where t sees i. `num_chunks` counts the chunks of all sequences.
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
    """Which tokens see which, in one tile.

    Args:
        intra_chunk: L, [1 or num_chunks, C, C], float: 1 where row t sees column i of the same chunk.
        inter_chunk: [1 or sequences, chunks + 1, chunks], float: 1 where the state at the start of chunk c has the sum
            of chunk c' in it; the last row is the final state's.
        has_initial_state: [sequences, chunks + 1, 1], float: 1 where it has the initial state in it; None: all.
        reads_chunk_state: [num_chunks, C, 1], float: 1 where t is of the segment of its chunk's state; None: all.
        in_chunk_sum: [num_chunks, C, 1], float: 1 where i is of the segment that its chunk ends with; None: all.
    """

    intra_chunk: torch.Tensor
    inter_chunk: torch.Tensor
    has_initial_state: torch.Tensor | None = None
    reads_chunk_state: torch.Tensor | None = None
    in_chunk_sum: torch.Tensor | None = None


class Tile(NamedTuple):
    """Some tokens of all sequences, cut into chunks and padded with tokens of no weight.

    Args:
        z: [num_chunks, C, width].
        q: [num_chunks, C, width].
        e: [num_chunks, slots, C].
        state: N and D at the start of each chunk, [num_chunks, slots, width + 1].
        d: D, the denominators that each token sees, [num_chunks, slots, C].
        masks: Which tokens see which.
    """

    z: torch.Tensor
    q: torch.Tensor
    e: torch.Tensor
    state: torch.Tensor
    d: torch.Tensor
    masks: ChunkMasks

    @property
    def s(self) -> torch.Tensor:
        """S, the N at the start of each chunk, [num_chunks, slots, width]."""
        return self.state[..., :-1]


def chunk_masks(segment_ids: torch.Tensor | None, chunks: int, chunk_size: int, like: torch.Tensor) -> ChunkMasks:
    """The masks for [sequences, chunks * C] segment ids, not falling, where the initial state belongs to segment 0."""
    triangle = torch.ones(1, chunk_size, chunk_size, dtype=like.dtype, device=like.device).tril()
    earlier = torch.ones(1, chunks + 1, chunks, dtype=like.dtype, device=like.device).tril(-1)
    if segment_ids is None:
        return ChunkMasks(triangle, earlier)
    ids = segment_ids.unflatten(1, (chunks, chunk_size))
    # The state at a chunk's start is of the segment that the chunk before it ended with.
    last = ids[:, :, -1]
    before = F.pad(last, (1, 0))
    intra_chunk = ids.unsqueeze(-1) == ids.unsqueeze(-2)
    return ChunkMasks(
        intra_chunk=intra_chunk.flatten(0, 1) * triangle,
        inter_chunk=(before.unsqueeze(-1) == last.unsqueeze(-2)) * earlier,
        has_initial_state=(before == 0).to(like.dtype).unsqueeze(-1),
        reads_chunk_state=(ids == before[:, :-1, None]).to(like.dtype).flatten(0, 1).unsqueeze(-1),
        in_chunk_sum=(ids == last.unsqueeze(-1)).to(like.dtype).flatten(0, 1).unsqueeze(-1),
    )


def _masked(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return tensor if mask is None else tensor * mask


def _masked_transposed(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return tensor if mask is None else tensor * mask.mT


def slice_tokens(tensor: torch.Tensor, tokens: slice) -> torch.Tensor:
    """Some of the tokens of [sequences, tokens, channels], without an operation if they are all of them."""
    return tensor if tokens.start == 0 and tokens.stop == tensor.shape[1] else tensor[:, tokens]


def to_chunks(tensor: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Reshape [sequences, tokens, channels] to [num_chunks, C, channels], padded with zeros."""
    missing = -tensor.shape[1] % chunk_size
    if missing:
        tensor = F.pad(tensor, (0, 0, 0, missing))
    return tensor.reshape(-1, chunk_size, tensor.shape[-1])


def to_tokens(tensor: torch.Tensor, sequences: int, tokens: int) -> torch.Tensor:
    """Undo `to_chunks`."""
    return slice_tokens(tensor.reshape(sequences, -1, tensor.shape[-1]), slice(0, tokens))


def chunk_states(
    z: torch.Tensor, e: torch.Tensor, masks: ChunkMasks, initial_state: torch.Tensor, sequences: int
) -> torch.Tensor:
    """Sum the state that each row of the inter-chunk mask stands for.

    `initial_state` is [sequences, 1 or rows, slots, width + 1], and so is, with all rows, what is returned.
    """
    entering = _masked_transposed(e, masks.in_chunk_sum)
    # A chunk's own sum, of one segment: N = E Z and D = E 1, in one tensor.
    sums = torch.cat([torch.bmm(entering, z), entering.sum(-1, keepdim=True)], dim=-1).unflatten(0, (sequences, -1))
    carried = _masked(initial_state.flatten(2), masks.has_initial_state)
    inter_chunk = masks.inter_chunk.expand(sequences, -1, -1)
    return torch.baddbmm(carried, inter_chunk, sums.flatten(2)).unflatten(2, sums.shape[2:])


def make_tile(z: torch.Tensor, q: torch.Tensor, e: torch.Tensor, state: torch.Tensor, masks: ChunkMasks) -> Tile:
    """Add the denominators: `D[t] = D at the chunk's start + sum_{i <= t} e[i]`, the sum being E L^T."""
    inside = torch.matmul(e, masks.intra_chunk.mT)
    d = inside.add_(_masked_transposed(state[..., -1:], masks.reads_chunk_state))
    # As in `mean_of`; but N of a token never exists here, so D divides the products that are made of it instead.
    return Tile(z, q, e, state, d.clamp_min_(SMALLEST_DENOMINATOR), masks)


def cut_tile(
    values: torch.Tensor,
    queries: torch.Tensor,
    weights: torch.Tensor,
    initial_state: torch.Tensor,
    segment_ids: torch.Tensor | None,
) -> tuple[Tile, torch.Tensor]:
    """Cut z, q and e, [sequences, tokens, channels], into chunks: the tile and the state after it."""
    sequences, tokens, _ = values.shape
    chunk_size = min(CHUNK_SIZE, tokens)
    z, q = to_chunks(values, chunk_size), to_chunks(queries, chunk_size)
    e = to_chunks(weights, chunk_size).mT.contiguous()
    if segment_ids is not None and tokens % chunk_size:
        # Padding continues the last segment, or the final state would be that of another one.
        segment_ids = torch.cat([segment_ids, segment_ids[:, -1:].expand(-1, -tokens % chunk_size)], dim=1)
    masks = chunk_masks(segment_ids, z.shape[0] // sequences, chunk_size, values)
    states = chunk_states(z, e, masks, initial_state.unsqueeze(1), sequences)
    return make_tile(z, q, e, states[:, :-1].flatten(0, 1), masks), states[:, -1]


def _products(x: torch.Tensor, tile: Tile, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(X Z^T) . L, [num_chunks, C, C], and with it x[t] . N[t, m], scaled, as E ((X Z^T) . L)^T + S X^T."""
    # x[t] . N[t, m] = S[m] . x[t] + sum_{i <= t} e[i, m] z[i] . x[t]
    inside = torch.bmm(x, tile.z.mT).mul_(tile.masks.intra_chunk)
    carried = torch.bmm(tile.s, _masked(x, tile.masks.reads_chunk_state).mT)
    return inside, carried.baddbmm_(tile.e, inside.mT, beta=scale, alpha=scale)


def _readouts(y: torch.Tensor, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """(Y^T E) . L, [num_chunks, C, C], and with it sum_m y[m, t] N[t, m] as ((Y^T E) . L) Z + Y^T S."""
    # sum_m y[m, t] N[t, m] = sum_m y[m, t] S[m] + sum_{i <= t} (sum_m y[m, t] e[i, m]) z[i]
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
    """Weigh the slots for `attention` or `linear`, by the mixer's one tensor."""
    if mixer == "linear":
        # p = B^T Q^T
        p = torch.matmul(parameter.mT, tile.q.mT)
        return Probabilities(p, p / tile.d)
    # p = softmax_m(q . N / (D sqrt(d)) + b): dividing the product costs a number per slot, dividing N a vector.
    inside, scores = _products(tile.q, tile, 1 / math.sqrt(tile.q.shape[-1]))
    scores = scores.div_(tile.d)
    p = torch.softmax(scores + parameter.unsqueeze(-1), dim=1)
    return Probabilities(p, p / tile.d, inside, scores)


def forward_tile(tile: Tile, read: Probabilities) -> torch.Tensor:
    """The read-outs `r[t] = sum_m w[m, t] N[t, m]`, [num_chunks, C, width]."""
    return _readouts(read.w, tile)[1]


def backward_tile(
    tile: Tile,
    read: Probabilities,
    parameter: torch.Tensor,
    grad_r: torch.Tensor,
    grad_final_state: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """The gradients of z, q, e (in chunks, [num_chunks, C, channels]), the initial state and the mixer's parameter."""
    z, q, e, _, d, masks = tile
    p, w, inside_q, scores = read
    # u[t, m] = grad_r[t] . N[t, m], so grad_w = u, grad_p = u / D, and D gets -p u / D^2 = -p grad_p / D.
    inside_r, u = _products(grad_r, tile)
    grad_p = u.div_(d)
    grad_d = (p * grad_p).neg_()  # Still times D, which divides it below.
    # Each reader (x, y) puts y[m, t] x[t] into grad_N[t, m]. r = sum_m w N is the first: grad_N = w grad_r.
    # With each stand (X Z^T) . L and (Y^T E) . L; the latter of the first is computed where it is used.
    readers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]] = [(grad_r, w, inside_r, None)]
    if inside_q is None or scores is None:
        # p = q B
        grad_q = torch.matmul(grad_p.mT, parameter.mT)
        grad_parameter = torch.matmul(grad_p, q).sum(0).mT
    else:
        # Softmax: grad_logits = p (grad_p - sum_m p grad_p), the sum standing in grad_d with a minus.
        grad_logits = grad_p.add_(grad_d.sum(1, keepdim=True)).mul_(p)
        grad_parameter = grad_logits.sum((0, 2))
        # scores = q . N / (D sqrt(d)): D gets -scores grad_logits / D, N gets q grad_logits / (D sqrt(d)).
        grad_d.addcmul_(scores, grad_logits, value=-1)
        grad_s = grad_logits.div_(d).div_(math.sqrt(q.shape[-1]))
        inside_s, grad_q = _readouts(grad_s, tile)
        readers.append((q, grad_s, inside_q, inside_s))
        del inside_s  # Only the list holds it now.
    grad_d.div_(d)

    # The chunk's state is in N and D of all its tokens that read it: grad_S = sum_readers Y X, grad_D = sum_t grad_d.
    grad_s_start, *others = (torch.bmm(y, _masked(x, masks.reads_chunk_state)) for x, y, _, _ in readers)
    grad_d_start = _masked_transposed(grad_d, masks.reads_chunk_state).sum(-1, keepdim=True)
    grad_states = torch.cat([sum(others, grad_s_start), grad_d_start], dim=-1).unflatten(
        0, (-1, masks.inter_chunk.shape[2])
    )
    # states = inter_chunk sums + initial state, so back through the transpose. Without a gradient of the final state,
    # its row is left out.
    rows = grad_states.shape[1]
    if grad_final_state is not None:
        rows, grad_states = rows + 1, torch.cat([grad_states, grad_final_state.unsqueeze(1)], dim=1)
    flat = grad_states.flatten(2)
    grad_sums = (masks.inter_chunk[:, :rows].mT @ flat).unflatten(2, grad_states.shape[2:]).flatten(0, 1)
    has_initial_state = None if masks.has_initial_state is None else masks.has_initial_state[:, :rows]
    grad_state = _masked(flat, has_initial_state).sum(1).view(-1, *grad_states.shape[2:])

    # The chunk's sum is E [Z, 1]: e gets grad_N Z^T + grad_D, z gets E^T grad_N. e is in D of its own chunk, too.
    grad_e = _masked_transposed(torch.bmm(grad_sums[..., :-1], z.mT).add_(grad_sums[..., -1:]), masks.in_chunk_sum)
    grad_e = grad_e.add_(torch.matmul(grad_d, masks.intra_chunk))
    grad_z = _masked(torch.bmm(e.mT, grad_sums[..., :-1]), masks.in_chunk_sum)
    # And inside the chunk, by each reader: z gets ((Y^T E) . L)^T X, e gets Y ((X Z^T) . L).
    while readers:  # Taken from the list, so that the memory of one is free for the next.
        x, y, inside_x, inside_y = readers.pop()
        if inside_y is None:
            inside_y = torch.bmm(y.mT, e).mul_(masks.intra_chunk)
        grad_z.baddbmm_(inside_y.mT, x)
        grad_e.baddbmm_(y, inside_x)
    return grad_z, grad_q, grad_e.mT, grad_state, grad_parameter
