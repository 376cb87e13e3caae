"""The models of bench_overhead.py, and the conditions in which each one runs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import torch
import window_attention  # noqa: F401 - makes `attn_implementation="windows"` known
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from peft_talan import TalanConfig
from peft_talan.axes import RECALL_AXES
from peft_talan.demo.base_model import default_model_folder

QWEN3 = {
    "vocab_size": 151936,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "eos_token_id": 128001,
    "bos_token_id": 128000,
}
SHAPES: dict[str, PreTrainedConfig] = {
    "qwen3-small": Qwen3Config(
        **{**QWEN3, "vocab_size": 32768, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=16,
    ),
    "qwen3-0.6b": Qwen3Config(**QWEN3, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28),
    "qwen3-1.7b": Qwen3Config(**QWEN3, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28),
    "llama-3.2-1b": LlamaConfig(
        **LLAMA3,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "windows": MistralConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=128,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        attn_implementation="windows",
    ),
}
ON_PAPER: dict[str, PreTrainedConfig] = {
    "llama-3.1-8b": LlamaConfig(
        **LLAMA3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
    ),
    "llama-3.1-70b": LlamaConfig(
        **LLAMA3, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
}
MODELS = ("smollm2", *SHAPES)
NAMES = {
    "smollm2": "SmolLM2-135M",
    "qwen3-small": "Qwen3, 16 blocks of width 512",
    "qwen3-0.6b": "Qwen3-0.6B shape",
    "qwen3-1.7b": "Qwen3-1.7B shape",
    "llama-3.2-1b": "Llama-3.2-1B shape",
    "windows": "Mistral, 8 blocks of width 128",
    "llama-3.1-8b": "Llama-3.1-8B shape",
    "llama-3.1-70b": "Llama-3.1-70B shape",
}
"""Of all models in tables, which have this order."""

LOW_RANK = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SPREAD = ("every_15", "every_8", "every_4", "every_2")
"""Values of `talan_layers` between the default and "all": in a model of 30 blocks, 2, 3, 7 and 15 of them."""
EIGHT_BLOCKS = [index / 8 for index in range(8)]
ADAPTERS: dict[str, Callable[[], LoraConfig]] = {
    "lora": lambda: LoraConfig(**LOW_RANK),
    "talan": lambda: TalanConfig(**LOW_RANK),
    "talan, 8 blocks": lambda: TalanConfig(**LOW_RANK, talan_layers=EIGHT_BLOCKS),
    "talan, all blocks": lambda: TalanConfig(**LOW_RANK, talan_layers="all"),
    **{f"talan, {layers}": partial(TalanConfig, **LOW_RANK, talan_layers=layers) for layers in SPREAD},
    "talan, recall": lambda: TalanConfig(**LOW_RANK, **RECALL_AXES),
    "lora again": lambda: LoraConfig(**LOW_RANK),
    "dora": lambda: LoraConfig(**LOW_RANK, use_dora=True),
    "dora + talan": lambda: TalanConfig(**LOW_RANK, use_dora=True),
    "dora again": lambda: LoraConfig(**LOW_RANK, use_dora=True),
}
MERGED = {"merged": "lora", "kept": "talan"}
MATCHED = {
    "lora": "base",
    "talan": "lora",
    "talan, 8 blocks": "lora",
    "talan, all blocks": "lora",
    **{f"talan, {layers}": "lora" for layers in SPREAD},
    "talan, recall": "lora",
    "lora again": "lora",
    "dora + talan": "dora",
    "dora again": "dora",
    "merged": "base",
    "kept": "base",
}
"""What each condition's time is divided by. `again` is built a second time: its ratio is the run's noise."""

GROUPS = {
    "lora": ["base", "lora", "talan", "talan, 8 blocks", "talan, all blocks", "lora again", "merged", "kept"],
    "dora": ["dora", "dora + talan", "dora again"],
    "blocks": ["lora", "talan", *(f"talan, {layers}" for layers in SPREAD), "talan, all blocks", "lora again"],
    "recall": ["lora", "talan, recall", "lora again"],
    "lengths": ["lora", "talan", "talan, every_4", "talan, all blocks", "lora again"],
}
"""Conditions that take turns with each other. DoRA's calls are many times longer, so it has turns of its own."""

SMALLER_GROUPS = {
    "lora": [["base", "lora", "talan", "lora again", "kept"], ["lora", "talan", "lora again"], ["lora", "talan"]],
    "dora": [["dora", "dora + talan"]],
    "blocks": [["lora", "talan", "talan, every_4", "lora again"]],
    "recall": [],
    "lengths": [],
}
"""What is measured where time or memory is too short for the group, best first."""


def load_base(name: str, dtype: torch.dtype, blocks: int | None = None) -> nn.Module:
    """The real model or random weights in a shape, for evaluation; `blocks`: only so many of the first blocks."""
    if name == "smollm2":
        model = AutoModelForCausalLM.from_pretrained(default_model_folder(), dtype=dtype).eval()
    else:
        model = random_model(SHAPES[name], dtype)
    if blocks is not None:
        model.model.layers = model.model.layers[:blocks]
        model.config.num_hidden_layers = blocks
    return model


def random_model(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A model of a shape whose matrices repeat one million random numbers: filled in a second, not in a minute."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    noise = (0.02 * torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
                continue
            for piece in parameter.view(-1).split(len(noise)):
                piece.copy_(noise[: len(piece)])
    for module in model.modules():
        if hasattr(module, "compute_default_rope_parameters"):
            # Its frequencies are buffers, which an empty model has not; nothing else computes them again.
            module.__init__(config=model.config)  # type: ignore[misc]
    return model.eval()


def make_conditions(base: nn.Module, names: list[str], adapters: str = "float32") -> dict[str, nn.Module]:
    """The model in each condition, for evaluation; all share the base's tensors. `adapters`: float32, or the model's.

    Fresh LoRA weights add exactly zero to those that they are merged into, so the merged models share them too.
    """
    models: dict[str, nn.Module] = {}
    for name in names:
        torch.manual_seed(1)
        models[name] = copy.deepcopy(base, {id(tensor): tensor for tensor in base.parameters()})
        if name in MERGED:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                models[name] = get_peft_model(models[name], ADAPTERS[MERGED[name]]()).merge_and_unload()
            weights = {tensor.data_ptr() for tensor in base.parameters()}
            if sum(tensor.data_ptr() in weights for tensor in models[name].parameters()) < len(weights):
                raise RuntimeError(f"{name!r} does not share the base model's weights: the conditions would not match")
        elif name != "base":
            autocast = adapters == "float32"
            models[name] = get_peft_model(models[name], ADAPTERS[name](), autocast_adapter_dtype=autocast)
        models[name].eval()
    return models


def trainable_shares(base: nn.Module) -> dict[str, float]:
    """Trainable parameters as shares of the backbone's: of LoRA, of LoRA with side paths, of the default alone."""
    backbone = sum(parameter.numel() for parameter in base.parameters())
    shares = {}
    for name in ("lora", "talan", "talan, 8 blocks", "talan, recall"):
        shares[name] = make_conditions(base, [name])[name].get_nb_trainable_parameters()[0] / backbone
    return {**shares, "side path": shares["talan"] - shares["lora"]}
