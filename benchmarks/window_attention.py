"""A sliding window's attention whose memory grows with the tokens: transformers' own has a square mask on processors.

Importing this makes `attn_implementation="windows"` known to transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv


def _pieces(tensor: torch.Tensor, window: int) -> torch.Tensor:
    """Cut [batch, heads, tokens, dim] into pieces of a window: [batch, pieces, heads, window, dim]."""
    padded = pad(tensor, (0, 0, 0, -tensor.shape[2] % window))
    return padded.unflatten(2, (-1, window)).transpose(1, 2)


def _of_whole_text(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scaling: float | None
) -> torch.Tensor:
    """Each piece of the text attends to itself and to the piece before it, as far as the window goes."""
    q, k, v = (_pieces(tensor, window) for tensor in (query, key, value))
    first = scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], is_causal=True, scale=scaling)
    place = torch.arange(2 * window, device=query.device)
    ago = place[window:, None] - place
    keys, values = (torch.cat([part[:, :-1], part[:, 1:]], dim=3).flatten(0, 1) for part in (k, v))
    seen = (ago >= 0) & (ago < window)
    later = scaled_dot_product_attention(q[:, 1:].flatten(0, 1), keys, values, attn_mask=seen, scale=scaling)
    attended = torch.cat([first.unsqueeze(1), later.unflatten(0, (len(query), -1))], dim=1)
    return attended.transpose(1, 2).flatten(2, 3)[:, :, : query.shape[2]]


def window_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend to the last keys: in a whole text without padding, or as one token with the keys that a cache kept."""
    key, value = (repeat_kv(tensor, query.shape[1] // tensor.shape[1]) for tensor in (key, value))
    tokens = query.shape[2]
    if attention_mask is not None or tokens not in (1, key.shape[2]):
        raise ValueError("window_attention takes a whole text without padding, or one token; use 'sdpa' for others")
    if sliding_window < tokens:
        attended = _of_whole_text(query, key, value, sliding_window, scaling)
    else:
        attended = scaled_dot_product_attention(query, key, value, is_causal=tokens > 1, scale=scaling)
    return attended.transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Which keys a token sees, `window_attention` knows."""


AttentionInterface.register("windows", window_attention)
AttentionMaskInterface.register("windows", _no_mask)
