"""What transformers' continuous batching can't run exactly is refused before a request is taken."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.generation.continuous_batching import ContinuousBatchingManager

from ..tuner.attachment import attached_side_paths


def check_continuous_batching(model: nn.Module) -> None:
    """Refuse a model whose side paths continuous batching can't run.

    Args:
        model: The model that would be served.

    Raises:
        ValueError: The model has side paths that are on.
    """
    if any(not layer.disable_adapters for _, layer in attached_side_paths(model)):
        raise ValueError(
            "continuous batching (generate_batch, init_continuous_batching) can't run this model's TALAN side paths "
            "yet; use model.generate, or serve the low-rank half alone: merge_and_unload(side_path='drop')"
        )


def _checked(initialize: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(initialize)
    def checked_initialize(self: ContinuousBatchingManager, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        check_continuous_batching(model)
        initialize(self, model, *args, **kwargs)

    return checked_initialize


def check_managers() -> None:
    """Let every manager of continuous batching look at its model first; a second call does nothing.

    A manager runs the model in a thread of its own and puts what that raises into each request's output, so the
    constructor is the last place that can refuse; transformers offers no hook there.
    """
    if not hasattr(ContinuousBatchingManager.__init__, "__wrapped__"):
        ContinuousBatchingManager.__init__ = _checked(ContinuousBatchingManager.__init__)  # type: ignore[method-assign]
