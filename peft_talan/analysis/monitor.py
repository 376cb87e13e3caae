"""Watches side paths while they train."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..tuner.layer import TalanLayer
from .streams import measure_layer
from .token_measures import side_path_statistics

TOKENS_MEASURED = 512
"""The number of tokens of each row that are measured: the readable equations hold one memory per token."""


def _is_logged(args: TrainingArguments, state: TrainerState, first_of_epoch: bool) -> bool:
    """Whether Trainer will log the step that begins."""
    if args.logging_strategy == IntervalStrategy.EPOCH:
        return first_of_epoch
    if args.logging_strategy != IntervalStrategy.STEPS:
        return False
    by_interval = state.logging_steps > 0 and (state.global_step + 1) % state.logging_steps == 0
    return by_interval or (args.logging_first_step and state.global_step == 0)


class SidePathMonitor(TrainerCallback):
    """Logs what every side path does: `talan/ADAPTER/block_I/{relative_norm, gate, slot_entropy}`.

    It measures in the steps that Trainer logs (the first step of an epoch where it logs by epoch), over all of their
    forward passes that train, and costs nothing in the others. See `SidePathStatistics` for what the numbers are.

    Args:
        log: Where the numbers go: `trainer.log`, as in `trainer.add_callback(SidePathMonitor(trainer.log))`. Trainer
            calls its loggers before the user's callbacks, so a callback can't add to a log.

    Examples:
        >>> trainer.add_callback(SidePathMonitor(trainer.log))
    """

    def __init__(self, log: Callable[[dict[str, float]], None]) -> None:
        self._log = log
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, list[float]] = defaultdict(list)
        self._epoch_begins = False

    def on_epoch_begin(self, *given: Any, **kwargs: Any) -> None:
        """Note that the next step is an epoch's first."""
        self._epoch_begins = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Log what was measured in the last measured step, and measure again if this step will be logged."""
        self._report()
        first_of_epoch, self._epoch_begins = self._epoch_begins, False
        if model is None or not _is_logged(args, state, first_of_epoch):
            return
        layers = (module for module in model.modules() if isinstance(module, TalanLayer))
        self._handles = [layer.register_forward_pre_hook(self._measure) for layer in layers]

    def on_step_end(self, *given: Any, **kwargs: Any) -> None:
        """Stop measuring. Logging must wait: a log of ours would stand for the one that Trainer is about to write."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def on_train_end(self, *given: Any, **kwargs: Any) -> None:
        """Log what was measured in the last measured step."""
        self._report()

    def _report(self) -> None:
        measured = {name: sum(values) / len(values) for name, values in self._seen.items()}
        self._seen.clear()
        if measured:
            self._log(measured)

    def _measure(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        # Passes without gradients do not train: rollouts, or those of a reference model.
        trains = layer.training and torch.is_grad_enabled()
        if not isinstance(layer, TalanLayer) or not trains or layer.disable_adapters:
            return
        for name, statistics, _ in measure_layer(side_path_statistics, layer, args, TOKENS_MEASURED):
            for field, value in statistics._asdict().items():
                if value is not None:
                    self._seen[f"talan/{name}/block_{layer.block_index}/{field}"].append(value)
