"""Real architectures of transformers at a size that tests can afford, with random weights."""

from __future__ import annotations

import copy
import functools

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from peft_talan import TalanConfig

adapter_calls_of_transformers = pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.24") and Version(peft.__version__) < Version("0.22"),
    reason="from 5.24 on, transformers' own add_adapter, set_adapter ... ask for PEFT 0.22, for LoRA too",
)

VOCABULARY = 64
DEPTH = 4
WINDOW = 8
"""Keys that a sliding-window layer sees: fewer than the tests' sequences have tokens."""

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_LLAMA_LIKE = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
_NEOX_LIKE = {key: value for key, value in _LLAMA_LIKE.items() if key not in ("num_key_value_heads", "head_dim")}
_MOE = {"num_experts_per_tok": 2}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_LLAMA_LIKE),
    "qwen2": Qwen2Config(**_LLAMA_LIKE),
    "qwen3": Qwen3Config(**_LLAMA_LIKE),
    "qwen3_moe": Qwen3MoeConfig(**_LLAMA_LIKE, **_MOE, num_experts=4, moe_intermediate_size=24),
    "mistral": MistralConfig(**_LLAMA_LIKE, sliding_window=WINDOW),
    "mixtral": MixtralConfig(**_LLAMA_LIKE, **_MOE, num_local_experts=4),
    "gemma3": Gemma3TextConfig(
        **_LLAMA_LIKE, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * (DEPTH // 2)
    ),
    "gpt2": GPT2Config(**_TOKENS, n_embd=32, n_layer=DEPTH, n_head=4, n_positions=256),
    "opt": OPTConfig(
        **_TOKENS,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        max_position_embeddings=256,
        dropout=0.0,
    ),
    "gpt_neox": GPTNeoXConfig(**_NEOX_LIKE),
}
ARCHITECTURES = tuple(CONFIGS)
# Grouped matrix products of experts exist in half and single precision only.
EXPERTS = {"experts_implementation": "eager"}


@functools.cache
def _built(architecture: str, dtype: torch.dtype, attention: str, blocks: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # A copy: `save_pretrained` writes the dtype into the configuration, and the next model would start in it.
        config = copy.deepcopy(CONFIGS[architecture])
        config.num_hidden_layers = blocks
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, **EXPERTS)
    return model.to(dtype).eval()


def make_base(
    architecture: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", blocks: int = DEPTH
) -> PreTrainedModel:
    """Build a model; the same arguments give the same weights every time."""
    # A copy takes a fraction of the time that drawing weights does.
    return copy.deepcopy(_built(architecture, dtype, attention, blocks))


def make_config(**options: object) -> TalanConfig:
    """A configuration whose two halves both change the output from the start."""
    defaults = {
        "r": 4,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        "talan_layers": [1, -1],
        "talan_slots": 3,
        "talan_dim": 5,
        "init_talan_weights": False,
        "init_lora_weights": False,
    }
    return TalanConfig(**{**defaults, **options})


def make_lora_config(**options: object) -> LoraConfig:
    """The plain LoRA that `make_config` is matched by."""
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def make_model(
    architecture: str,
    config: LoraConfig | None = None,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    blocks: int = DEPTH,
) -> PeftModel:
    """Build a model with an adapter; the same arguments give the same weights every time."""
    base = make_base(architecture, dtype, attention, blocks)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(base, make_config() if config is None else config)
    # PEFT keeps adapters in float32; exact comparisons need the model's own precision.
    return model.to(dtype).eval()


def make_several(kinds: dict[str, dict[str, object]], architecture: str = "qwen3") -> PeftModel:
    """Build a model with several adapters from their options by name; the first one is active."""
    (first, options), *others = kinds.items()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(make_base(architecture), make_config(**options), adapter_name=first)
        for name, options in others:
            model.add_adapter(name, make_config(**options))
    return model.to(torch.float64).eval()


def make_tokens(batch: int = 2, tokens: int = 21, seed: int = 2) -> torch.Tensor:
    """Random tokens without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, tokens), generator=generator)


def logits(model: nn.Module, **kwargs: object) -> torch.Tensor:
    """What a model makes of `make_tokens()`, without gradients."""
    with torch.no_grad():
        return model(make_tokens(), **kwargs).logits


def last_state(model: nn.Module) -> torch.Tensor:
    """What the last block passes on; the model's own final norm comes after it."""
    seen: list[torch.Tensor] = []
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    handle = blocks[-1].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(make_tokens())
    handle.remove()
    return seen[0]


def rounding(dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """The tolerance of comparisons that are exact in maths: some hundred rounding errors of the dtype."""
    return {"rtol": 512 * torch.finfo(dtype).eps, "atol": 512 * torch.finfo(dtype).eps}
