"""The causal memory read by matrix products over chunks of tokens, with a backward pass written by hand.

Nothing of shape [tokens, slots, width] is made: a token sees the sum S over earlier chunks and, inside its own chunk,
a masked [chunk, chunk] product. Everything that has a slot is laid out [slots, chunk]: a product or a softmax then
runs along the tokens, of which there are many, and not along the slots, of which there are few.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .parameters import SMALLEST_DENOMINATOR

CHUNK = 32
"""Tokens a chunk: a token costs this many multiplications inside its chunk, and slots x width outside of it."""


class Plan(NamedTuple):
    """Which tokens see which, in one slab. `sequences` is the batch, `items` is sequences x chunks.

    Args:
        visible: [1 or items, chunk, chunk], float: 1 where row t sees column i of the same chunk.
        carries: [1 or sequences, chunks + 1, chunks], float: 1 where the sum at the start of chunk c has chunk c' in
            it; the last row is the sum after the slab.
        from_state: [sequences, chunks + 1, 1, 1], float: 1 where that sum has the initial state in it; None: all.
        from_carry: [items, chunk, 1], float: 1 where t's segment is that of the sum at its chunk's start; None: all.
        to_carry: [items, chunk, 1], float: 1 where i's segment is the last one of its chunk; None: all.
    """

    visible: torch.Tensor
    carries: torch.Tensor
    from_state: torch.Tensor | None = None
    from_carry: torch.Tensor | None = None
    to_carry: torch.Tensor | None = None


class Slab(NamedTuple):
    """One slab, cut into chunks and padded with tokens of no weight.

    Args:
        z: [items, chunk, width].
        q: [items, chunk, width].
        e: [items, slots, chunk].
        plan: Which tokens see which.
        s: S, what a chunk finds in the memory when it begins, [items, slots, width].
        d: D, the denominators, [items, slots, chunk].
        final_state: The memory after the slab, [sequences, slots, width + 1].
    """

    z: torch.Tensor
    q: torch.Tensor
    e: torch.Tensor
    plan: Plan
    s: torch.Tensor
    d: torch.Tensor
    final_state: torch.Tensor


def make_plan(segment_ids: torch.Tensor | None, chunks: int, chunk: int, like: torch.Tensor) -> Plan:
    """Lay out the masks of a slab.

    Args:
        segment_ids: [sequences, chunks * chunk], int, not falling; the initial state belongs to segment 0. None: one
            segment.
        chunks: Chunks in the slab.
        chunk: Tokens a chunk.
        like: A tensor whose dtype and device the masks take.

    Returns:
        The masks.
    """
    triangle = torch.ones(1, chunk, chunk, dtype=like.dtype, device=like.device).tril()
    earlier = torch.ones(1, chunks + 1, chunks, dtype=like.dtype, device=like.device).tril(-1)
    if segment_ids is None:
        return Plan(triangle, earlier)
    ids = segment_ids.unflatten(1, (chunks, chunk))
    last = ids[:, :, -1]
    before = F.pad(last, (1, 0))
    visible = ids.unsqueeze(-1) == ids.unsqueeze(-2)
    return Plan(
        visible=visible.flatten(0, 1) * triangle,
        carries=(before.unsqueeze(-1) == last.unsqueeze(-2)) * earlier,
        from_state=(before == 0).to(like.dtype)[..., None, None],
        from_carry=(ids == before[:, :-1, None]).to(like.dtype).flatten(0, 1).unsqueeze(-1),
        to_carry=(ids == last.unsqueeze(-1)).to(like.dtype).flatten(0, 1).unsqueeze(-1),
    )


def _masked(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return tensor if mask is None else tensor * mask


def part_of(tensor: torch.Tensor, piece: slice) -> torch.Tensor:
    """Some of the tokens of [sequences, tokens, channels], without an operation if they are all of them."""
    return tensor if piece.start == 0 and piece.stop == tensor.shape[1] else tensor[:, piece]


def to_chunks(tensor: torch.Tensor, chunk: int) -> torch.Tensor:
    """Give [sequences, tokens, channels] as [items, chunk, channels], padded with zeros."""
    missing = -tensor.shape[1] % chunk
    if missing:
        tensor = F.pad(tensor, (0, 0, 0, missing))
    return tensor.reshape(-1, chunk, tensor.shape[-1])


def to_tokens(tensor: torch.Tensor, sequences: int, tokens: int) -> torch.Tensor:
    """Take back what `to_chunks` did."""
    return part_of(tensor.reshape(sequences, -1, tensor.shape[-1]), slice(0, tokens))


def cut_slab(
    values: torch.Tensor,
    queries: torch.Tensor,
    weights: torch.Tensor,
    state: torch.Tensor,
    segment_ids: torch.Tensor | None,
) -> Slab:
    """Cut a slab into chunks and sum the memory that each of them finds.

    Args:
        values: z, [sequences, tokens, width].
        queries: q, [sequences, tokens, width].
        weights: e, [sequences, tokens, slots].
        state: [sequences, slots, width + 1].
        segment_ids: [sequences, tokens], counted from the state's segment; None: one segment.

    Returns:
        The slab.
    """
    sequences, tokens, _ = values.shape
    chunk = min(CHUNK, tokens)
    z, q, e = to_chunks(values, chunk), to_chunks(queries, chunk), to_chunks(weights, chunk).mT.contiguous()
    chunks = z.shape[0] // sequences
    if segment_ids is not None and tokens % chunk:
        segment_ids = torch.cat([segment_ids, segment_ids[:, -1:].expand(-1, -tokens % chunk)], dim=1)
    plan = make_plan(segment_ids, chunks, chunk, values)
    entering = _masked(e, None if plan.to_carry is None else plan.to_carry.mT)
    own = torch.cat([torch.bmm(entering, z), entering.sum(-1, keepdim=True)], dim=-1).unflatten(0, (sequences, chunks))
    sums = (plan.carries @ own.flatten(2)).unflatten(2, own.shape[2:]) + _masked(state.unsqueeze(1), plan.from_state)
    found = sums[:, :-1].flatten(0, 1)
    # D[t] = sum_{i <= t} e[i]: inside the chunk E L^T, and what the chunk found.
    inside = torch.matmul(e, plan.visible.mT)
    d = inside.add_(found[..., -1:] if plan.from_carry is None else found[..., -1:] * plan.from_carry.mT)
    return Slab(z, q, e, plan, found[..., :-1], d.clamp_min_(SMALLEST_DENOMINATOR), sums[:, -1])


def _products(x: torch.Tensor, slab: Slab, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(X Z^T) . L, [items, chunk, chunk], and with it x[t] . N[t, m], scaled, as E ((X Z^T) . L)^T + S X^T."""
    inside = torch.bmm(x, slab.z.mT).mul_(slab.plan.visible)
    carried = torch.bmm(slab.s, _masked(x, slab.plan.from_carry).mT)
    return inside, carried.baddbmm_(slab.e, inside.mT, beta=scale, alpha=scale)


