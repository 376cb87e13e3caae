"""Forward passes that only measure: without dropout, a cache or a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def run(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Run the model without a cache; labels are left out."""
    model(**{"use_cache": False, **{name: part for name, part in inputs.items() if name != "labels"}})
