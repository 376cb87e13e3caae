"""Lets a transformers cache carry the latent memories of a generation, without a layer of its own.

The memories are an attribute of the cache, and follow the cache's own methods: what reorders, repeats, selects, crops
or resets the keys does the same to them. So they follow beams, assisted decoding and several turns, and two
generations can't mix.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, StaticLayer

from .latent_memory import LatentMemory
from .refusal import refuse_unless

ATTRIBUTE = "latent_memories"
OPERATIONS = ("reset", "crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices")
"""What changes the contents of a cache beside a forward pass: methods of `Cache`, and of the same name here."""


class CacheMemories:
    """The latent memories that a cache carries, by block index and adapter name."""

    def __init__(self) -> None:
        self.memories: dict[int, dict[str, LatentMemory]] = {}

    def __iter__(self) -> Any:
        for memories in self.memories.values():
            yield from memories.values()

    def reset(self) -> None:
        """Empty every memory."""
        for memory in self:
            memory.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Let every memory forget the last tokens; their number is negative, as in transformers."""
        for memory in self:
            memory.crop(abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let every memory's rows follow the beams."""
        for memory in self:
            memory.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        for memory in self:
            memory.select_rows(memory.every_row().repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows by index or by mask."""
        for memory in self:
            every_row = memory.every_row()
            memory.select_rows(every_row[indices.to(every_row.device)])


class FollowedOperation:
    """A cache's own method and, after it, that of its memories: it stands in the cache's `__dict__`.

    It refers to the cache weakly: a cycle would keep the keys alive until Python's garbage collector runs.

    Args:
        cache: The cache.
        name: One of `OPERATIONS`.
    """

    def __init__(self, cache: Cache, name: str) -> None:
        self.cache = weakref.ref(cache)
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Change the cache and its memories.

        Args:
            *args: Those of the cache's method.
            **kwargs: The same.

        Returns:
            What the cache's method returns.
        """
        cache = self._own_cache()
        result = getattr(type(cache), self.name)(cache, *args, **kwargs)
        getattr(getattr(cache, ATTRIBUTE), self.name)(*args, **kwargs)
        return result

    def _own_cache(self) -> Cache:
        cache = self.cache()
        if cache is None:
            raise ReferenceError(f"{self.name}: the cache that this method belongs to is gone")
        return cache

    def __reduce__(self) -> tuple[Any, ...]:
        return FollowedOperation, (self._own_cache(), self.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> FollowedOperation:
        # Reached from the copy of the cache only, which `memo` has by now.
        return FollowedOperation(copy.deepcopy(self._own_cache(), memo), self.name)


class MemoryRequest(NamedTuple):
    """Which memory a side path asks a cache for.

    Args:
        block_index: The block's index.
        adapter_name: The adapter's name.
        past: The number of tokens that the cache held before this call; a scalar tensor if it is on the device.
        batch: The number of rows of this call.
        scope: The adapter's memory scope.
        rows: The rows that the adapter runs for, [batch], bool; None: all.
    """

    block_index: int
    adapter_name: str
    past: int | torch.Tensor
    batch: int
    scope: str
    rows: torch.Tensor | None = None


def _carried(cache: Cache) -> CacheMemories | None:
    memories: CacheMemories | None = getattr(cache, ATTRIBUTE, None)
    return memories


def continue_or_start_memory(cache: Cache, request: MemoryRequest) -> LatentMemory:
    """Find the memory that the cache carries for an adapter at a block, or start one with an empty cache.

    Args:
        cache: The cache.
        request: Which memory.

    Returns:
        The memory.

    Raises:
        ValueError: The cache holds tokens that did not pass through this side path, its rows are not the batch's, or
            a bidirectional memory would have to continue from a cache.
    """
    carried, past, name = _carried(cache), request.past, request.adapter_name
    memory = None if carried is None else carried.memories.get(request.block_index, {}).get(name)
    missing = (
        f"the cache holds {past if isinstance(past, int) else 'other'} tokens that did not all pass through adapter "
        f"{name!r} at block {request.block_index} (it was filled with the adapter off, by another adapter or by "
        "another model), so the latent memory is missing; start from an empty cache and run the whole prompt with "
        "this adapter active"
    )
    if memory is None:
        refuse_unless(past == 0, missing)
        memory = _start_memory(cache, request)
    else:
        refuse_unless(not memory.stale, missing)
        refuse_unless(memory.length == past, missing)
        refuse_unless(memory.covers(request.rows), missing)
    if memory.state is not None and memory.state.shape[0] != request.batch:
        raise ValueError(
            f"the batch has {request.batch} rows, but the latent memory of adapter {name!r} in this cache has "
            f"{memory.state.shape[0]}; change a cache's rows by its own methods (batch_repeat_interleave, ...)"
        )
    if request.scope == "bidirectional" and not (isinstance(past, int) and past == 0):
        raise ValueError(
            f"adapter {name!r} has talan_memory_scope='bidirectional', which can't continue from a cache: later "
            "tokens would change the memory of earlier ones; train with 'causal', or pass use_cache=False for features"
        )
    memory.restrict_to_rows(request.rows)
    return memory


def _start_memory(cache: Cache, request: MemoryRequest) -> LatentMemory:
    carried = _carried(cache)
    if carried is None:
        carried = CacheMemories()
        setattr(cache, ATTRIBUTE, carried)
        for name in OPERATIONS:
            setattr(cache, name, FollowedOperation(cache, name))
    memory = LatentMemory(static=any(isinstance(layer, StaticLayer) for layer in cache.layers))
    carried.memories.setdefault(request.block_index, {})[request.adapter_name] = memory
    return memory


def mark_stale(cache: Cache, block_index: int, running: Collection[str]) -> None:
    """Mark the memories of the adapters that did not run for a call's tokens: the cache is ahead of them now.

    Args:
        cache: The cache.
        block_index: The block's index.
        running: The names of the adapters that the tokens did pass through.
    """
    carried = _carried(cache)
    memories = {} if carried is None else carried.memories.get(block_index, {})
    for name, memory in memories.items():
        # A name with a dot is that of a side path that belongs to the base model and always runs.
        if name not in running and "." not in name:
            memory.stale = True
