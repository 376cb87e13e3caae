"""A sliding window for a model that has none: the same weights, another configuration."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

ONE_WINDOW = ("mistral", "mixtral", "phi3", "starcoder2")
"""Model types whose `sliding_window` holds for every block."""
SWITCHED_WINDOW = ("qwen2", "qwen3", "qwen3_moe", "smollm3")
"""Model types whose `sliding_window` has a switch, and which may list the kind of every block's attention."""
SUPPORTED = ("llama", *ONE_WINDOW, *SWITCHED_WINDOW)
NOT_TAKEN_OVER = ("model_type", "architectures", "transformers_version", "sliding_window", "layer_types")
"""Fields of a Llama's configuration that a Mistral's doesn't take from it."""


def _windowed_config(config: PreTrainedConfig, window: int) -> PreTrainedConfig:
    """The configuration of the same model with a sliding window in every block."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise ValueError(
            f"window={window!r}: give the keys that a token sees, itself included, as a whole number >= 2"
        )
    kind = config.model_type
    if kind not in SUPPORTED:
        raise ValueError(
            f"model: the model type {kind!r} can't be given a window in every block: its blocks have no window, or "
            f"compute differently with one; use one of {', '.join(SUPPORTED)}"
        )
    fields = config.to_dict()
    if kind == "llama":
        biases = [name for name in ("attention_bias", "mlp_bias") if fields.get(name)]
        if biases:
            raise ValueError(
                f"model: {biases[0]}=True; a Llama becomes a Mistral, whose projections have no biases; use a model "
                "without"
            )
        return MistralConfig(
            **{name: value for name, value in fields.items() if name not in NOT_TAKEN_OVER}, sliding_window=window
        )
    fields["sliding_window"] = window
    if kind in SWITCHED_WINDOW:
        fields["use_sliding_window"] = True
        if "layer_types" in fields:
            fields["layer_types"] = ["sliding_attention"] * config.num_hidden_layers
        if "max_window_layers" in fields:
            fields["max_window_layers"] = 0
    return type(config)(**{name: value for name, value in fields.items() if name != "model_type"})


def with_sliding_window(model: PreTrainedModel, window: int) -> PreTrainedModel:
    """Make a causal model with a sliding window in every block of a model that has none, or a wider one.

    The weights are shared with the given model, which is left as it is. A text inside the window gets the same logits;
    `generate` then holds the window's keys alone, and `save_pretrained` writes a model that loads with its window.

    Args:
        model: A causal language model of the types llama (it becomes a Mistral), mistral, mixtral, phi3, starcoder2,
            qwen2, qwen3, qwen3_moe or smollm3, without an adapter.
        window: The keys that a token sees in each block, itself included.

    Returns:
        The model with the window.

    Raises:
        ValueError: The window is no whole number of at least 2, or the model can't have one.

    Examples:
        >>> model = with_sliding_window(AutoModelForCausalLM.from_pretrained("path/to/llama"), window=1024)
        >>> model.save_pretrained("path/to/llama-with-window")
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("model: its weights are quantized; convert the model it was made of, and quantize that")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            "model: it lies on several devices; convert and save it on one, and load that with device_map"
        )
    config = _windowed_config(model.config, window)
    with torch.device("meta"):
        converted: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            experts_implementation=getattr(model.config, "_experts_implementation", None),
        )
    if type(model).__name__ not in (type(converted).__name__, "LlamaForCausalLM"):
        raise ValueError(f"model: {type(model).__name__} is no causal language model without an adapter; give that")
    converted.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        # Those that checkpoints don't hold, such as the rotary frequencies.
        owner, _, leaf = name.rpartition(".")
        setattr(converted.get_submodule(owner), leaf, buffer)
    converted.tie_weights()
    converted.generation_config = model.generation_config
    converted.config.name_or_path = converted.name_or_path = model.name_or_path
    return converted.train(model.training)


def save_with_window(
    name: str, tokenizer: PreTrainedTokenizerBase, window: int, folder: Path, *, resume: bool = False
) -> str:
    """Save a model with a sliding window, which an adapter on it is then loaded with; returns the absolute folder.

    `resume`: a run goes on that saved it before, with the same window.
    """
    if resume:
        found = AutoConfig.from_pretrained(folder).sliding_window
        if found != window:
            raise ValueError(
                f"window={window}: the run was started with {found}; give that, or start again with --overwrite"
            )
    else:
        _windowed_config(AutoConfig.from_pretrained(name), window)  # refused before the weights are loaded
        # In the precision it was saved in; a trainer loads it in its own.
        with_sliding_window(AutoModelForCausalLM.from_pretrained(name, dtype="auto"), window).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder.resolve())
