"""Loads models, tokenizers and adapters for the programs."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def choose_device(device: str | None = None) -> str:
    """Choose where a model runs.

    Args:
        device: What was asked for, such as `"cuda:0"`. None: an accelerator if there is one. Default None.

    Returns:
        The device.
    """
    if device is not None:
        return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def load_tokenizer(name: str | PathLike[str]) -> PreTrainedTokenizerBase:
    """Load a tokenizer; where it has no padding token, its end-of-sequence token pads.

    Args:
        name: A folder or a hub id.

    Returns:
        The tokenizer.
    """
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
    """Find out which base model an adapter belongs to.

    Args:
        adapter: The adapter's folder or hub id.
        base_model: What was asked for. Default None.

    Returns:
        What was asked for, or else what the adapter's configuration names.

    Raises:
        ValueError: It names none.
    """
    name = base_model or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not name:
        raise ValueError(f"{adapter}: the adapter does not say which base model it was trained on; give its name")
    return str(name)


def is_embedded(adapter: str) -> bool:
    """Whether an adapter lies in the folder of its own model, as `merge_and_unload` and `save_pretrained` leave it.

    Args:
        adapter: The adapter's folder or hub id.

    Returns:
        True if loading the model loads the adapter, too.
    """
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
