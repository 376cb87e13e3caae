"""Loads models, tokenizers and adapters for the programs."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..axes import refusal


def choose_device(device: str | None = None) -> str:
    """Return the device, or, if it is None, the accelerator if there is one, or else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return device or ("cpu" if accelerator is None else accelerator.type)


def load_tokenizer(name: str | PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or a hub id; without a padding token, its end-of-sequence token pads."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(name))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str | PathLike[str], dtype: str = "auto", device: str | None = None) -> PreTrainedModel:
    """Load a causal language model for inference.

    Args:
        name: A folder or a hub id.
        dtype: Such as `"bfloat16"`; `"auto"`: as it was saved. Default `"auto"`.
        device: None: an accelerator if there is one. Default None.

    Returns:
        The model, in evaluation mode.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype)
    return model.to(choose_device(device)).eval()


def base_model_of(adapter: str, base_model: str | None = None) -> str:
    """Return the name of an adapter's base model: the given one, or what the adapter's configuration names.

    Args:
        adapter: The adapter's folder or hub id.
        base_model: Stands for what the configuration names. Default None.

    Raises:
        ValueError: The configuration names none.
    """
    name = base_model or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not name:
        raise refusal("base_model", base_model, f"{adapter} does not say what it was trained on; give its base model")
    return str(name)


def is_embedded(adapter: str) -> bool:
    """Whether an adapter is in the folder of its own model, as `merge_and_unload` and `save_pretrained` leave it."""
    if (Path(adapter) / "config.json").is_file():
        return True
    return bool(PeftConfig.from_pretrained(adapter).base_model_name_or_path == adapter)


def load_adapter(
    adapter: str, base_model: str | None = None, dtype: str = "auto", device: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load an adapter of any PEFT method on its base model, and the tokenizer that was saved with either.

    Args:
        adapter: The adapter's folder or hub id.
        base_model: The base model. None: what the adapter's configuration names. Default None.
        dtype: Such as `"bfloat16"`; `"auto"`: as it was saved. Default `"auto"`.
        device: None: an accelerator if there is one. Default None.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        ValueError: There is no name of a base model.
    """
    if base_model is None and is_embedded(adapter):
        return load_model(adapter, dtype, device), load_tokenizer(adapter)
    name = base_model_of(adapter, base_model)
    model = PeftModel.from_pretrained(load_model(name, dtype, device), adapter)
    has_tokenizer = (Path(adapter) / "tokenizer_config.json").is_file()
    return model.eval(), load_tokenizer(adapter if has_tokenizer else name)
