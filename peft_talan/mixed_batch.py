"""Batches whose rows run through different adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.model import _adapter_names_pre_forward_hook, _get_encoder
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .layer import TalanLayer


def low_rank_names(model: nn.Module, adapter_names: Sequence[str], known: Collection[str]) -> list[str]:
    """The adapter of each row as PEFT's layers take it: to them, an adapter without low-rank half does not exist.

    Args:
        model: The base model with its adapters.
        adapter_names: The adapter of each row, `__base__` for none.
        known: The names of all adapters.

    Returns:
        The names, with `__base__` for adapters that are a side path alone.
    """
    low_rank = {n for m in model.modules() if isinstance(m, LoraLayer) for n in m._get_available_adapters()}
    return ["__base__" if name in known and name not in low_rank else name for name in adapter_names]


@contextmanager
def rows_named(model: nn.Module, adapter_names: Sequence[str], beams: int, low_rank: Sequence[str]) -> Iterator[None]:
    """Tell the side paths each row's adapter, as PEFT tells LoRA's layers.

    Args:
        model: The base model with its adapters.
        adapter_names: The adapter of each row, `__base__` for none.
        beams: The number of beams; beam search repeats every row, but not for an encoder.
        low_rank: What PEFT's layers were told, of `low_rank_names`.

    Yields:
        Nothing; the names hold inside the context.
    """
    repeated = [name for name in adapter_names for _ in range(beams)]
    encoder = _get_encoder(model)
    once = set() if encoder is None else set(encoder.modules())
    told_otherwise = list(low_rank) != list(adapter_names)
    handles = []
    for module in model.modules():
        if isinstance(module, TalanLayer) or (told_otherwise and isinstance(module, AuxiliaryTrainingWrapper)):
            names = adapter_names if module in once else repeated
            hook = partial(_adapter_names_pre_forward_hook, adapter_names=names)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
