"""The causal memory as matrix products over chunks of tokens, with backward passes written by hand.

Both products come from one trilinear form, `F = sum_t sum_m sum_{i <= t} y[t, m] e[i, m] (x[t] . z[i])`: the scores
are its derivative by y, the read-outs its derivative by x. So each one's backward pass is made of the other and of
`_derivatives_of_memory`. Nothing of shape [tokens, slots, width] is made: a token sees the sum S over earlier chunks
and, inside its own chunk, a masked [chunk, chunk] product. The chunk-local products are computed again in backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

CHUNK = 64
"""Tokens a chunk: the products inside a chunk cost as many multiplications a token."""


class ChunkPlan(NamedTuple):
    """Which tokens see which, for tensors of shape [batch, chunks, chunk, ...].

    Args:
        visible: [batch or 1, chunks or 1, chunk, chunk], float: 1 where row t sees column i of the same chunk.
        from_carry: [batch, chunks, chunk, 1], float: 1 where t belongs to the segment that the carried sum is of;
            None: everywhere.
        to_carry: [batch, chunks, chunk, 1], float: 1 where i is in the last segment of its chunk; None: everywhere.
        carries: [batch, chunks, chunks], float: 1 where chunk c carries the sum of chunk c'; None: of all c' < c.
        from_state: [batch, chunks, 1, 1], float: 1 where the carried sum includes the initial state; None: everywhere.
    """

    visible: torch.Tensor
    from_carry: torch.Tensor | None = None
    to_carry: torch.Tensor | None = None
    carries: torch.Tensor | None = None
    from_state: torch.Tensor | None = None


def split_into_chunks(tensor: torch.Tensor, chunk: int) -> torch.Tensor:
    """Pad [batch, tokens, channels] with zeros and view it as [batch, chunks, chunk, channels]."""
    batch, tokens, channels = tensor.shape
    missing = -tokens % chunk
    if missing:
        tensor = torch.cat([tensor, tensor.new_zeros(batch, missing, channels)], dim=1)
    return tensor.reshape(batch, -1, chunk, channels)


def make_plan(segment_ids: torch.Tensor | None, tokens: int, chunk: int, like: torch.Tensor) -> ChunkPlan:
    """Lay out the masks of a causal pass.

    Args:
        segment_ids: [batch, tokens], int, not falling; the initial state belongs to segment 0. None: one segment.
        tokens: The number of tokens.
        chunk: Tokens a chunk.
        like: A tensor whose dtype and device the masks take.

    Returns:
        The masks.
    """
    triangle = torch.ones(chunk, chunk, dtype=like.dtype, device=like.device).tril()
    if segment_ids is None:
        return ChunkPlan(triangle)
    missing = -tokens % chunk
    if missing:
        segment_ids = torch.cat([segment_ids, segment_ids[:, -1:].expand(-1, missing)], dim=1)
    ids = segment_ids.reshape(segment_ids.shape[0], -1, chunk)
    last = ids[..., -1]
    before = torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], dim=1)
    chunks = ids.shape[1]
    earlier = torch.ones(chunks, chunks, dtype=torch.bool, device=like.device).tril(-1)
    return ChunkPlan(
        visible=(ids.unsqueeze(-1) == ids.unsqueeze(-2)).to(like.dtype) * triangle,
        from_carry=(ids == before.unsqueeze(-1)).to(like.dtype).unsqueeze(-1),
        to_carry=(ids == last.unsqueeze(-1)).to(like.dtype).unsqueeze(-1),
        carries=((before.unsqueeze(-1) == last.unsqueeze(-2)) & earlier).to(like.dtype),
        from_state=(before == 0).to(like.dtype)[..., None, None],
    )


def _masked(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return tensor if mask is None else tensor * mask


def _carried(e: torch.Tensor, z: torch.Tensor, state: torch.Tensor | None, plan: ChunkPlan) -> torch.Tensor:
    """S, [batch, chunks, slots, width]: what a chunk finds in the memory when it begins."""
    sums = _masked(e, plan.to_carry).mT @ z
    if plan.carries is None:
        carried = F.pad(sums[:, :-1].cumsum(1), (0, 0, 0, 0, 1, 0))
    else:
        carried = (plan.carries @ sums.flatten(2)).view_as(sums)
    return carried if state is None else carried + _masked(state.unsqueeze(1), plan.from_state)


def _scores(x: torch.Tensor, z: torch.Tensor, e: torch.Tensor, carried: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    """s[t, m] = x[t] . N[t, m] as ((X Z^T) . L) E + X S^T."""
    inside = (x @ z.mT).mul_(plan.visible) @ e
    return inside.add_(_masked(x @ carried.mT, plan.from_carry))


def _readouts(
    y: torch.Tensor, z: torch.Tensor, e: torch.Tensor, carried: torch.Tensor, plan: ChunkPlan
) -> torch.Tensor:
    """r[t] = sum_m y[t, m] N[t, m] as ((Y E^T) . L) Z + Y S."""
    inside = (y @ e.mT).mul_(plan.visible) @ z
    return inside.add_(_masked(y @ carried, plan.from_carry))


def _derivatives_of_memory(
    x: torch.Tensor,
    y: torch.Tensor,
    z: torch.Tensor,
    e: torch.Tensor,
    has_state: bool,
    plan: ChunkPlan,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The derivatives of the trilinear form by z, by e and by the initial state."""
    sums = _masked(y, plan.from_carry).mT @ x
    if plan.carries is None:
        later = F.pad(sums[:, 1:].flip(1).cumsum(1).flip(1), (0, 0, 0, 0, 0, 1))
    else:
        later = (plan.carries.mT @ sums.flatten(2)).view_as(sums)
    grad_z = (y @ e.mT).mul_(plan.visible).mT @ x
    grad_z.add_(_masked(e @ later, plan.to_carry))
    grad_e = (x @ z.mT).mul_(plan.visible).mT @ y
    grad_e.add_(_masked(z @ later.mT, plan.to_carry))
    grad_state = _masked(sums, plan.from_state).sum(1) if has_state else None
    return grad_z, grad_e, grad_state


