"""The two promises that matter most, on a model so small that they take a moment."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

from ..config import TalanConfig

TOKENS = 12


class Difference(NamedTuple):
    """What two ways to the same logits differ by.

    Args:
        passed: Whether they are as equal as was promised.
        note: One line.
    """

    passed: bool
    note: str


def _base() -> Any:
    config = Qwen3Config(
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
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def _adapted(config: LoraConfig, dtype: torch.dtype = torch.float32) -> Any:
    base = _base()
    torch.manual_seed(1)
    return get_peft_model(base, config).to(dtype).eval()


def _tokens() -> torch.Tensor:
    return torch.arange(TOKENS)[None] % 7 + 2


@torch.no_grad()
def fresh_equals_lora() -> Difference:
    """Compare a fresh adapter with its matched LoRA adapter, bitwise.

    Returns:
        The difference.
    """
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "init_lora_weights": False}
    with torch.random.fork_rng():
        lora = _adapted(LoraConfig(**options))(_tokens()).logits
        talan = _adapted(TalanConfig(**options))(_tokens()).logits
    same = torch.equal(lora, talan)
    return Difference(same, "bitwise" if same else f"they differ by {float((lora - talan).abs().max()):.1e}")


@torch.no_grad()
def cached_equals_uncached() -> Difference:
    """Compare tokens that are fed one by one, with a cache, with the whole sequence at once, in float64.

    Returns:
        The difference.
    """
    with torch.random.fork_rng():
        config = TalanConfig(task_type="CAUSAL_LM", talan_layers="all", init_talan_weights=False)
        model = _adapted(config, torch.float64)
    whole = model(_tokens(), use_cache=False).logits
    cache, steps = None, []
    for token in _tokens().split(1, dim=1):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    difference = float((torch.cat(steps, dim=1) - whole).abs().max())
    bound = 512 * torch.finfo(torch.float64).eps * float(whole.abs().max())
    return Difference(difference <= bound, f"largest difference {difference:.1e} in float64")
