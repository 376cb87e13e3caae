"""Watches side paths while they train."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .analysis import side_path_statistics
from .layer import TalanLayer

TOKENS_MEASURED = 512
"""So many tokens of each row are measured: the readable equations hold one memory a token."""


class SidePathMonitor(TrainerCallback):
    """Logs what every side path does: `talan/ADAPTER/block_I/{relative_norm, gate, slot_entropy}`.

    It measures in the steps that Trainer logs, and costs nothing in the others. See
    `peft_talan.analysis.SidePathStatistics` for what the numbers are.

    Args:
        log: Where the numbers go: `trainer.log`, as in `trainer.add_callback(SidePathMonitor(trainer.log))`.
    """

    def __init__(self, log: Callable[[dict[str, float]], None]) -> None:
        self._log = log
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, list[float]] = defaultdict(list)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Log what the last measured step gave, and measure again if this step will be logged."""
        self._report()
        if model is None or (state.global_step + 1) % max(state.logging_steps, 1):
            return
        layers = (module for module in model.modules() if isinstance(module, TalanLayer))
        self._handles = [layer.register_forward_pre_hook(self._measure) for layer in layers]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop measuring. Logging must wait: a log of ours would stand for the one that Trainer is about to write."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what the last measured step gave."""
        self._report()

    def _report(self) -> None:
        measured = {name: sum(values) / len(values) for name, values in self._seen.items()}
        self._seen.clear()
        if measured:
            self._log(measured)

    def _measure(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if not isinstance(layer, TalanLayer) or not layer.training or layer.disable_adapters:
            return
        hidden_states, position, call = args[:3]
        batch, tokens = hidden_states.shape[:2]
        layout = call.layout(batch, tokens, 0)
        measured = [None if part is None else part[:, :TOKENS_MEASURED] for part in layout]
        for name in layer.active_adapters:
            if layer.talan_position.get(name) != position:
                continue
            statistics = side_path_statistics(
                hidden_states[:, :TOKENS_MEASURED].detach(),
                layer.parameters_of(name),
                layer.talan_options[name],
                alpha=layer.alpha_at_run_time(name),
                valid=measured[0],
                segment_ids=measured[1],
            )
            for field, value in statistics._asdict().items():
                if value is not None:
                    self._seen[f"talan/{name}/block_{layer.block_index}/{field}"].append(value)