class MemoryScores(torch.autograd.Function):
    """`s[t, m] = x[t] . N[t, m]` for every token t, over chunked tensors."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, z: torch.Tensor, e: torch.Tensor, state: torch.Tensor | None, *plan: Any
    ) -> torch.Tensor:
        """Compute the scores.

        Args:
            ctx: The autograd context.
            x: [batch, chunks, chunk, width].
            z: [batch, chunks, chunk, width].
            e: [batch, chunks, chunk, slots].
            state: N before the first token, [batch, slots, width]; None: empty.
            *plan: The fields of the `ChunkPlan`.

        Returns:
            s, [batch, chunks, chunk, slots].
        """
        masks = ChunkPlan(*plan)
        ctx.save_for_backward(x, z, e, state, *plan)
        return _scores(x, z, e, _carried(e, z, state, masks), masks)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        """Compute the derivatives by x, z, e and the state."""
        x, z, e, state, *plan = ctx.saved_tensors
        masks = ChunkPlan(*plan)
        grad_s = grad_outputs[0]
        grad_x = _readouts(grad_s, z, e, _carried(e, z, state, masks), masks)
        grad_z, grad_e, grad_state = _derivatives_of_memory(x, grad_s, z, e, state is not None, masks)
        return grad_x, grad_z, grad_e, grad_state, *([None] * len(plan))


class MemoryReadouts(torch.autograd.Function):
    """`r[t] = sum_m y[t, m] N[t, m]` for every token t, over chunked tensors."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, z: torch.Tensor, e: torch.Tensor, state: torch.Tensor | None, *plan: Any
    ) -> torch.Tensor:
        """Compute the read-outs.

        Args:
            ctx: The autograd context.
            y: [batch, chunks, chunk, slots].
            z: [batch, chunks, chunk, width].
            e: [batch, chunks, chunk, slots].
            state: N before the first token, [batch, slots, width]; None: empty.
            *plan: The fields of the `ChunkPlan`.

        Returns:
            r, [batch, chunks, chunk, width].
        """
        masks = ChunkPlan(*plan)
        ctx.save_for_backward(y, z, e, state, *plan)
        return _readouts(y, z, e, _carried(e, z, state, masks), masks)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        """Compute the derivatives by y, z, e and the state."""
        y, z, e, state, *plan = ctx.saved_tensors
        masks = ChunkPlan(*plan)
        grad_r = grad_outputs[0]
        grad_y = _scores(grad_r, z, e, _carried(e, z, state, masks), masks)
        grad_z, grad_e, grad_state = _derivatives_of_memory(grad_r, y, z, e, state is not None, masks)
        return grad_y, grad_z, grad_e, grad_state, *([None] * len(plan))
