"""TRL's asynchronous trainers without a GPU, and without vLLM in their own process, which uses none of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from trl.experimental import async_distillation, async_grpo
from trl.experimental.async_grpo import packing


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    *_: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """FlashAttention's `flash_attn_varlen_func`: the queries of a sequence are its last tokens."""
    assert causal and window_size == (-1, -1)
    written = []
    for q, k, end_q, end_k in zip(
        starts_q.tolist(), starts_k.tolist(), starts_q.tolist()[1:], starts_k.tolist()[1:], strict=False
    ):
        mask = torch.ones(end_q - q, end_k - k, dtype=torch.bool).tril(end_k - k - (end_q - q))
        parts = (query[q:end_q], key[k:end_k], value[k:end_k])
        heads = [part.transpose(0, 1) for part in parts]
        attended = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
        written.append(attended.transpose(0, 1))
    return torch.cat(written)


def run_on_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute AsyncGRPO's attention with torch, and let both trainers ask for no GPU's peak speed and no vLLM."""
    monkeypatch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=_attend))
    packing.register_tree_attention()
    for package, trainer in ((async_grpo, "async_grpo_trainer"), (async_distillation, "async_distillation_trainer")):
        monkeypatch.setattr(f"{package.__name__}.{trainer}.get_peak_flops_per_device", lambda *_: None)
        monkeypatch.setattr(f"{package.__name__}.async_rollout_worker.is_vllm_available", lambda: True)
