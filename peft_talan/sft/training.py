"""Supervised fine-tuning through TRL's SFTTrainer: its arguments by their own names, and what programs add."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from .data import DataError, Rows
from .prompts import PromptForm, encode


class TrainingProgress(ProgressCallback):
    """Transformers' progress bar, with the latest losses and the learning rate beside the time left."""

    SHOWN: ClassVar = {"loss": "loss", "learning_rate": "lr", "eval_loss": "eval_loss"}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the numbers in the bar, not below it."""
        if self.training_bar is not None:
            self.latest = {**getattr(self, "latest", {}), **(logs or {})}
            known = [(short, self.latest[name]) for name, short in self.SHOWN.items() if name in self.latest]
            self.training_bar.set_postfix({short: f"{float(value):.4g}" for short, value in known})


class StepReport(TrainerCallback):
    """Collects the loss and the seconds of every step; Trainer must log each.

    Args:
        report: Called with the loss after each step.
    """

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
    """Lets the first Ctrl-C finish its step and save a checkpoint; the second one stops at once.

    Args:
        report: Called with the line that says so.
    """

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
    """Stores the form of the prompts in every checkpoint.

    Args:
        form: The form.
    """

    def __init__(self, form: PromptForm) -> None:
        self.form = form

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write it."""
        if args.should_save:
            self.form.save(Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))


def remove_checkpoints(output: Path) -> None:
    """Remove the checkpoints of an earlier run, which a new one must not be continued from."""
    for folder in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(folder)


def describe_lengths(tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int) -> list[str]:
    """Count the rows that training would change or leave out.

    Args:
        tokenizer: The model's tokenizer.
        rows: The rows.
        max_length: The longest row that is trained on, in tokens.

    Returns:
        A line for each kind.

    Raises:
        DataError: No row has a token to train on, or rows and tokenizer don't fit.
    """
    if rows.conversational and not tokenizer.chat_template:
        raise DataError(
            f"{rows.source}: the rows hold messages, and the tokenizer has no chat template; give 'prompt' and "
            "'completion' as texts"
        )
    if not rows.conversational and tokenizer.eos_token is None:
        raise DataError(f"{rows.source}: the tokenizer has no end-of-sequence token, which ends every text")
    encoded = [encode(tokenizer, row) for row in rows.rows]
    begins_twice = [tokenizer.bos_token_id] * 2

    def places(matches: Callable[[list[int], list[int]], bool]) -> list[str]:
        return [place for place, tokens in zip(rows.places, encoded, strict=True) if matches(*tokens)]

    cut = places(lambda prompt, completion: len(prompt) + len(completion) > max_length)
    lost = places(lambda prompt, _: rows.form == "prompt-completion" and len(prompt) >= max_length)
    doubled = places(lambda prompt, completion: (prompt + completion)[:2] == begins_twice)
    if len(lost) == len(rows):
        raise DataError(f"{rows.source}: every prompt has {max_length} tokens or more; raise max_length={max_length}")
    lines = []
    if cut:
        longest, place = max(zip((len(p) + len(c) for p, c in encoded), rows.places, strict=True))
        lines.append(
            f"{len(cut)} of {len(rows)} rows are longer than max_length={max_length} and are cut there (the longest: "
            f"{longest:,} tokens, {place})"
        )
    if lost:
        lines.append(f"{len(lost)} of these have no token of the completion left and are left out (first: {lost[0]})")
    if doubled:
        lines.append(
            f"{len(doubled)} of {len(rows)} rows begin with two {tokenizer.bos_token!r}: the tokenizer adds one; take "
            f"it out of the data (first: {doubled[0]})"
        )
    return lines


def make_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    adapter: PeftConfig | None,
    output: Path,
    *,
    eval_rows: Rows | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> SFTTrainer:
    """Make a trainer whose adapter can be continued, and prompted later as it was trained.

    Args:
        model: A model, or its folder or hub id.
        tokenizer: Its tokenizer.
        rows: What to train on.
        adapter: The configuration of the adapter; None: the model has one.
        output: The folder for checkpoints.
        eval_rows: What to evaluate on while training. Default None.
        callbacks: More callbacks.
        **arguments: Of `trl.SFTConfig`; those that are None take what suits the machine.

    Returns:
        The trainer.
    """
    has_accelerator = torch.accelerator.is_available()
    defaults = {
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": has_accelerator,
        "use_cpu": not has_accelerator,
        "dataloader_pin_memory": has_accelerator,
        "report_to": "none",
        "disable_tqdm": True,
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(output), **{**defaults, **given}),
        train_dataset=Dataset.from_list(rows.rows),
        eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows.rows),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[SavePromptForm(PromptForm.of(rows)), *callbacks],
    )
    # It would print the numbers among the program's results.
    trainer.remove_callback(PrinterCallback)
    return trainer


def save(trainer: SFTTrainer, rows: Rows, output: Path) -> None:
    """Save a trainer's adapter, its tokenizer and the form of the rows' prompts into a folder."""
    trainer.save_model(str(output))
    if trainer.args.should_save:
        PromptForm.of(rows).save(output)