def _readouts(y: torch.Tensor, slab: Slab) -> tuple[torch.Tensor, torch.Tensor]:
    """(Y^T E) . L, [items, chunk, chunk], and with it sum_m y[m, t] N[t, m] as ((Y^T E) . L) Z + Y^T S."""
    inside = torch.bmm(y.mT, slab.e).mul_(slab.plan.visible)
    carried = _masked(torch.bmm(y.mT, slab.s), slab.plan.from_carry)
    return inside, carried.baddbmm_(inside, slab.z)


class Probabilities(NamedTuple):
    """How much each token reads from each slot.

    Args:
        p: [items, slots, chunk].
        w: p / D.
        inside: For `attention` (Q Z^T) . L, [items, chunk, chunk], which the backward pass needs.
        scores: For `attention` s / (D sqrt(d)), [items, slots, chunk], likewise.
    """

    p: torch.Tensor
    w: torch.Tensor
    inside: torch.Tensor | None = None
    scores: torch.Tensor | None = None


def probabilities(slab: Slab, mixer: str, parameter: torch.Tensor) -> Probabilities:
    """Weigh the slots.

    Args:
        slab: The slab.
        mixer: `attention` or `linear`.
        parameter: The mixer's one tensor.

    Returns:
        The probabilities of `attention`, or the weights of `linear`.
    """
    if mixer == "linear":
        p = torch.matmul(parameter.mT, slab.q.mT)
        return Probabilities(p, p / slab.d)
    inside, scores = _products(slab.q, slab, 1 / math.sqrt(slab.q.shape[-1]))
    scores = scores.div_(slab.d)
    p = torch.softmax(scores + parameter.unsqueeze(-1), dim=1)
    return Probabilities(p, p / slab.d, inside, scores)


