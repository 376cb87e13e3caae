"""Lets a model answer a prompt as it was trained to."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .prompts import PromptForm, encode_prompt


def generation_settings(
    model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float = 0.0
) -> GenerationConfig:
    """Change the model's own settings, with its stop tokens, by what was asked for.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        max_new_tokens: The longest answer, in tokens.
        temperature: Of sampling; 0 is greedy. Default 0.

    Returns:
        The settings.
    """
    settings: GenerationConfig = copy.deepcopy(model.generation_config)
    settings.max_length = None
    settings.max_new_tokens = max_new_tokens
    settings.pad_token_id = tokenizer.pad_token_id
    stops = settings.eos_token_id
    known = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in known:
        # Training ends every answer with the tokenizer's end, whatever the model's configuration says.
        settings.eos_token_id = [*known, tokenizer.eos_token_id]
    settings.do_sample = temperature > 0
    # Options of sampling alone are unset for greedy decoding, which warns of them.
    settings.temperature = temperature if temperature > 0 else None
    if temperature == 0:
        settings.top_p = settings.top_k = settings.min_p = None
    return settings


@torch.no_grad()
def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, form: PromptForm, settings: GenerationConfig
) -> str:
    """Answer a prompt.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: The prompt.
        form: Of the prompts that the model was trained on.
        settings: How to generate.

    Returns:
        The answer's text.
    """
    tokens = torch.tensor([encode_prompt(tokenizer, prompt, form)], device=model.device)
    # Without a mask, transformers would take every padding token in a prompt for padding.
    output = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    return str(tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True))
