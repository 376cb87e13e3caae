"""Training for recall from beyond a window: the window shrinks, and the last answer alone is trained on.

A model that loses its old keys at once goes on relying on the keys that are left. While the window shrinks, what is
asked for moves out of it little by little, and the side paths learn to carry it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from inspect import currentframe
from random import Random
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuner.sliding_window import own_window, set_window
from .data import DataError, Rows


def last_answers(rows: Rows) -> Rows:
    """Rows of `messages` as prompts and completions, so that the last answer alone is trained on.

    In the mean over a whole conversation's tokens, the few of an answer that needs recall have no weight.

    Args:
        rows: Rows of any format.

    Returns:
        The rows; those of other formats as they are.

    Raises:
        DataError: A conversation doesn't end with an answer to something.
    """
    if rows.form != "messages":
        return rows
    split = []
    for row, place in zip(rows.rows, rows.places, strict=True):
        *given, last = row["messages"]
        if not given or last["role"] != "assistant":
            raise DataError(f"{place}: 'messages' must end with the assistant's answer to what stands before it")
        kept = {name: value for name, value in row.items() if name != "messages"}
        split.append({"prompt": given, "completion": [last], **kept})
    return replace(rows, rows=split)


def _running_trainer() -> Trainer:
    """The trainer whose loop calls this: callbacks are given everything but it."""
    frame = currentframe()
    while frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), Trainer):
            return caller
        frame = frame.f_back
    raise ValueError("ShrinkingWindow: it is a callback of transformers' Trainer; give it as one, and call train()")


class ShrinkingWindow(TrainerCallback):
    """Trains with a window that shrinks from the rows' length to the model's own.

    A callback for `Trainer` and every trainer made of it. The window depends on the step and the seed alone: it is the
    same in every process, and goes on where a resumed run stopped. Outside of `Trainer.training_step`, and so in
    evaluations, in what is saved and after an error or Ctrl-C, the model has its own window.

    Args:
        start (int | None): The window at the first step. None: the longest row of the training data, whose column
            `input_ids` is read. Default None.
        end (int | None): The last window. None: the model's. Default None.
        share (float): The share of all steps after which the window is `end`, in (0, 1]. Default 0.3.
        jitter (tuple[float, float]): Each step's window is the schedule's times a number drawn from this range, but
            never below `end`. Default (0.6, 1.0).
        shape ("linear" | "exponential"): Whether each step takes away as many tokens or as large a share. Default
            `"linear"`.
        seed (int): Of what is drawn. Default 0.

    Raises:
        ValueError: An argument can't be used; or, when training begins, the model has no window, or the rows' length
            isn't known.

    Examples:
        >>> trainer = SFTTrainer(model, arguments, train_dataset=rows, callbacks=[ShrinkingWindow()])
    """

    def __init__(
        self,
        start: int | None = None,
        end: int | None = None,
        share: float = 0.3,
        jitter: tuple[float, float] = (0.6, 1.0),
        shape: str = "linear",
        seed: int = 0,
    ) -> None:
        for name, value in (("start", start), ("end", end)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 2):
                raise ValueError(f"{name}={value!r}: give a whole number of at least 2, or None")
        if start is not None and end is not None and start < end:
            raise ValueError(f"start={start}: smaller than end={end}; give a longer start, or None")
        if not 0 < share <= 1:
            raise ValueError(f"share={share!r}: give a number above 0 and up to 1")
        if not 0 < jitter[0] <= jitter[1] <= 1:
            raise ValueError(f"jitter={jitter!r}: give two numbers above 0 and up to 1, the smaller one first")
        if shape not in ("linear", "exponential"):
            raise ValueError(f"shape={shape!r}: choose 'linear' or 'exponential'")
        self.start, self.end, self.share, self.jitter, self.shape, self.seed = start, end, share, jitter, shape, seed
        self._ends = (start, end)
        self._installed = ExitStack()

    def window_at(self, step: int, steps: int) -> int:
        """The window of one step.

        Args:
            step: The optimizer steps that were taken before.
            steps: All steps of the training.

        Returns:
            The keys that a token sees.

        Raises:
            ValueError: `start` or `end` is None, and no training has started that would fill it in.
        """
        start, end = self._ends
        if start is None or end is None:
            raise ValueError(f"start={self.start!r}, end={self.end!r}: give both, or start the training first")
        done = min(1.0, step / max(1.0, self.share * steps))
        window = start + done * (end - start) if self.shape == "linear" else start * (end / start) ** done
        drawn = Random(f"{self.seed} {step}").uniform(*self.jitter)
        return max(end, round(window * drawn))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find out where the window starts and ends."""
        self._installed.close()  # of a training that an error ended between two steps
        self._own = own_window(kwargs["model"])
        end = self.end or self._own
        self._ends = (self.start or max(end, _longest(kwargs.get("train_dataloader"))), end)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the step have its window."""
        self.latest = self.window_at(state.global_step, state.max_steps)
        self._install(kwargs["model"])

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the step's next batch have its window, too."""
        self._install(kwargs["model"])

    def _install(self, model: Any) -> None:
        """Let the next call of `training_step` have the step's window: no callback is called when an error ends it."""
        trainer = _running_trainer()
        training_step, own = trainer.training_step, vars(trainer)
        replaced = own.get("training_step")

        def windowed(*given: Any, **options: Any) -> torch.Tensor:
            with self._installed:
                set_window(model, self.latest)
                return training_step(*given, **options)

        def restore() -> None:
            set_window(model, self._own)
            del own["training_step"]
            if replaced is not None:
                own["training_step"] = replaced

        own["training_step"] = windowed
        self._installed.callback(restore)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the trainer as it was."""
        self._installed.close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the window beside the loss."""
        if logs is not None and "loss" in logs:
            logs["window"] = self.latest
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1]["window"] = self.latest


def _longest(loader: Any) -> int:
    """The tokens of the longest row that is trained on; of the longest sample, where rows are packed."""
    rows: Any = getattr(loader, "dataset", None)
    columns = getattr(rows, "column_names", None) or ()
    try:
        len(rows)  # A stream has no length, and may have no end.
        if "seq_lengths" in columns:
            return max(max(lengths) for lengths in rows["seq_lengths"])
        return max(len(row["input_ids"]) for row in rows)
    except (TypeError, KeyError, ValueError):
        raise ValueError(
            "start=None: the training data has no column 'input_ids' whose longest row could be found; give start"
        ) from None
