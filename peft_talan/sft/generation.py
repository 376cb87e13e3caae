"""Lets a model answer a prompt as it was trained to."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .prompts import PromptForm, encode_prompt

SAMPLING = ("temperature", "top_p", "top_k", "min_p")


def generation_settings(
    model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float = 0.0
) -> GenerationConfig:
    """Return the model's own settings, with its stop tokens, for answers of a largest length.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        max_new_tokens: The longest answer, in tokens.
        temperature: Of sampling; 0 is greedy. Default 0.
    """
    settings: GenerationConfig = copy.deepcopy(model.generation_config)
    own_stops = torch.tensor([] if settings.eos_token_id is None else settings.eos_token_id).flatten().tolist()
    # Training ends every answer with the tokenizer's end, whatever the model's configuration says.
    stops = dict.fromkeys(stop for stop in (*own_stops, tokenizer.eos_token_id) if stop is not None)
    settings.update(
        max_length=None,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[*stops] or None,
        do_sample=temperature > 0,
    )
    # Greedy decoding warns of options of sampling alone.
    settings.update(**({"temperature": temperature} if temperature else dict.fromkeys(SAMPLING)))
    return settings


@torch.no_grad()
def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, form: PromptForm, settings: GenerationConfig
) -> str:
    """Return the text that a model generates after a prompt.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: The prompt.
        form: Of the prompts that the model was trained on.
        settings: How to generate.
    """
    tokens = torch.tensor([encode_prompt(tokenizer, prompt, form)], device=model.device)
    # Without a mask, transformers would take every padding token in a prompt for padding.
    output = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    return str(tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True))
