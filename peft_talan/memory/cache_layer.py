"""Lets the transformers cache carry the latent memories of a generation, as one more of its layers.

What reorders, repeats, selects, crops or resets a cache goes through all of its layers. So the memories follow beams,
assisted decoding and several turns, and two generations can't mix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from .latent_memory import LatentMemory

# A layer without keys has a class of its own since transformers 5.23.
KeylessLayer: Any = getattr(cache_utils, "DummyLayer", CacheLayerMixin)


class MemoryLayer(KeylessLayer):
    """The last layer of a cache: it has no keys, but the latent memories by block and adapter name."""

    # As the layers of transformers that hold nothing.
    supports_early_init = False
    is_compileable = True
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self.memories: dict[int, dict[str, LatentMemory]] = {}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """No keys: there is nothing to prepare."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse keys; None for both goes through, as it does where torch's data parallelism puts a cache together."""
        if isinstance(key_states, torch.Tensor):
            raise NotImplementedError("the latent memories' layer of a cache takes no keys; use the blocks' layers")
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No keys."""
        return 0, 0

    def get_seq_length(self) -> int:
        """No keys."""
        return 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def offload(self) -> None:
        """The memories are small and stay."""

    def prefetch(self) -> None:
        """The memories are small and stay."""

    def _all(self) -> Iterator[LatentMemory]:
        for memories in self.memories.values():
            yield from memories.values()

    def reset(self) -> None:
        """Empty every memory."""
        for memory in self._all():
            memory.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Let every memory forget the last tokens; their number is negative, as in transformers."""
        for memory in self._all():
            memory.crop(abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let every memory's rows follow the beams."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        for memory in self._all():
            memory.select_rows(memory.every_row().repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Take over rows by index or by mask."""
        for memory in self._all():
            every_row = memory.every_row()
            memory.select_rows(every_row[indices.to(every_row.device)])


def _memory_layer(cache: Cache) -> MemoryLayer | None:
    layer = cache.layers[-1] if cache.layers else None
    return layer if isinstance(layer, MemoryLayer) else None


def memory_to_go_on_with(
    cache: Cache,
    index: int,
    depth: int,
    adapter_name: str,
    past: int | torch.Tensor,
    batch: int,
    scope: str,
    rows: torch.Tensor | None = None,
) -> LatentMemory:
    """Find the memory that the cache carries for an adapter at a block, or begin one with an empty cache.

    Args:
        cache: The cache.
        index: The block's index.
        depth: The number of blocks.
        adapter_name: The adapter's name.
        past: How many tokens the cache held before this call.
        batch: The number of rows of this call.
        scope: The adapter's memory scope.
        rows: The rows of the batch that the adapter runs for, [batch], bool; None: all.

    Returns:
        The memory.

    Raises:
        ValueError: The cache holds tokens that did not pass through this side path, its rows are not the batch's, or
            a bidirectional memory would have to go on from a cache.
    """
    layer = _memory_layer(cache)
    memory = None if layer is None else layer.memories.get(index, {}).get(adapter_name)
    if memory is None and _is_zero(past):
        return _begin_memory(cache, layer, index, depth, adapter_name, rows)
    # A static cache keeps its length on the device; its memory can't fall behind but by `behind`.
    kept_up = memory is not None and not memory.behind and (memory.static or memory.length == past)
    if memory is None or not kept_up or not memory.is_kept_up_for(rows):
        raise ValueError(
            f"the cache holds {int(past)} tokens that did not all pass through adapter {adapter_name!r} at block "
            f"{index} (it was filled with the adapter off, by another adapter or by another model), so the latent "
            "memory is missing; start from an empty cache and run the whole prompt with this adapter active"
        )
    if memory.state is not None and memory.state.shape[0] != batch:
        raise ValueError(
            f"the batch has {batch} rows, but the latent memory of adapter {adapter_name!r} in this cache has "
            f"{memory.state.shape[0]}; change a cache's rows by its own methods (batch_repeat_interleave, ...)"
        )
    if scope == "bidirectional" and not (isinstance(past, int) and past == 0):
        raise ValueError(
            f"adapter {adapter_name!r} has talan_memory_scope='bidirectional', which can't go on from a cache: later "
            "tokens would change the memory of earlier ones; train with 'causal', or pass use_cache=False for features"
        )
    return memory


def _is_zero(past: int | torch.Tensor) -> bool:
    if isinstance(past, torch.Tensor) and torch.compiler.is_compiling():
        # A compiled graph can't ask for a number on the device, but it can refuse to go on.
        torch._assert_async(past == 0, "the cache holds tokens that a side path has not seen; start from an empty one")
        return True
    return int(past) == 0


def _begin_memory(
    cache: Cache, layer: MemoryLayer | None, index: int, depth: int, adapter_name: str, rows: torch.Tensor | None
) -> LatentMemory:
    if cache.layer_class_to_replicate is not None and layer is None:
        # Such a cache makes its layers when keys first reach them; the memories' must come after them.
        while len(cache.layers) < depth:
            cache.layers.append(cache.layer_class_to_replicate())
    keys = cache.layers[index] if index < len(cache.layers) else None
    static = isinstance(keys, StaticLayer)
    if layer is None:
        layer = MemoryLayer()
        cache.layers.append(layer)
    memory = LatentMemory(static=static, recorded=not static and bool(getattr(keys, "is_croppable", True)))
    memory.rows = rows
    layer.memories.setdefault(index, {})[adapter_name] = memory
    return memory


def mark_memories_left_behind(cache: Cache, index: int, running: Collection[str]) -> None:
    """Mark the memories that a call's tokens passed by: their cache has moved ahead of them.

    Args:
        cache: The cache.
        index: The block's index.
        running: The names of the adapters that the tokens did pass through.
    """
    layer = _memory_layer(cache)
    memories = {} if layer is None else layer.memories.get(index, {})
    for name, memory in memories.items():
        # A name with a dot is that of a side path that belongs to the base model and always runs.
        if name not in running and "." not in name:
            memory.behind = True
