"""The causal memory read by matrix products over chunks of tokens, with a backward pass written by hand.

Nothing of shape [tokens, slots, width] is made: a token sees the sum S over earlier chunks and, inside its own chunk,
a masked [chunk, chunk] product. Everything that has a slot is laid out [slots, chunk]: a product or a softmax then
runs along the tokens, of which there are many, and not along the slots, of which there are few.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional as F

from . import reference
from .parameters import SMALLEST_DENOMINATOR, full_precision

CHUNK = 32
"""Tokens a chunk: a token costs this many multiplications inside its chunk, and slots x width outside of it."""

SLAB = 4096
"""Tokens of all sequences that `ChunkwiseRemix` takes at a time: the temporaries stay in the processor's cache."""


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


def to_chunks(tensor: torch.Tensor, chunk: int) -> torch.Tensor:
    """Give [sequences, tokens, channels] as [items, chunk, channels], padded with zeros."""
    missing = -tensor.shape[1] % chunk
    if missing:
        tensor = F.pad(tensor, (0, 0, 0, missing))
    return tensor.unflatten(1, (-1, chunk)).flatten(0, 1)


def to_tokens(tensor: torch.Tensor, sequences: int, tokens: int) -> torch.Tensor:
    """Take back what `to_chunks` did."""
    return tensor.unflatten(0, (sequences, -1)).flatten(1, 2)[:, :tokens]


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
    own = torch.cat([entering @ z, entering.sum(-1, keepdim=True)], dim=-1).unflatten(0, (sequences, chunks))
    sums = (plan.carries @ own.flatten(2)).unflatten(2, own.shape[2:]) + _masked(state.unsqueeze(1), plan.from_state)
    found = sums[:, :-1].flatten(0, 1)
    # D[t] = sum_{i <= t} e[i]: inside the chunk E L^T, and what the chunk found.
    inside = torch.matmul(e, plan.visible.mT)
    d = inside.add_(found[..., -1:] if plan.from_carry is None else found[..., -1:] * plan.from_carry.mT)
    return Slab(z, q, e, plan, found[..., :-1], d.clamp_min_(SMALLEST_DENOMINATOR), sums[:, -1])


def _products(x: torch.Tensor, slab: Slab) -> tuple[torch.Tensor, torch.Tensor]:
    """(X Z^T) . L, [items, chunk, chunk], and with it x[t] . N[t, m] as E ((X Z^T) . L)^T + S X^T."""
    inside = torch.bmm(x, slab.z.mT).mul_(slab.plan.visible)
    carried = torch.bmm(slab.s, _masked(x, slab.plan.from_carry).mT)
    return inside, carried.baddbmm_(slab.e, inside.mT)


def _readouts(y: torch.Tensor, slab: Slab) -> tuple[torch.Tensor, torch.Tensor]:
    """(Y^T E) . L, [items, chunk, chunk], and with it sum_m y[m, t] N[t, m] as ((Y^T E) . L) Z + Y^T S."""
    inside = torch.bmm(y.mT, slab.e).mul_(slab.plan.visible)
    carried = _masked(torch.bmm(y.mT, slab.s), slab.plan.from_carry)
    return inside, carried.baddbmm_(inside, slab.z)


