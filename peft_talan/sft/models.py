"""Loads models, tokenizers and adapters for the programs, and lets them answer."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from ..axes import refusal
from .prompts import PromptForm, encode_prompt, stop_tokens


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
    """Load a causal language model in evaluation mode; without a device, on an accelerator if there is one."""
    model: Any = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype)
    return model.to(choose_device(device)).eval()


def base_model_of(adapter: str, base_model: str | None = None) -> str:
    """Return the given base model, or the one that an adapter's configuration names."""
    name = base_model or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not name:
        raise refusal("base_model", base_model, f"{adapter} does not say what it was trained on; give its base model")
    return str(name)


def load_adapter(
    adapter: str, base_model: str | None = None, dtype: str = "auto", device: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load an adapter of any PEFT method on its base model, or a merged model, and the tokenizer saved with either.

    Without a name, the base model is the one that the adapter's configuration names.
    """
    if find_adapter_config_file(adapter) is None:
        return load_model(adapter, dtype, device), load_tokenizer(adapter)
    name = base_model_of(adapter, base_model)
    model = PeftModel.from_pretrained(load_model(name, dtype, device), adapter)
    has_tokenizer = (Path(adapter) / "tokenizer_config.json").is_file()
    return model.eval(), load_tokenizer(adapter if has_tokenizer else name)


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    form: PromptForm,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> str:
    """Return the text that a model generates after a prompt of the form that it was trained on.

    It has the model's own settings and stop tokens; a temperature of 0 is greedy.
    """
    tokens = torch.tensor([encode_prompt(tokenizer, prompt, form)], device=model.device)
    own_stops = model.generation_config.eos_token_id
    stops = [] if own_stops is None else torch.tensor(own_stops).flatten().tolist()
    # Whatever the model's configuration says.
    stops += stop_tokens(tokenizer, form)
    # Greedy decoding warns of options of sampling alone.
    sampling = (
        {"temperature": temperature} if temperature else dict.fromkeys(("temperature", "top_p", "top_k", "min_p"))
    )
    output = model.generate(
        input_ids=tokens,
        # Without a mask, transformers would take every padding token in a prompt for padding.
        attention_mask=torch.ones_like(tokens),
        max_length=None,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stops or None,
        do_sample=temperature > 0,
        **sampling,
    )
    return str(tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True))
