"""What training shows, collects and saves while it runs: callbacks for Trainer and the trainers made of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .prompts import PromptForm


class TrainingProgress(ProgressCallback):
    """Transformers' progress bar, with the latest losses and the learning rate beside the time left."""

    SHOWN: ClassVar = {
        "loss": "loss",
        "completion_loss": "completion_loss",
        "learning_rate": "lr",
        "eval_loss": "eval_loss",
    }

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the numbers in the bar, not below it."""
        if self.training_bar is not None:
            self.latest = {**getattr(self, "latest", {}), **(logs or {})}
            known = [(short, self.latest[name]) for name, short in self.SHOWN.items() if name in self.latest]
            self.training_bar.set_postfix({short: f"{float(value):.4g}" for short, value in known})


class StepReport(TrainerCallback):
    """Collects the loss and the seconds of every step, and reports the loss; Trainer must log each."""

    def __init__(self, report: Callable[[float], None] = lambda loss: None) -> None:
        self.report = report
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *given: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, *given: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._started)

    def on_log(self, *given: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Collect and report the loss."""
        if "loss" in (logs or {}):
            self.losses.append(float((logs or {})["loss"]))
            self.report(self.losses[-1])


class StopOnInterrupt(TrainerCallback):
    """Lets the first Ctrl-C finish its step and save a checkpoint, and says so; the second one stops at once."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self.requested = False
        self.previous: Any = None

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.report("stopping: this step is finished and saved; press Ctrl-C again to stop at once")
        signal.signal(signal.SIGINT, self.previous)

    def on_train_begin(self, *given: Any, **kwargs: Any) -> None:
        """Listen."""
        self.previous = signal.signal(signal.SIGINT, self._request)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop after an interrupt."""
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, *given: Any, **kwargs: Any) -> None:
        """Listen no more."""
        signal.signal(signal.SIGINT, self.previous)


class SavePromptForm(TrainerCallback):
    """Keeps the form of the prompts, and stores it in every checkpoint."""

    def __init__(self, form: PromptForm) -> None:
        self.form = form

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write it."""
        if args.should_save:
            self.form.save(Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))
