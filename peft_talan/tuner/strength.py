"""Scales the perturbations of trained side paths at run time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from .attachment import attached_side_paths
from .merged import merged_layers
from .side_path_layer import SidePathLayer


def _side_paths_named(
    model: nn.Module, adapter_name: str | None, layers: Sequence[int] | None
) -> list[tuple[SidePathLayer, str]]:
    """The side paths that adapter and blocks select; everything is checked before any of them changes."""
    adapters = [(layer, name, name) for _, layer in attached_side_paths(model) for name in layer.talan_options]
    merged = [
        (layer, key, one.adapter_name) for layer in merged_layers(model) for key, one in layer.side_paths.items()
    ]
    if not adapters and not merged:
        raise ValueError(f"model={type(model).__name__}: it has no side path; give a model with a TALAN adapter")
    candidates: list[tuple[SidePathLayer, str, str]] = []
    for group in (adapters, merged):  # An adapter comes before what was merged earlier.
        candidates = candidates or [found for found in group if adapter_name in (None, found[2])]
    if not candidates:
        names = sorted({name for _, _, name in (*adapters, *merged)})
        raise ValueError(
            f"adapter_name={adapter_name!r}: no side path is named so; there are {', '.join(map(repr, names))}"
        )
    selected = [(layer, key) for layer, key, _ in candidates]
    if layers is None:
        return selected
    present = sorted({layer.block_index for layer, _ in selected})
    if isinstance(layers, (int, str)) or not set(layers) <= set(present) or len(layers) == 0:
        raise ValueError(f"layers={layers!r}: give a list of blocks that have this side path: {present}")
    return [(layer, key) for layer, key in selected if layer.block_index in layers]


def check_strength(strength: float) -> float:
    """Refuse a strength that is not a finite number."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise ValueError(f"strength={strength!r}: give a finite number; 1 is as trained, 0 the LoRA weights only")
    return float(strength)


def set_talan_strength(
    model: nn.Module, strength: float, adapter_name: str | None = None, layers: Sequence[int] | None = None
) -> None:
    """Scale the perturbations of side paths from now on: `delta = strength alpha r W_write`.

    The strength belongs to this model in memory, for all threads. It is never saved; what is saved is `talan_alpha`,
    which it multiplies. Change it between generations: what a cache holds was computed with the strength of its time.

    Args:
        model: A model with a TALAN adapter, wrapped by PEFT, loaded by transformers or merged.
        strength: 1: as trained. 0: the LoRA weights only. Any other number, also a negative one, scales.
        adapter_name: The adapter. None: every TALAN adapter. Default None.
        layers: Indices of blocks with a side path. None: all of them. Default None.

    Raises:
        ValueError: The strength is not a finite number, or there is no such side path; nothing has changed then.

    Examples:
        >>> set_talan_strength(model, 0.5)
    """
    strength = check_strength(strength)
    for layer, name in _side_paths_named(model, adapter_name, layers):
        layer.talan_strength[name] = strength


@contextmanager
def talan_strength(
    model: nn.Module, strength: float, adapter_name: str | None = None, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Scale the perturbations of side paths inside a `with` block; see `set_talan_strength` for the arguments.

    Args:
        model: A model with a TALAN adapter.
        strength: 1: as trained. 0: the LoRA weights only.
        adapter_name: The adapter. None: every TALAN adapter. Default None.
        layers: Indices of blocks with a side path. None: all of them. Default None.

    Yields:
        Nothing; the strengths of before are back afterwards, also after an error.

    Raises:
        ValueError: The strength is not a finite number, or there is no such side path.

    Examples:
        >>> with talan_strength(model, 0.0):
        ...     low_rank_alone = model(**inputs).logits
    """
    strength = check_strength(strength)
    chosen = _side_paths_named(model, adapter_name, layers)
    before = [layer.talan_strength.get(name, 1.0) for layer, name in chosen]
    for layer, name in chosen:
        layer.talan_strength[name] = strength
    try:
        yield
    finally:
        for (layer, name), earlier in zip(chosen, before, strict=True):
            if name in layer.talan_options:  # It may have been deleted inside the block.
                layer.talan_strength[name] = earlier
