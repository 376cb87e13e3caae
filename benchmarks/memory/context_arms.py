"""What reads a long text with how many bytes: all keys, those of a window, of a window and the first tokens, adapters.

A window that has sinks is a mask on the model with full attention: transformers has no cache for it. Tokens keep the
positions that they have in the text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache
from transformers.masking_utils import create_causal_mask, or_masks, sliding_window_overlay

from peft_talan import TalanConfig
from peft_talan.axes import RECALL_AXES
from peft_talan.sft.models import base_model_of, load_model, load_tokenizer
from peft_talan.sft.window import with_sliding_window

from ..training import adapted
from .generation import cache_bytes

FULL, WINDOW, SINKS, EQUAL = "full attention", "window", "window and sinks", "wider window, TALAN's bytes"
LORA, TALAN = "LoRA", "TALAN"
WIDER = {f"window, {times} times as wide": times for times in (2, 4, 8)}
UNTRAINED = (FULL, WINDOW, SINKS, EQUAL, *WIDER)
SINK_TOKENS = 4


@dataclass(frozen=True)
class Arm:
    """A model that reads texts; `window` and `sinks` are numbers of keys, `window=None` is all."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    window: int | None
    sinks: int = 0

    def state_bytes(self, tokens: int) -> dict[str, int]:
        """The bytes that a cache holds after a text of so many tokens: keys and values, and the latent memories."""
        keys = tokens if self.window is None else min(tokens, self.window + self.sinks)
        return static_cache_bytes(self.model, keys)


@torch.no_grad()
def static_cache_bytes(model: Any, keys: int) -> dict[str, int]:
    """The bytes of a cache of one row that has room for so many keys."""
    cache = StaticCache(config=model.config, max_cache_len=keys)
    model(input_ids=torch.tensor([[1, 2]], device=model.device), past_key_values=cache, use_cache=True)
    return cache_bytes(cache)


def add_sinks(model: PreTrainedModel, window: int, sinks: int) -> PreTrainedModel:
    """Let each token of a model with full attention see a window, and the first tokens, by a mask for every call."""
    if getattr(model.config, "sliding_window", None) is not None:
        raise ValueError("model: it has a window already; give a model with full attention")

    def is_sink(row: Any, head: Any, query: Any, key: Any) -> Any:
        return key < sinks

    seen = or_masks(sliding_window_overlay(window), is_sink)

    def put_mask(module: Any, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeddings = module.get_input_embeddings()(options["input_ids"])
        mask = create_causal_mask(
            config=module.config,
            inputs_embeds=embeddings,
            attention_mask=options.get("attention_mask"),
            past_key_values=options.get("past_key_values"),
            position_ids=options.get("position_ids"),
            and_mask_function=seen,
        )
        return arguments, {**options, "attention_mask": mask}

    model.base_model.register_forward_pre_hook(put_mask, with_kwargs=True)
    return model


def memory_tokens(base: Any) -> int:
    """How many tokens' keys and values have as many bytes as the memories of recall's side paths; rounded up."""
    config = TalanConfig(task_type="CAUSAL_LM", r=0, **RECALL_AXES)
    with adapted(base, config) as model:
        memories = static_cache_bytes(model, 2)["memories"]
    one_token = static_cache_bytes(base, 3)["keys_and_values"] - static_cache_bytes(base, 2)["keys_and_values"]
    return -(-memories // one_token)


def load_untrained(name: str, arm: str, window: int, dtype: str) -> Arm:
    """The base model with one of the arms that need no training."""
    base: Any = load_model(name, dtype=dtype, device="cpu")
    if arm == FULL:
        return Arm(base, load_tokenizer(name), None)
    if arm == SINKS:
        return Arm(add_sinks(base, window, SINK_TOKENS), load_tokenizer(name), window, SINK_TOKENS)
    keys = window + memory_tokens(base) if arm == EQUAL else WIDER.get(arm, 1) * window
    return Arm(with_sliding_window(base, keys), load_tokenizer(name), keys)


def load_trained(name: str, folder: str, window: int, dtype: str) -> Arm:
    """An adapter on the model that the other arms have, with a window; refused if it was trained on other weights."""
    base = with_sliding_window(load_model(name, dtype=dtype, device="cpu"), window)
    own = base_model_of(folder)
    if Path(own).is_dir():
        theirs, ours = (part.get_input_embeddings().weight for part in (load_model(own, dtype, "cpu"), base))
        if not torch.equal(theirs, ours):
            raise ValueError(f"--model {name}: {folder} was trained on other weights, of {own}; give that model")
    model: Any = PeftModel.from_pretrained(base, folder).eval()
    return Arm(model, load_tokenizer(name), window)


def arm_of(folder: str) -> str:
    """Whether an adapter is LoRA's or has side paths."""
    kind = PeftConfig.from_pretrained(folder).peft_type
    return LORA if kind == PeftType.LORA else TALAN


def digest_of(folder: str) -> str:
    """A digest of an adapter's weights: a result belongs to them, wherever they lie."""
    return hashlib.sha256(Path(folder, "adapter_model.safetensors").read_bytes()).hexdigest()[:16]
