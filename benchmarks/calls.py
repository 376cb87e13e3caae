"""What the benchmarks time: prefill, a decoded token, a training step, attaching, the operators by themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from conditions import ADAPTERS, make_conditions
from long_context import SLOTS, WIDTH, make_parameters
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache

from peft_talan.functional import fused, one_token, ragged, ragged_reference, reference
from peft_talan.functional.parameters import SidePathOptions

PROMPT = 128
"""Tokens that are really read before decoding; a longer context repeats their keys."""

MOST_DECODED = 4096
"""Tokens that are decoded at most."""

Calls = dict[str, Callable[[], Any]]


def head_width(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def key_bytes(config: PreTrainedConfig, itemsize: int) -> int:
    """Bytes of keys and values of one token."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_width(config) * itemsize


def prefill_operations(model: nn.Module, tokens: int) -> float:
    """Multiply-adds of one forward pass without its head, about: of the matrices, and of attention."""
    config = model.config
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    matrices -= 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * head_width(config)
    window = getattr(config, "sliding_window", None) or tokens
    return tokens * matrices + attention * tokens * min(tokens, 2 * window)


def token_ids(model: nn.Module, batch: int, tokens: int) -> torch.Tensor:
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(2))
    return ids.to(model.device)


def compiled_call(call: Callable[[nn.Module], Any], model: nn.Module, mode: str | None = None) -> Callable[[], Any]:
    """Compile a call of a model by itself: a copied code object, so that no two models share a list of guards."""
    own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    compiled = torch.compile(own, dynamic=False, mode=mode)

    def run() -> Any:
        with torch.no_grad():
            return compiled(model)

    return run


def prefill_calls(models: dict[str, nn.Module], tokens: int) -> Calls:
    """One forward pass over a prompt, with a fresh cache and the last token's logits."""
    prompt = token_ids(next(iter(models.values())), 1, tokens)

    def prefill(model: nn.Module) -> Cache:
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            return model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    return {name: partial(prefill, model) for name, model in models.items()}


def compiled_prefill_calls(models: dict[str, nn.Module], tokens: int) -> Calls:
    """One compiled forward pass over a prompt, without a cache."""
    prompt = token_ids(next(iter(models.values())), 1, tokens)

    def forward(model: nn.Module) -> torch.Tensor:
        return model(input_ids=prompt, use_cache=False, logits_to_keep=1).logits

    return {name: compiled_call(forward, model) for name, model in models.items()}


def lengthen(cache: Cache, times: int) -> None:
    """Repeat a cache's keys and let the latent memories count as many tokens: only shapes matter to the time."""
    for memory in getattr(cache, "latent_memories", ()):
        memory.length *= times
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            layer.keys = layer.keys.repeat(1, 1, times, 1)
            layer.values = layer.values.repeat(1, 1, times, 1)


