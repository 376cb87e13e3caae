"""Batches whose rows run through different adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..private_names import _adapter_names_pre_forward_hook, _get_encoder
from .layer import TalanLayer

NO_ROWS = (
    "adapter_names=[...] names the adapter of each row, and continuous batching has no rows; call set_adapter(name) "
    "and run the requests of one adapter at a time"
)
"""Why a batch of mixed adapters can't be served by continuous batching."""


def low_rank_names(model: nn.Module, adapter_names: Sequence[str], known: Collection[str]) -> list[str]:
    """The adapter of each row as PEFT's layers take it: to them, an adapter without LoRA weights does not exist."""
    low_rank = {n for m in model.modules() if isinstance(m, LoraLayer) for n in m._get_available_adapters()}
    return ["__base__" if name in known and name not in low_rank else name for name in adapter_names]


@contextmanager
def rows_named(
    model: nn.Module,
    adapter_names: Sequence[str],
    known: Collection[str],
    beams: int,
    apply_to_low_rank: Callable[[list[str]], AbstractContextManager[None]],
) -> Iterator[None]:
    """Pass each row's adapter to LoRA's layers as PEFT does, and to the side paths in the same way."""
    low_rank = low_rank_names(model, adapter_names, known)
    repeated = [name for name in adapter_names for _ in range(beams)]
    encoder = _get_encoder(model)
    once = set() if encoder is None else set(encoder.modules())
    differs = low_rank != list(adapter_names)
    with ExitStack() as stack:
        context = apply_to_low_rank(low_rank)
        context.__enter__()
        # Without the error: PEFT removes its hooks after a plain `yield`, and would not remove them if it saw one.
        stack.callback(context.__exit__, None, None, None)
        for module in model.modules():
            if isinstance(module, TalanLayer) or (differs and isinstance(module, AuxiliaryTrainingWrapper)):
                names = adapter_names if module in once else repeated
                hook = partial(_adapter_names_pre_forward_hook, adapter_names=names)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
