"""Lets a transformers cache carry the latent memories of a generation, without a layer of its own.

The memories are an attribute of the cache, and follow the cache's own methods: what reorders, repeats, selects, crops
or resets the keys does the same to them. So they follow beams, assisted decoding and several turns, and two
generations can't mix.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, StaticLayer

from .latent_memory import LatentMemory
from .recurrent import recurrent_version
from .refusal import refuse_unless
from .token_layout import TokenLayout

ATTRIBUTE = "latent_memories"
OPERATIONS = ("reset", "crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices")
"""What changes the contents of a cache beside a forward pass: methods of `Cache`, and of the same name here."""


class CacheMemories:
    """The latent memories that a cache carries, by block index and adapter name.

    Args:
        static: Whether the cache has a fixed size.
    """

    def __init__(self, static: bool) -> None:
        self.static = static
        self.memories: dict[int, dict[str, LatentMemory]] = {}
        # The number of real tokens that the memories hold, [batch]; None: all tokens of the cache.
        self.entered: torch.Tensor | None = None
        # False after a crop: how many of the tokens that went were padding is not known.
        self.counted = True
        # What a cache without keys looked like after the last call; see `recurrent_version`.
        self.recurrent_version: tuple[Any, ...] | None = None

    def __iter__(self) -> Iterator[LatentMemory]:
        for memories in self.memories.values():
            yield from memories.values()

    def count(self, past: int | torch.Tensor, batch: int, tokens: int, layout: TokenLayout) -> None:
        """Count the tokens of a call in, and refuse a mask that takes away earlier ones which can't be removed.

        Args:
            past: The number of tokens that the cache held before this layout.
            batch: The number of rows.
            tokens: The number of tokens of this layout.
            layout: Which of the tokens are real.

        Raises:
            ValueError: Tokens in the memories are masked now.
        """
        after: int | torch.Tensor
        if self.entered is None and layout.valid is None and layout.segment_ids is None and not self.static:
            return
        before = past if self.entered is None else self.entered
        if layout.segment_ids is None:
            entering = tokens if layout.valid is None else layout.valid
            if isinstance(entering, torch.Tensor):
                entering = entering.squeeze(1) if tokens == 1 else entering.sum(-1)
            after = before + entering
        else:
            last = layout.segment_ids[:, -1:]
            inside = layout.segment_ids == last
            inside = inside if layout.valid is None else inside & layout.valid
            after = inside.sum(-1) + before * (last[:, 0] == 0)
        if layout.attended is not None:
            if self.counted and (layout.attended_past is None or self.static):
                refuse_unless(
                    layout.attended == after,
                    "attention_mask: it masks earlier tokens that are in the latent memory of this cache, or unmasks "
                    "some that are not; they can be removed in a call of several tokens with a dynamic cache only; "
                    "otherwise start from an empty cache",
                )
            after, self.counted = layout.attended, True
        self._keep(after, batch)

    def _keep(self, entered: int | torch.Tensor, batch: int) -> None:
        if self.static and self.entered is not None:
            self.entered.copy_(entered) if isinstance(entered, torch.Tensor) else self.entered.fill_(entered)
            return
        if isinstance(entered, torch.Tensor) and entered.shape == (batch,) and not self.static:
            self.entered = entered
            return
        device = entered.device if isinstance(entered, torch.Tensor) else None
        self.entered = torch.zeros(batch, dtype=torch.long, device=device) + entered
        if self.static and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.entered)

    def _select_rows(self, rows: torch.Tensor) -> None:
        if self.entered is not None:
            self.entered = self.entered.index_select(0, rows.to(self.entered.device))
        for memory in self:
            memory.select_rows(rows)

    def reset(self) -> None:
        """Empty every memory."""
        self.counted = True
        if self.static and self.entered is not None:
            self.entered.zero_()
        else:
            self.entered = None
        for memory in self:
            memory.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Let every memory forget the last tokens; their number is negative, as in transformers."""
        self.counted = self.counted and (tokens_to_remove == 0 or self.entered is None)
        for memory in self:
            memory.crop(abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let every memory's rows follow the beams."""
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        every_row = next((memory.every_row() for memory in self), torch.arange(0))
        self._select_rows(every_row.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows by index or by mask."""
        every_row = next((memory.every_row() for memory in self), torch.arange(0))
        self._select_rows(every_row[indices.to(every_row.device)])


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
        note_recurrent_state(cache)
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
        past: The number of tokens that the cache held before this call; a scalar tensor if it is on the device; None
            if the cache does not count tokens.
        batch: The number of rows of this call.
        scope: The adapter's memory scope.
        rows: The rows that the adapter runs for, [batch], bool; None: all.
        attended_past: Which earlier tokens the call's mask lets through, [batch, past], bool; None: not known.
    """

    block_index: int
    adapter_name: str
    past: int | torch.Tensor | None
    batch: int
    scope: str
    rows: torch.Tensor | None = None
    attended_past: torch.Tensor | None = None


def _carried(cache: Cache) -> CacheMemories | None:
    memories: CacheMemories | None = getattr(cache, ATTRIBUTE, None)
    return memories


def memories_of(cache: Cache) -> CacheMemories:
    """The memories that a cache carries; a cache that has none yet gets an empty set of them.

    Args:
        cache: The cache.

    Returns:
        The memories, which follow what is done to the cache.
    """
    carried = _carried(cache)
    if carried is None:
        carried = CacheMemories(static=any(isinstance(layer, StaticLayer) for layer in cache.layers))
        setattr(cache, ATTRIBUTE, carried)
        for name in OPERATIONS:
            setattr(cache, name, FollowedOperation(cache, name))
    return carried


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
    carried, past, name = memories_of(cache), request.past, request.adapter_name
    memory = carried.memories.get(request.block_index, {}).get(name)
    # Without their number: a compiled graph would be made anew for each.
    missing = (
        f"the cache holds tokens that did not all pass through adapter {name!r} at block {request.block_index} (it "
        "was filled with the adapter off, by another adapter or by another model), so the latent memory is missing; "
        "start from an empty cache and run the whole prompt with this adapter active"
    )
    if memory is None:
        refuse_unless(past is not None and past == 0, missing)
        memory = LatentMemory(static=carried.static)
        carried.memories.setdefault(request.block_index, {})[name] = memory
    else:
        refuse_unless(not memory.stale, missing)
        if past is not None:
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
    if request.attended_past is not None:
        memory.forget_masked(request.attended_past)
    memory.restrict_to_rows(request.rows)
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


def recurrent_state_is_new(cache: Cache) -> bool:
    """Whether a cache without keys is empty; one that went on without its memories makes them stale.

    Args:
        cache: The cache.

    Returns:
        True if no layer has a state yet.
    """
    carried, version = _carried(cache), recurrent_version(cache)
    if carried is not None and None not in (carried.recurrent_version, version):
        for memory in carried:
            memory.stale = memory.stale or carried.recurrent_version != version
    states = [getattr(layer, "has_previous_state", False) for layer in cache.layers]
    return not any(any(state.values()) if isinstance(state, dict) else bool(state) for state in states)


def note_recurrent_state(cache: Cache) -> None:
    """Note what a cache without keys looks like after a call, so that calls without the side paths are noticed.

    Args:
        cache: The cache.
    """
    carried = _carried(cache)
    if carried is not None:
        carried.recurrent_version = recurrent_version(cache)
