"""Lets a transformers cache carry the latent memories of a generation, without a layer of its own.

The memories are an attribute of the cache, and follow the cache's own methods: what reorders, repeats, selects, crops
or resets the keys does the same to them. So they follow beams, assisted decoding and several turns, and two
generations can't mix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from ..axes import check_causal
from ..private_names import OURS
from .cache_memories import CacheMemories
from .device_checks import refuse_unless
from .latent_memory import LatentMemory

ATTRIBUTE = "latent_memories"

FOLLOWED_METHODS = (
    "reset",
    "crop",
    "reorder_cache",
    "batch_repeat_interleave",
    "batch_select_indices",
    "activate_past_recording",
)
"""What changes a cache beside a forward pass: methods of `Cache`, and of the same name here."""


def _followed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A cache's method that then does the same to the memories which the cache carries."""

    @functools.wraps(method)
    def change_cache_and_memories(self: Cache, *args: Any, **kwargs: Any) -> Any:
        memories: CacheMemories | None = getattr(self, ATTRIBUTE, None)
        if memories is None and name == "activate_past_recording" and not isinstance(self, EncoderDecoderCache):
            memories = memories_of(self)
        # A method of a subclass may call that of `Cache`, which is followed, too.
        if memories is None or memories._is_following:
            return method(self, *args, **kwargs)
        memories._is_following = True
        try:
            if name == "crop":
                memories.check_crop(*args, **kwargs)
            result = method(self, *args, **kwargs)
            getattr(memories, name)(*args, **kwargs)
        finally:
            memories._is_following = False
        note_recurrent_state(self)
        return result

    setattr(change_cache_and_memories, OURS, True)
    return change_cache_and_memories


def follow_class(cache_class: type[Cache]) -> None:
    """Let the memories that caches of a class carry follow the class's methods; a second call does nothing.

    transformers has no hook for what is done to a cache, and a cache's class can't be replaced by a subclass inside of
    a graph that `torch.compile` traces.
    """
    for name in FOLLOWED_METHODS:
        owner = next(one for one in cache_class.__mro__ if name in vars(one))
        method = vars(owner)[name]
        if not hasattr(method, OURS):
            setattr(owner, name, _followed(name, method))


class MemoryRequest(NamedTuple):
    """Which memory a side path wants from a cache.

    Args:
        block_index: The block's index.
        child_name: The name of the block's child that has the side path.
        adapter_name: The adapter's name.
        past: The number of tokens that the cache held before this call; a scalar tensor if it is on the device; None
            if the cache does not count tokens.
        batch: The number of rows of this call.
        tokens: The number of tokens of this call.
        scope: The adapter's memory scope.
        rows: The rows that the adapter runs for, [batch], bool; None: all.
        attended_past: Which earlier tokens the call's mask lets through, [batch, past], bool; None: not known.
    """

    block_index: int
    child_name: str
    adapter_name: str
    past: int | torch.Tensor | None
    batch: int
    tokens: int
    scope: str
    rows: torch.Tensor | None = None
    attended_past: torch.Tensor | None = None


def _carried(cache: Cache) -> CacheMemories | None:
    memories: CacheMemories | None = getattr(cache, ATTRIBUTE, None)
    return memories


def memories_of(cache: Cache) -> CacheMemories:
    """The memories that a cache carries; a cache that has none yet gets an empty set of them."""
    carried = _carried(cache)
    if carried is None:
        if any(getattr(type(cache), name) is not getattr(Cache, name) for name in FOLLOWED_METHODS):
            follow_class(type(cache))
        windows = [layer.sliding_window for layer in cache.layers if hasattr(layer, "sliding_window")]
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
            windows.append(0)
        # Lists: `torch.compile` can't trace `min` and `max` of a generator.
        lengths = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)]
        carried = CacheMemories(
            max(lengths, default=None),
            window=min(windows, default=None),
            records_all=any(getattr(layer, "record_past", False) for layer in cache.layers),
        )
        setattr(cache, ATTRIBUTE, carried)
    return carried


