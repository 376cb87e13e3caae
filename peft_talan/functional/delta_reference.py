"""The memory of the `delta` mixer, token by token: the oracle of `delta`.

A memory of keys and values (Schlag et al., arXiv 2102.11174) with a gate that forgets (Gated DeltaNet, arXiv
2412.06464) and, apart, one that erases and one that writes.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .parameters import DELTA_GATES, NORM_EPSILON


def normalised(tensor: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1; what is nearly zero stays so."""
    return tensor * torch.rsqrt(tensor.square().sum(-1, keepdim=True) + NORM_EPSILON)


def delta_weights(logits: torch.Tensor, bias: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Turn gates' logits and keys into what a token does to the memory.

    Args:
        logits: Of writing, erasing and forgetting, and then the key, [batch, tokens, 3 + slots].
        bias: Added to the three logits, [3].
        valid: [batch, tokens], bool; False keeps a token (padding) out of the memory. None: all are real.

    Returns:
        w and b in (0, 1], log a and the key k of length 1, [batch, tokens, 3 + slots]; padding is zero, and so
        writes, erases and forgets nothing.
    """
    gates, keys = logits[..., :DELTA_GATES] + bias.to(logits.dtype), logits[..., DELTA_GATES:]
    # Never zero: that is how records tell padding.
    open_gates = torch.sigmoid(gates[..., :2]).clamp_min(torch.finfo(logits.dtype).tiny)
    weights = torch.cat([open_gates, F.logsigmoid(-gates[..., 2:]), normalised(keys)], dim=-1)
    return weights if valid is None else weights * valid.unsqueeze(-1)


def split_weights(weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """w, b and log a, [batch, tokens, 1], and k, [batch, tokens, slots], of what `delta_weights` returns."""
    return weights.split([1, 1, 1, weights.shape[-1] - DELTA_GATES], dim=-1)


def compress(
    values: torch.Tensor,
    weights: torch.Tensor,
    segment_ids: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Update the memory by each token: forget, erase what its key reads, write its value.

    `S[t] = a S[t-1] + k (w v - b a S[t-1]^T k)^T`, where S[t-1] is zero at the start of a segment. With b = w this is
    the gated delta rule; with b = 0 values add up.

    Args:
        values: v, [batch, tokens, width].
        weights: As `delta_weights` returns them.
        segment_ids: As in `slot_reference.compress`.
        state: The memory of earlier tokens, [batch, slots, width]; None: empty.

    Returns:
        The memory each token sees, [batch, tokens, slots, width], and that after the last one, [batch, slots, width].
    """
    write, erase, log_kept, keys = split_weights(weights)
    memory = values.new_zeros(values.shape[0], keys.shape[-1], values.shape[-1]) if state is None else state
    seen: list[torch.Tensor] = []
    for t in range(values.shape[1]):
        if segment_ids is not None:
            continues = segment_ids[:, t] == (segment_ids[:, t - 1] if t else 0)
            memory = memory * continues[:, None, None]
        kept = log_kept[:, t].exp().unsqueeze(-1) * memory
        read = torch.einsum("bm,bmd->bd", keys[:, t].to(kept.dtype), kept)
        added = write[:, t] * values[:, t] - erase[:, t] * read
        memory = kept + torch.einsum("bm,bd->bmd", keys[:, t].to(added.dtype), added)
        seen.append(memory)
    return torch.stack(seen, dim=1) if seen else memory.unsqueeze(1)[:, :0], memory


def scaled(readouts: torch.Tensor) -> torch.Tensor:
    """Read-outs of mean square 1, whatever the gates let in; what is nearly zero stays so."""
    return readouts * torch.rsqrt(readouts.square().mean(-1, keepdim=True) + NORM_EPSILON)


def mix_delta(memory: torch.Tensor, queries: torch.Tensor, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Read the memory by a query of length 1, and scale what is read: `r = RMSNorm(S^T q / |q|)`.

    Args:
        memory: S, [batch, tokens, slots, width].
        queries: q, [batch, tokens, slots].
        parameters: Not read.

    Returns:
        r, [batch, tokens, width].
    """
    return scaled(torch.einsum("btm,btmd->btd", normalised(queries), memory))