def forward_slab(slab: Slab, read: Probabilities) -> torch.Tensor:
    """Give the read-outs r, [items, chunk, width]."""
    return _readouts(read.w, slab)[1]


def backward_slab(
    slab: Slab,
    read: Probabilities,
    parameter: torch.Tensor,
    grad_r: torch.Tensor,
    grad_final_state: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Give the gradients of z, q, e (laid out as the tokens), the initial state and the mixer's parameter.

    With u[t, m] = grad_r[t] . N[t, m] and w = p / D, a token's memory gets
    grad_N[t, m] = w[t, m] grad_r[t] + grad_s[t, m] q[t] and grad_D = -(w u + grad_s s) / D.
    """
    z, q, e, plan, _, d, _ = slab
    p, _, inside_q, scores = read
    inside_r, u = _products(grad_r, slab)
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
        inside_s, grad_q = _readouts(grad_s, slab)
        readers.append((q, grad_s, inside_q, inside_s))
        del inside_s  # only the list has it now
    grad_d.div_(d)

    # A chunk's readers reach, through S and through D, all the chunks that S is the sum of.
    found, *others = (torch.bmm(y, _masked(x, plan.from_carry)) for x, y, _, _ in readers)
    grad_found = sum(others, found)
    asked = grad_d if plan.from_carry is None else grad_d * plan.from_carry.mT
    grad_found = torch.cat([grad_found, asked.sum(-1, keepdim=True)], dim=-1).unflatten(0, (-1, plan.carries.shape[2]))
    carries, grad_sums = plan.carries[:, :-1], grad_found
    if grad_final_state is not None:
        carries, grad_sums = plan.carries, torch.cat([grad_found, grad_final_state.unsqueeze(1)], dim=1)
    grad_own = (carries.mT @ grad_sums.flatten(2)).unflatten(2, grad_sums.shape[2:]).flatten(0, 1)
    from_state = None if plan.from_state is None else plan.from_state[:, : grad_sums.shape[1]]
    grad_state = _masked(grad_sums, from_state).sum(1)

    later = torch.bmm(grad_own[..., :-1], z.mT).add_(grad_own[..., -1:])
    grad_e = _masked(later, None if plan.to_carry is None else plan.to_carry.mT).add_(
        torch.matmul(grad_d, plan.visible)
    )
    grad_z = _masked(torch.bmm(e.mT, grad_own[..., :-1]), plan.to_carry)
    while readers:  # Taken from the list, so that the memory of one is free for the next.
        x, y, inside_x, inside_y = readers.pop()
        if inside_y is None:
            inside_y = torch.bmm(y.mT, e).mul_(plan.visible)
        grad_z.baddbmm_(inside_y.mT, x)
        grad_e.baddbmm_(y, inside_x)
    return grad_z, grad_q, grad_e.mT, grad_state, grad_parameter
