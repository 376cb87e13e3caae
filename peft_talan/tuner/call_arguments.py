"""What a module is called with, as far as a side path needs it: masks, positions, caches and other states."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation.continuous_batching import PagedAttentionCache

from ..memory.state_cache import cache_of_state, is_state
from ..memory.token_tree import TokenTree

STATE_ARGUMENTS = frozenset(
    {
        "cache",
        "cache_params",
        "caches",
        "inference_params",
        "kv_cache",
        "layer_past",
        "layer_state",
        "mems",
        "past",
        "past_buckets_states",
        "past_key_value",
        "past_key_values",
        "past_state",
        "past_states",
        "state",
        "states",
    }
)
"""The arguments by which models pass a state from one call to the next: those of transformers, and common ones."""


class CallArguments(NamedTuple):
    """The arguments of one call, as far as a side path needs them.

    Args:
        attention_mask: In any of the forms that attention implementations take.
        position_ids: Positions of any rank, or None.
        cu_seq_lens: [samples + 1]: where packed samples start, or None.
        seq_idx: [batch, tokens]: the sample of each token, or None.
        cache: The cache of the self-attention, or None.
        shape: (batch, tokens) of the model's input, if it is known; None in place of an unknown number of tokens.
        unknown_state: The name of an argument with a state that is not a transformers cache, or None.
        has_paged_cache: Whether a server gives the cache of many requests in pages.
        tree: How samples share the tokens of a row, or None.
    """

    attention_mask: object = None
    position_ids: torch.Tensor | None = None
    cu_seq_lens: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None
    cache: Cache | None = None
    shape: tuple[int, int | None] | None = None
    unknown_state: str | None = None
    has_paged_cache: bool = False
    tree: TokenTree | None = None


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's positional arguments in their order; one in place of `*args` and `**kwargs`, too."""
    return tuple(inspect.signature(module.forward).parameters)


def find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache of the self-attention among a call's arguments."""
    cache: Cache | None = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            cache = value.self_attention_cache if isinstance(value, EncoderDecoderCache) else cache or value
        elif not isinstance(value, torch.Tensor) and is_state(value):
            cache = cache_of_state(value)
    return cache


def read_arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallArguments:
    """Gather what a side path needs from a call."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    unknown: str | None = None
    paged = False
    for name, value in given.items():
        if isinstance(value, PagedAttentionCache):
            paged = True
        elif name in STATE_ARGUMENTS and not is_state(value) and _holds_state(value):
            unknown = name
    positions = given.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.dim() == 3 and positions.shape[0] == 4:
        # Multimodal positions [4, batch, tokens]: the first row is that of the text, by which the model separates
        # packed samples; the other three (time, height, width) repeat inside one sample.
        positions = positions[0]
    return CallArguments(
        _mask_of(given, names),
        positions if isinstance(positions, torch.Tensor) else None,
        given.get("cu_seq_lens_q"),
        given.get("seq_idx"),
        find_cache(args, kwargs),
        _shape_of_input(given, names),
        unknown,
        paged,
        TokenTree.of_call(given),
    )


def _mask_of(given: dict[str, Any], names: tuple[str, ...]) -> object:
    """The mask of the tokens; FSMT's decoder and XLNet take others, too, in which 1 or True masks."""
    mask, padding, hidden = given.get("attention_mask"), None, None
    if "decoder_causal_mask" in names:
        padding = given.get("decoder_padding_mask")
    elif "perm_mask" in names:
        padding, hidden = given.get("input_mask"), given.get("perm_mask")
    if isinstance(padding, torch.Tensor) and padding.dim() == 2:
        mask = padding == 0
    if isinstance(hidden, torch.Tensor) and hidden.dim() == 3:
        visible = hidden == 0
        mask = visible & (mask != 0).unsqueeze(1) if isinstance(mask, torch.Tensor) and mask.dim() == 2 else visible
    return mask


def _shape_of_input(given: dict[str, Any], names: tuple[str, ...]) -> tuple[int, int | None] | None:
    """(batch, tokens) by the token ids or the embeddings."""
    tokens, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    if isinstance(tokens, torch.Tensor) and tokens.dim() == 2:
        return tokens.shape[0], tokens.shape[1]
    if isinstance(embeddings, torch.Tensor) and embeddings.dim() == 3:
        return embeddings.shape[0], embeddings.shape[1]
    # Token ids by a name of the model's own: it may add tokens to them.
    first = given.get(names[0]) if names else None
    if isinstance(first, torch.Tensor) and first.dim() == 2 and not first.is_floating_point():
        return first.shape[0], None
    return None


def _holds_state(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() > 0
    if isinstance(value, (list, tuple, dict)):
        return any(_holds_state(part) for part in (value.values() if isinstance(value, dict) else value))
    return value is not None and not isinstance(value, (bool, int, float, str, Cache))


def tensors_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The masks, positions and embeddings of positions that a block is called with; a recomputed call has the same."""
    for value in (*args[1:], *(value for name, value in kwargs.items() if name != "hidden_states")):
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, torch.Tensor):
                yield tensor
