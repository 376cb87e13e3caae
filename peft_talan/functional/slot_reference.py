"""The memory of slots that are means of tokens, and how a token reads them: the oracle of the mixers but `delta`."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def slot_weights(logits: torch.Tensor, valid: torch.Tensor | None, soft_cap: float = 5.0) -> torch.Tensor:
    """Turn slot logits into the positive weights by which tokens enter the memory.

    `e[t, m] = valid[t] exp(c tanh(a[t, m] / c))`.

    Args:
        logits: a, [batch, tokens, slots].
        valid: [batch, tokens], bool; False keeps a token (padding) out of the memory. Numbers: how many tokens each
            stands for. None: all are real, and stand for one.
        soft_cap: c. Default 5.

    Returns:
        e, [batch, tokens, slots].
    """
    weights = torch.exp(soft_cap * torch.tanh(logits / soft_cap))
    return weights if valid is None else weights * valid.unsqueeze(-1)


def compress(
    values: torch.Tensor,
    weights: torch.Tensor,
    segment_ids: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    scope: str = "causal",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the latents of a segment into the memory that each token sees.

    `N[t, m] = sum_i e[i, m] z[i]`, `D[t, m] = sum_i e[i, m]`, over the tokens i of t's segment; for the causal scope
    over i <= t only. N and D are one tensor, D being the last channel.

    Args:
        values: z, [batch, tokens, width].
        weights: e, [batch, tokens, slots].
        segment_ids: [batch, tokens], int, not falling and starting at 0; None: one segment. The state belongs to
            segment 0.
        state: The memory of earlier tokens, [batch, slots, width + 1]; None: empty.
        scope: `causal` or `bidirectional`.

    Returns:
        The memory each token sees, [batch, tokens, slots, width + 1], and that after the last token,
        [batch, slots, width + 1].
    """
    batch, tokens = values.shape[:2]
    contributions = weights.unsqueeze(-1) * F.pad(values, (0, 1), value=1.0).unsqueeze(-2)
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=values.device)
    if scope == "causal":
        visible = visible.tril()
    visible = visible.expand(batch, tokens, tokens)
    if segment_ids is not None:
        visible = visible & (segment_ids.unsqueeze(1) == segment_ids.unsqueeze(2))
    if segment_ids is None and scope == "causal":
        memory = contributions.cumsum(1)
    else:
        memory = torch.einsum("bti,bimd->btmd", visible.to(values.dtype), contributions)
    if state is not None:
        carried = state.unsqueeze(1).expand_as(memory)
        if segment_ids is not None:
            carried = carried * (segment_ids == 0)[..., None, None].to(values.dtype)
        memory = memory + carried
    if tokens == 0:
        empty = values.new_zeros(batch, weights.shape[2], values.shape[2] + 1)
        return memory, empty if state is None else state
    # With a causal scope, the last token has seen the whole of its segment; with the other one, every token has.
    return memory, memory[:, -1]


def attend_to_slots(memory: torch.Tensor, queries: torch.Tensor, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Weigh the slots for each token: `p = softmax_m(q . mu[m] / sqrt(d) + b[m])`.

    Args:
        memory: mu, [batch, tokens, slots, width].
        queries: q, [batch, tokens, width].
        parameters: (slot bias b [slots],).

    Returns:
        p, [batch, tokens, slots].
    """
    scores = torch.einsum("btd,btmd->btm", queries, memory) / math.sqrt(queries.shape[-1])
    return (scores + parameters[0].to(memory.dtype)).softmax(-1)


def mix_attention(memory: torch.Tensor, queries: torch.Tensor, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Read the slots by attention: `r = sum_m p[m] mu[m]`, p and arguments of `attend_to_slots`."""
    return torch.einsum("btm,btmd->btd", attend_to_slots(memory, queries, parameters), memory)


def mix_linear(memory: torch.Tensor, queries: torch.Tensor, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Read the slots by weights of the token alone: `p = q B`, `r = sum_m p[m] mu[m]`, B of shape [width, slots]."""
    return torch.einsum("btm,btmd->btd", queries @ parameters[0].to(memory.dtype), memory)


def remix_slots(memory: torch.Tensor, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Remix the slots, then the channels, by small residual MLPs (MLP-Mixer, arXiv 2105.01601).

    `mu <- mu + S_out gelu(S_in mu)` across slots, then `mu <- mu + gelu(mu C_in^T) C_out^T` across channels.

    Args:
        memory: mu, [batch, tokens, slots, width].
        parameters: (slot bias [slots], S_in [hidden, slots], S_out [slots, hidden], C_in [hidden, width],
            C_out [width, hidden]).

    Returns:
        mu, [batch, tokens, slots, width].
    """
    _, slot_in, slot_out, channel_in, channel_out = (tensor.to(memory.dtype) for tensor in parameters)
    memory = memory + slot_out @ F.gelu(slot_in @ memory)
    return memory + F.gelu(memory @ channel_in.mT) @ channel_out.mT


def mix_mlp(memory: torch.Tensor, queries: torch.Tensor, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Read the slots that `remix_slots` returns as `attention` does; parameters: as in `remix_slots`."""
    return mix_attention(remix_slots(memory, parameters), queries, parameters)
