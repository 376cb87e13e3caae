"""The two promises that matter most, on a model so small that they take a moment."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

from ..config import TalanConfig


def _adapted(config: LoraConfig) -> Any:
    size = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(size)
        torch.manual_seed(1)
        return get_peft_model(base, config).eval()


def _tokens() -> torch.Tensor:
    return torch.arange(12)[None] % 7 + 2


@torch.no_grad()
def fresh_equals_lora() -> tuple[bool, str]:
    """Compare a fresh adapter with its matched LoRA adapter, bitwise; whether they are equal, and the difference."""
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "init_lora_weights": False}
    lora, talan = (_adapted(config(**options))(_tokens()).logits for config in (LoraConfig, TalanConfig))
    same = torch.equal(lora, talan)
    return same, "bitwise" if same else f"they differ by {float((lora - talan).abs().max()):.1e}"


@torch.no_grad()
def cached_equals_uncached() -> tuple[bool, str]:
    """Compare logits of a generation with and without a cache, in float64, as `fresh_equals_lora` does."""
    model = _adapted(TalanConfig(task_type="CAUSAL_LM", talan_layers="all", init_talan_weights=False)).double()
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, whole = (
        torch.stack(model.generate(_tokens(), use_cache=use_cache, **options).logits) for use_cache in (True, False)
    )
    difference = float((cached - whole).abs().max())
    bound = 512 * torch.finfo(torch.float64).eps * float(whole.abs().max())
    return difference <= bound, f"largest difference {difference:.1e} in float64"
