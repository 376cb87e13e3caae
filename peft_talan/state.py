"""Lets the layers of the transformers cache carry the latent memories of a generation.

A cache layer that carries memories becomes an instance of a subclass of its own class, whose methods keep the memories
in step with the keys: what reorders, repeats, selects, crops or resets the one does it to the other. So the memory
follows beams, assisted decoding and several turns, and two generations can't mix.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

import torch
from transformers.cache_utils import Cache, StaticLayer

from .memory import LatentMemory


def _rows_follow(memories: dict[str, LatentMemory], rows: torch.Tensor | None, repeats: int = 1) -> None:
    """Let every memory take over rows by index or by mask, or repeat each row."""
    for memory in memories.values():
        if memory.state is not None:
            every_row = torch.arange(memory.state.shape[0], device=memory.state.device)
            chosen = every_row if rows is None else every_row[rows.to(every_row.device)]
            memory.select_rows(chosen.repeat_interleave(repeats))


@cache
def _carrying_class(base_class: Any) -> Any:
    """Make the subclass of a cache layer's class that carries memories.

    It derives from that class alone: only then can a living layer take the subclass on.
    """

    class CarryingLayer(base_class):
        latent_memories: dict[str, LatentMemory]

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            super().reorder_cache(beam_idx)
            _rows_follow(self.latent_memories, beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            _rows_follow(self.latent_memories, None, repeats)

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            super().batch_select_indices(indices)
            _rows_follow(self.latent_memories, indices)

        def crop(self, tokens_to_remove: int) -> None:
            super().crop(tokens_to_remove)
            for memory in self.latent_memories.values():
                memory.crop(abs(tokens_to_remove))

        def reset(self) -> None:
            super().reset()
            for memory in self.latent_memories.values():
                memory.reset()

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            # Copied and pickled by the base class: the subclass has no importable name.
            return _restore_layer, (base_class, self.__dict__.copy())

    CarryingLayer.__name__ = CarryingLayer.__qualname__ = base_class.__name__
    return CarryingLayer


def _restore_layer(base_class: Any, attributes: dict[str, Any]) -> Any:
    layer = base_class.__new__(base_class)
    layer.__dict__.update(attributes)
    layer.__class__ = _carrying_class(base_class)
    return layer


def _memories_of(cache: Cache, index: int) -> dict[str, LatentMemory]:
    if index >= len(cache.layers):
        return {}
    return getattr(cache.layers[index], "latent_memories", {})


def memory_to_go_on_with(
    cache: Cache,
    index: int,
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
    memory = _memories_of(cache, index).get(adapter_name)
    if memory is None and int(past) == 0:
        layer = cache.layers[index] if index < len(cache.layers) else None
        static = isinstance(layer, StaticLayer)
        memory = LatentMemory(static=static, recorded=not static and bool(getattr(layer, "is_croppable", True)))
        memory.rows = rows
        return memory
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


def carry_memory(cache: Cache, index: int, adapter_name: str, memory: LatentMemory) -> None:
    """Let the cache carry an adapter's memory for a block.

    Args:
        cache: The cache.
        index: The block's index.
        adapter_name: The adapter's name.
        memory: The memory.

    Raises:
        ValueError: The cache has no layer for the block.
    """
    if cache.layer_class_to_replicate is not None:
        # Such a cache makes its layers when keys first reach them, which at a block's input is still to come.
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    if index >= len(cache.layers):
        raise ValueError(
            f"the cache has {len(cache.layers)} layers and none for block {index}, so the side path's memory has no "
            "place; pass DynamicCache(config=model.config), or use_cache=False"
        )
    layer: Any = cache.layers[index]
    if not hasattr(layer, "latent_memories"):
        layer.latent_memories = {}
        layer.__class__ = _carrying_class(type(layer))  # type: ignore[arg-type]
    layer.latent_memories[adapter_name] = memory


def mark_memories_left_behind(cache: Cache, index: int, running: Collection[str]) -> None:
    """Mark the memories that a call's tokens passed by: their cache has moved ahead of them.

    Args:
        cache: The cache.
        index: The block's index.
        running: The names of the adapters that the tokens did pass through.
    """
    for name, memory in _memories_of(cache, index).items():
        if name not in running:
            memory.behind = True