def _probabilities(
    slab: Slab, mixer: str, parameter: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """p; for `attention` also (Q Z^T) . L and s / (D sqrt(d)), which the backward pass needs."""
    if mixer == "linear":
        return torch.matmul(parameter.mT, slab.q.mT), None, None
    inside, scores = _products(slab.q, slab)
    scores = scores.div_(slab.d).div_(math.sqrt(slab.q.shape[-1]))
    return torch.softmax(scores + parameter.unsqueeze(-1), dim=1), inside, scores


def forward_slab(slab: Slab, mixer: str, parameter: torch.Tensor) -> torch.Tensor:
    """Give the read-outs r, [items, chunk, width]."""
    p, _, _ = _probabilities(slab, mixer, parameter)
    return _readouts(p / slab.d, slab)[1]


def backward_slab(
    slab: Slab, mixer: str, parameter: torch.Tensor, grad_r: torch.Tensor, grad_final_state: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Give the gradients of z, q, e (laid out as the tokens), the initial state and the mixer's parameter.

    With u[t, m] = grad_r[t] . N[t, m] and w = p / D, a token's memory gets
    grad_N[t, m] = w[t, m] grad_r[t] + grad_s[t, m] q[t] and grad_D = -(w u + grad_s s) / D.
    """
    z, q, e, plan, s, d, _ = slab
    p, inside_q, scores = _probabilities(slab, mixer, parameter)
    inside_r, u = _products(grad_r, slab)
    w, grad_p = p / d, u.div_(d)
    grad_d = (p * grad_p).neg_()
    # Each reader (x, y) puts y[m, t] x[t] into grad_N[t, m].
    readers = [(grad_r, w, inside_r, torch.bmm(w.mT, e).mul_(plan.visible))]
    if inside_q is None or scores is None:
        grad_q = torch.matmul(grad_p.mT, parameter.mT)
        grad_parameter = torch.matmul(grad_p, q).sum(0).mT
    else:
        # The mean that the softmax takes away, sum_m p grad_p, stands in grad_d with a minus.
        grad_logits = grad_p.add_(grad_d.sum(1, keepdim=True)).mul_(p)
        grad_parameter = grad_logits.sum((0, 2))
        grad_d.sub_(scores.mul_(grad_logits))
        grad_s = grad_logits.div_(d).div_(math.sqrt(q.shape[-1]))
        inside_s, grad_q = _readouts(grad_s, slab)
        readers.append((q, grad_s, inside_q, inside_s))
    grad_d.div_(d)

    # A chunk's readers reach, through S and through D, all the chunks that S is the sum of.
    grad_found = sum((torch.bmm(y, _masked(x, plan.from_carry)) for x, y, _, _ in readers), torch.zeros_like(s))
    asked = grad_d if plan.from_carry is None else grad_d * plan.from_carry.mT
    grad_found = torch.cat([grad_found, asked.sum(-1, keepdim=True)], dim=-1).unflatten(0, (-1, plan.carries.shape[2]))
    grad_sums = torch.cat([grad_found, grad_final_state.unsqueeze(1)], dim=1)
    grad_own = (plan.carries.mT @ grad_sums.flatten(2)).unflatten(2, grad_sums.shape[2:]).flatten(0, 1)
    grad_state = _masked(grad_sums, plan.from_state).sum(1)

    later = torch.bmm(grad_own[..., :-1], z.mT).add_(grad_own[..., -1:])
    grad_e = _masked(later, None if plan.to_carry is None else plan.to_carry.mT).add_(
        torch.matmul(grad_d, plan.visible)
    )
    grad_z = _masked(torch.bmm(e.mT, grad_own[..., :-1]), plan.to_carry)
    for x, y, inside_x, inside_y in readers:
        grad_z.baddbmm_(inside_y.mT, x)
        grad_e.baddbmm_(y, inside_x)
    return grad_z, grad_q, grad_e.mT, grad_state, grad_parameter


def _slabs(tokens: int, sequences: int) -> list[slice]:
    length = max(SLAB // sequences // CHUNK, 1) * CHUNK
    return [slice(start, min(start + length, tokens)) for start in range(0, tokens, length)]


def relative_segments(segment_ids: torch.Tensor | None, piece: slice) -> torch.Tensor | None:
    """The segments of one piece of the tokens, numbered from the one that the memory at its start is of.

    Args:
        segment_ids: [sequences, tokens], int, not falling; None: one segment.
        piece: Which tokens.

    Returns:
        [sequences, tokens of the piece], int, or None.
    """
    if segment_ids is None or piece.start == 0:
        return segment_ids if segment_ids is None else segment_ids[:, piece]
    return segment_ids[:, piece] - segment_ids[:, piece.start - 1 : piece.start]


def _put(part: torch.Tensor, piece: slice, whole: torch.Tensor | None) -> torch.Tensor:
    """Collect the parts of a tensor; the only part of a short sequence is the whole, without a copy."""
    if whole is None:
        return part
    whole[:, piece] = part
    return whole


def _differentiable_backward(ctx: Any, grad_outputs: tuple[Any, ...]) -> tuple[torch.Tensor | None, ...]:
    """The gradients as functions that autograd differentiates again: those of the readable equations."""
    values, queries, weights, segment_ids, parameter, state, *_ = ctx.saved_tensors
    inputs = (values, queries, weights, state, parameter)
    outputs = reference.remix(values, queries, weights, ctx.mixer, (parameter,), segment_ids, state)
    asked = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(outputs, asked, grad_outputs, create_graph=True, materialize_grads=True))
    *gradients, grad_parameter = (next(found) if tensor.requires_grad else None for tensor in inputs)
    return *gradients, None, None, grad_parameter


class ChunkwiseRemix(torch.autograd.Function):
    """`reference.remix` with a causal scope for the mixers that are linear in N: `attention` and `linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        queries: torch.Tensor,
        weights: torch.Tensor,
        state: torch.Tensor,
        segment_ids: torch.Tensor | None,
        mixer: str,
        parameter: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute read-outs and final memory, and keep the memory at each slab's start.

        Args:
            ctx: The autograd context.
            values: z, [sequences, tokens, width].
            queries: q, [sequences, tokens, width].
            weights: e, [sequences, tokens, slots].
            state: [sequences, slots, width + 1].
            segment_ids: [sequences, tokens] or None.
            mixer: `attention` or `linear`.
            parameter: The mixer's one tensor: slot bias [slots] or slot readout [width, slots].

        Returns:
            r, [sequences, tokens, width], and the final memory, [sequences, slots, width + 1].
        """
        sequences, tokens, _ = values.shape
        slabs = _slabs(tokens, sequences)
        readouts = values.new_empty(values.shape) if len(slabs) > 1 else None
        states = [state]
        for piece in slabs:
            slab = cut_slab(
                values[:, piece],
                queries[:, piece],
                weights[:, piece],
                states[-1],
                relative_segments(segment_ids, piece),
            )
            part = to_tokens(forward_slab(slab, mixer, parameter), sequences, piece.stop - piece.start)
            readouts = _put(part, piece, readouts)
            states.append(slab.final_state)
        ctx.mixer = mixer
        ctx.save_for_backward(values, queries, weights, segment_ids, parameter, *states[:-1])
        return cast("torch.Tensor", readouts), states[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        """Walk the slabs backwards; each is computed again from the memory at its start."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grad_outputs)  # create_graph=True
        values, queries, weights, segment_ids, parameter, *states = ctx.saved_tensors
        grad_readouts, grad_state = grad_outputs
        sequences, tokens, _ = values.shape
        slabs = _slabs(tokens, sequences)
        gradients = [
            tensor.new_empty(tensor.shape) if len(slabs) > 1 else None for tensor in (values, queries, weights)
        ]
        grad_parameter = torch.zeros_like(parameter)
        for piece, state in reversed(list(zip(slabs, states, strict=True))):
            # On a CPU, a backward pass inside of autocast runs under it.
            with full_precision(values.device.type):
                slab = cut_slab(
                    values[:, piece],
                    queries[:, piece],
                    weights[:, piece],
                    state,
                    relative_segments(segment_ids, piece),
                )
                grad_r = to_chunks(grad_readouts[:, piece], slab.z.shape[1])
                *by_item, grad_state, by_parameter = backward_slab(slab, ctx.mixer, parameter, grad_r, grad_state)
            parts = (to_tokens(gradient, sequences, piece.stop - piece.start) for gradient in by_item)
            gradients = [_put(part, piece, whole) for part, whole in zip(parts, gradients, strict=True)]
            grad_parameter = grad_parameter + by_parameter
        return *gradients, grad_state, None, None, grad_parameter
