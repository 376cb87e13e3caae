"""Shows xLSTM's state, which is no transformers cache, as one: it can then carry latent memories, too."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from .cache import ATTRIBUTE

SHOWN_AS = "latent_memories_cache"
"""The attribute of a state that holds the cache that it is shown as."""


class _StateLayer:
    """One block's part of a state, as transformers' recurrent layers show theirs."""

    def __init__(self, state: Any, index: int) -> None:
        self._state, self._index = state, index

    @property
    def recurrent_states(self) -> dict[int, torch.Tensor]:
        """The tensors, which the model changes in place."""
        return dict(enumerate(self._state.rnn_state[self._index]))

    @property
    def has_previous_state(self) -> bool:
        """Whether tokens have entered: a new state, and one that was reset, is zero."""
        return bool(self.recurrent_states[0].any())


class StateCache(Cache):
    """A cache without keys, whose tensors are those of a state."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def show(self, state: Any) -> None:
        """Become what a state is shown as.

        Args:
            state: The `xLSTMCache`.
        """
        self.layers: list[Any] = [_StateLayer(state, index) for index in state.rnn_state]
        setattr(state, SHOWN_AS, self)


def is_state(value: object) -> bool:
    """Whether a value is the state of an xLSTM, a `xLSTMCache`.

    Args:
        value: Anything.

    Returns:
        Whether it has the tensors of one.
    """
    return isinstance(getattr(value, "rnn_state", None), dict)


def cache_of_state(state: Any) -> StateCache:
    """Find the cache that a state is shown as; its memories are empty where the state is.

    Args:
        state: The `xLSTMCache`.

    Returns:
        The same cache every time.
    """
    cache: StateCache | None = getattr(state, SHOWN_AS, None)
    if cache is None:
        cache = StateCache()
        cache.show(state)
    memories = getattr(cache, ATTRIBUTE, None)
    if memories is not None and not any(layer.has_previous_state for layer in cache.layers):
        memories.reset()
        memories.recurrent_version = None
    return cache