def continue_or_start_memory(cache: Cache, request: MemoryRequest) -> LatentMemory:
    """Find the memory that the cache carries for an adapter at a block, or start one with an empty cache."""
    carried, past, name = memories_of(cache), request.past, request.adapter_name
    memories = carried.memories.setdefault((request.block_index, request.child_name), {})
    memory = memories.get(name)
    # Without their number: a graph would be compiled again for each.
    missing = (
        f"the cache holds tokens that did not all pass through adapter {name!r} at block {request.block_index} (it "
        "was filled with the adapter off, by another adapter or by another model), so the latent memory is missing; "
        "start from an empty cache and run the whole prompt with this adapter active"
    )
    max_recorded = carried.max_recorded(None if past is None else past + request.tokens)
    if memory is None:
        refuse_unless(past is not None and past == 0, missing)
        memory = memories[name] = LatentMemory(carried.static, max_recorded)
    else:
        refuse_unless(not memory.stale, missing)
        if past is not None:
            refuse_unless(memory.length == past, missing)
        refuse_unless(memory.has_run_for(request.rows), missing)
    if memory.state is not None and memory.state.shape[0] != request.batch:
        raise ValueError(
            f"the batch has {request.batch} rows, but the latent memory of adapter {name!r} in this cache has "
            f"{memory.state.shape[0]}; change a cache's rows by its own methods (batch_repeat_interleave, ...)"
        )
    if request.scope != "causal" and not (isinstance(past, int) and past == 0):
        check_causal(request.scope, name)
    if request.attended_past is not None:
        memory.forget_masked(request.attended_past)
    memory.limit_records(max_recorded)
    memory.restrict_to_rows(request.rows)
    return memory


def mark_stale(cache: Cache, block_index: int, child_name: str, running: Collection[str]) -> None:
    """Mark the memories of the adapters that did not run for a call's tokens: the cache is ahead of them now."""
    carried = _carried(cache)
    memories = {} if carried is None else carried.memories.get((block_index, child_name), {})
    for name, memory in memories.items():
        memory.stale = memory.stale or name not in running


def recurrent_version(cache: Cache) -> tuple[Any, ...] | None:
    """The identity and version of recurrent states, which change whenever a cache without keys goes on.

    None if the cache has keys, or in a compiled graph or inference mode.
    """
    if torch.compiler.is_compiling() or any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return None
    found: list[tuple[int, int]] = []
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            states = getattr(layer, name, None)
            for state in states.values() if isinstance(states, dict) else (states,):
                if isinstance(state, torch.Tensor):
                    if state.is_inference():
                        return None
                    found.append((id(state), state._version))
    return tuple(found)


def recurrent_state_is_new(cache: Cache) -> bool:
    """Whether a cache without keys is empty; one that went on without its memories makes them stale."""
    carried, version = _carried(cache), recurrent_version(cache)
    if carried is not None and None not in (carried.recurrent_version, version):
        for memory in carried:
            memory.stale = memory.stale or carried.recurrent_version != version
    states = [getattr(layer, "has_previous_state", False) for layer in cache.layers]
    return not any(any(state.values()) if isinstance(state, dict) else bool(state) for state in states)


def note_recurrent_state(cache: Cache) -> None:
    """Note what a cache without keys looks like after a call, so that calls without the side paths are noticed."""
    carried = _carried(cache)
    if carried is not None:
        carried.recurrent_version = recurrent_version(cache)


def tokens_before(cache: Cache) -> int | torch.Tensor | None:
    """The number of tokens that a cache holds.

    The first layer with keys counts them: others may have none (recurrent, shared), or those of an image.
    """
    counted: int | None = None if cache.layers else 0
    for layer in cache.layers:
        if isinstance(layer, CacheLayerMixin):
            length = layer.get_seq_length()
            if isinstance(length, torch.Tensor):
                # A copy: the cache counts on in place.
                return length + 0
            counted = int(length)
            if counted:
                break
    return counted