def decode_calls(models: dict[str, nn.Module], context: int, batch: int, masked: bool = True) -> Calls:
    """One decoded token per call, with a mask as `generate` passes it, each condition with its own cache."""
    token = torch.full((batch, 1), 7, device=next(iter(models.values())).device)
    mask = token.new_ones(batch, context + MOST_DECODED)

    def step(model: nn.Module, cache: Cache) -> torch.Tensor:
        seen = mask[:, : cache.get_seq_length() + 1] if masked else None
        with torch.no_grad():
            return model(
                input_ids=token, attention_mask=seen, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits

    calls: Calls = {}
    for name, prefill in prefill_calls(models, min(context, PROMPT)).items():
        cache = prefill()
        cache.batch_repeat_interleave(batch)
        lengthen(cache, context // min(context, PROMPT))
        calls[name] = partial(step, models[name], cache)
    return calls


def compiled_decode_calls(
    models: dict[str, nn.Module], context: int, batch: int, room: int, mode: str | None = None
) -> Calls:
    """One decoded token per call, compiled, with a static cache; attention then runs over the cache's whole room."""
    token = torch.full((batch, 1), 7, device=next(iter(models.values())).device)
    calls: Calls = {}
    for name, model in models.items():
        cache = StaticCache(config=model.config, max_cache_len=context + room)
        with torch.no_grad():
            prompt = token_ids(model, batch, min(context, PROMPT))
            model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        calls[name] = compiled_call(_closing_over(token, cache), model, mode)
    return calls


def _closing_over(token: torch.Tensor, cache: Cache) -> Callable[[nn.Module], torch.Tensor]:
    def step(model: nn.Module) -> torch.Tensor:
        return model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    return step


def train_calls(models: dict[str, nn.Module], tokens: int, checkpointing: bool = False) -> Calls:
    """One step: forward, backward, optimizer; `checkpointing`: each block is recomputed in the backward pass."""
    sample = token_ids(next(iter(models.values())), 1, tokens)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(input_ids=sample, labels=sample, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    calls: Calls = {}
    for name, model in models.items():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls[name] = partial(step, model.train(), torch.optim.AdamW(trained))
    return calls


def attach_calls(base: nn.Module, names: list[str]) -> Calls:
    """Attaching a fresh adapter to a model."""
    bare = make_conditions(base, ["base"])["base"]
    return {name: partial(lambda name: get_peft_model(bare, ADAPTERS[name]()), name) for name in names}


def load_calls(base: nn.Module, names: list[str], folder: Path) -> Calls:
    """Loading a saved adapter onto a model."""
    bare = make_conditions(base, ["base"])["base"]
    calls: Calls = {}
    for name in names:
        model = get_peft_model(bare, ADAPTERS[name]())
        model.save_pretrained(folder / name)
        model.unload()
        calls[name] = partial(PeftModel.from_pretrained, bare, folder / name)
    return calls


OPERATORS = ("forward", "forward and backward", "one token", "requests together")


def operator_calls(base: nn.Module, tokens: int, rows: int) -> dict[str, Calls]:
    """The reference and the fused operator in a model's hidden size, dtype and place, by what they do."""
    like = {"device": base.device, "dtype": base.dtype}
    parameters = make_parameters(base.config.hidden_size, SLOTS, WIDTH).to(base.device)
    trained = [tensor.requires_grad_() for tensor in (parameters.read, *parameters.mixer, parameters.write)]
    options = SidePathOptions()
    hidden_states = torch.randn(1, tokens, base.config.hidden_size, **like)
    one = torch.randn(rows, 1, base.config.hidden_size, **like)
    state = torch.rand(rows, SLOTS, WIDTH + 1, device=base.device)
    buffers = one_token.TokenBuffers(state.clone(), torch.float32)
    length = max(tokens // rows, 1)
    starts = torch.arange(0, tokens + 1, length, device=base.device)
    states = torch.zeros(len(starts) - 1, SLOTS, WIDTH + 1, device=base.device)
    together = {"cu_seqlens": starts, "state": states, "max_query_length": length}
    flat = hidden_states[0, : length * len(states)]

    def backward(module: Any) -> object:
        output = module.side_path(hidden_states, parameters, options).hidden_states
        return torch.autograd.grad(output, trained, torch.ones_like(output))

    def forward(call: Callable[..., object], tensor: torch.Tensor, *more: Any, **named: Any) -> Callable[[], object]:
        return torch.no_grad()(partial(call, tensor, parameters, options, *more, **named))

    return {
        "forward": {
            "reference": forward(reference.side_path, hidden_states),
            "fused": forward(fused.side_path, hidden_states),
        },
        "forward and backward": {"reference": partial(backward, reference), "fused": partial(backward, fused)},
        "one token": {
            "reference": forward(reference.side_path, one, state=state),
            "fused": forward(one_token.one_token, one, buffers),
        },
        "requests together": {
            "reference": forward(ragged_reference.ragged_side_path, flat, **together),
            "fused": forward(ragged.ragged_side_path, flat, **together),
        },
    }
