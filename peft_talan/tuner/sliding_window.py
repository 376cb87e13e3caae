"""The sliding window of a model's blocks, which is changed while it is trained or measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

EVERYTHING = 2**30
"""A window that no text fills."""


def pretrained_model(model: nn.Module) -> PreTrainedModel | None:
    """The model inside of an adapter's and a process group's wrappers."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def windows_of(model: nn.Module) -> Iterator[Any]:
    """Everything in a model that holds the window of every block: configurations, and modules with a copy."""
    seen: set[int] = set()
    for module in model.modules():
        for holder in (getattr(module, "config", None), module):
            if isinstance(getattr(holder, "sliding_window", None), int) and id(holder) not in seen:
                seen.add(id(holder))
                yield holder


def set_window(model: nn.Module, window: int) -> None:
    """Give every block of a model a window."""
    for holder in windows_of(model):
        holder.sliding_window = window


def own_window(model: nn.Module) -> int:
    """The window that every block of a model has."""
    holders = list(windows_of(model))
    windows = {holder.sliding_window for holder in holders}
    kinds = {kind for holder in holders for kind in getattr(holder, "layer_types", None) or ()}
    if len(windows) != 1 or kinds - {"sliding_attention"}:
        raise ValueError(
            f"model: it must have one sliding window in all blocks, and has {sorted(windows) or 'none'}"
            f"{f' and blocks of the kinds {sorted(kinds)}' if kinds - {'sliding_attention'} else ''}; use "
            "peft_talan.sft.window.with_sliding_window(model, window) before the trainer"
        )
    return int(windows.pop())


@contextmanager
def without_window(model: nn.Module) -> Iterator[None]:
    """Let every token of a model with one window see all tokens before it."""
    window = own_window(model)
    set_window(model, EVERYTHING)
    try:
        yield
    finally:
        set_window(model, window)
