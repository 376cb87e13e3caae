"""What a decoder block was called with, as far as a side path needs it, whatever the model calls its arguments."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache
from transformers.utils import output_capturing

from .paged_call import PagedCall, find_paged_call
from .segments import TokenLayout, token_layout


class BlockCall(NamedTuple):
    """The arguments of one call of a block.

    Args:
        attention_mask: In any of the forms that attention implementations take.
        position_ids: [batch or 1, tokens], or None.
        cache: The cache of the block's self-attention, or None.
        paged: The arguments under continuous batching, which has none of the others; or None.
    """

    attention_mask: object
    position_ids: torch.Tensor | None
    cache: Cache | None
    paged: PagedCall | None = None

    def tokens_before(self, block_index: int, tokens: int, counted: bool) -> int | torch.Tensor:
        """How many tokens the cache held before this call.

        Args:
            block_index: The block's index.
            tokens: The number of tokens of this call.
            counted: Whether the block's cache layer counts this call's tokens already, as it does after the block.

        Returns:
            The number; a scalar tensor where the cache keeps its length on the device.
        """
        if self.cache is None:
            return 0
        layers = self.cache.layers
        if block_index >= len(layers) or not isinstance(layers[block_index], CacheLayerMixin):
            # A block without keys of its own: the first block's are as many, and it ran earlier in this call.
            counted = counted or block_index > 0
            block_index = 0
        length = self.cache.get_seq_length(block_index)
        return length - tokens if counted else length + 0

    def layout(self, batch: int, tokens: int, past: int | torch.Tensor) -> TokenLayout:
        """Which tokens of the call are real, and where packed samples start; see `token_layout`."""
        return token_layout(self.attention_mask, self.position_ids, batch, tokens, past)


def mask_argument_place(block: nn.Module) -> int | None:
    """Where the attention mask stands among the block's positional arguments.

    Args:
        block: The decoder block.

    Returns:
        The place, or None where the block takes no mask.
    """
    names = list(inspect.signature(block.forward).parameters)
    return names.index("attention_mask") if "attention_mask" in names else None


def describe_call(
    block: nn.Module, mask_place: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> BlockCall:
    """Gather what a side path needs from a block's arguments.

    Args:
        block: The decoder block.
        mask_place: Of `mask_argument_place`.
        args: The block's positional arguments.
        kwargs: The block's keyword arguments.

    Returns:
        The call's arguments by their standard names.
    """
    paged = find_paged_call(kwargs)
    if paged is not None:
        return BlockCall(None, None, None, paged)
    attention_mask = kwargs.get("attention_mask")
    if attention_mask is None and mask_place is not None and mask_place < len(args):
        attention_mask = args[mask_place]
    cache = None
    # transformers checkpoints a block's `forward` and withholds the cache there; the hooks around it still see it.
    if not (block.training and getattr(block, "gradient_checkpointing", False)):
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
            cache = _find_cache((*kwargs.values(), *args))
    return BlockCall(attention_mask, kwargs.get("position_ids"), cache)


def _find_cache(values: tuple[Any, ...]) -> Cache | None:
    for value in values:
        if isinstance(value, EncoderDecoderCache):
            return value.self_attention_cache
        if isinstance(value, Cache):
            return value
    return None


def replace_recorded_state(before: torch.Tensor, after: torch.Tensor) -> None:
    """Let `output_hidden_states=True` show what a block receives where a side path wrote at its input.

    transformers records a block's output before the next block's input is changed.

    Args:
        before: The recorded hidden states.
        after: What the block receives instead.
    """
    recorded = output_capturing._active_collector.get()
    states = recorded.get("hidden_states") if recorded else None
    if states and states[-1] is before:
        states[-1] = after
