"""Caches without keys: how to tell that their recurrent states went on."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


def recurrent_version(cache: Cache) -> tuple[Any, ...] | None:
    """What changes whenever a cache without keys goes on: the identity and version of its recurrent states.

    Args:
        cache: The cache.

    Returns:
        Something to compare; None if the cache has keys, or in a compiled graph or inference mode.
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
