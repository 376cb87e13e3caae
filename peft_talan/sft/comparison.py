"""Compares LoRA, LoRA of a matched size and TALAN on one set of rows, one after the other or in several processes."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ..config import TalanConfig
from .data import Rows
from .models import load_model, load_tokenizer
from .scores import Scores, score_rows, text_loss
from .training import make_trainer, save

BASE, LORA, MATCHED, TALAN = "base model", "LoRA", "LoRA-matched", "LoRA+TALAN"
ARMS = (LORA, MATCHED, TALAN)
DONE = "done"


@dataclass(frozen=True)
class Job:
    """What all arms share.

    Args:
        model: The base model's folder or hub id.
        rows: What to train on.
        held_out: What to score on.
        text: The plain text for retention.
        output: The folder for the adapters.
        rank: The rank of the low-rank half.
        axes: The axes of the side path, fields of `TalanConfig`.
        arguments: Of `trl.SFTConfig`.
        dtype: The dtype of the base model.
        device: Where to run; None: an accelerator if there is one.
        threads: Threads of each process. None: torch's choice.
    """

    model: str
    rows: Rows
    held_out: Rows
    text: str
    output: str
    rank: int
    axes: dict[str, Any]
    arguments: dict[str, Any]
    dtype: str = "auto"
    device: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What one arm came to with one seed.

    Args:
        arm: One of `ARMS`, or `BASE`.
        seed: Of initialization and order.
        scores: On the held-out rows.
        text_loss: The mean loss of a token of the plain text, nats.
        trainable: The number of trainable parameters.
        losses: The training loss by step, nats a token.
        seconds: Of training, a step.
        folder: Where the adapter is.
    """

    arm: str
    seed: int
    scores: Scores
    text_loss: float
    trainable: int = 0
    losses: tuple[float, ...] = ()
    seconds: float = 0.0
    folder: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The outcome as JSON can hold it."""
        measured = {"loss": self.scores.loss, "exact_match": self.scores.exact_match, "text_loss": self.text_loss}
        trained = {"trainable": self.trainable, "seconds_a_step": self.seconds, "losses": list(self.losses)}
        return {"arm": self.arm, "seed": self.seed, **measured, **trained, "adapter": self.folder}


def _low_rank(rank: int) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def _trainable(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _adapted_shapes(model: str, config: LoraConfig) -> Any:
    # Shapes are enough: no weight is read.
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        return get_peft_model(empty, config, low_cpu_mem_usage=True)


def matched_rank(model: str, rank: int, axes: dict[str, Any]) -> int:
    """The smallest rank at which LoRA trains at least as many parameters as LoRA with the side path.

    Args:
        model: The base model's folder or hub id.
        rank: The rank of both low-rank halves.
        axes: The axes of the side path.

    Returns:
        The rank.
    """
    configs = (LoraConfig(**_low_rank(rank)), TalanConfig(**_low_rank(rank), **axes))
    lora, talan = (_trainable(_adapted_shapes(model, config)) for config in configs)
    return math.ceil(rank * talan / lora)


def check_axes(job: Job) -> None:
    """Refuse axes that the base model can't have, before anything is trained.

    Args:
        job: What all arms share.

    Raises:
        ValueError: There is no such block, for example.
    """
    _adapted_shapes(job.model, arm_config(job, TALAN))


def arm_config(job: Job, arm: str) -> LoraConfig:
    """The configuration of one arm.

    Args:
        job: What all arms share.
        arm: One of `ARMS`.

    Returns:
        The configuration.
    """
    if arm == TALAN:
        return TalanConfig(**_low_rank(job.rank), **job.axes)
    return LoraConfig(**_low_rank(matched_rank(job.model, job.rank, job.axes) if arm == MATCHED else job.rank))


class _StepReport(TrainerCallback):
    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self.started = 0.0
        self.seconds: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss")
        if loss is not None:
            self.report(f"loss {float(loss):.3f}")


def run_arm(job: Job, arm: str, seed: int, name: str, report: Callable[[str], None] = lambda note: None) -> Outcome:
    """Train and score one arm, in this process.

    Args:
        job: What all arms share.
        arm: One of `ARMS`, or `BASE`, which is scored alone.
        seed: Of initialization and order.
        name: Of the adapter's folder.
        report: Called once a step with what is being done.

    Returns:
        The outcome.
    """
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    model: Any = load_model(job.model, job.dtype, job.device)
    tokenizer = load_tokenizer(job.model)
    trained: dict[str, Any] = {}
    if arm != BASE:
        steps = _StepReport(report)
        folder = Path(job.output, name)
        set_seed(seed)
        arguments = {**job.arguments, "seed": seed, "logging_steps": 1, "save_strategy": "no"}
        trainer = make_trainer(
            model, tokenizer, job.rows, arm_config(job, arm), folder, callbacks=[steps], **arguments
        )
        trainer.train()
        save(trainer, job.rows, folder)
        model = trainer.model
        model.eval()
        losses = tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
        trained = {"losses": losses, "seconds": statistics.median(steps.seconds), "folder": str(folder)}
        trained["trainable"] = _trainable(model)
    limit = int(job.arguments.get("max_length", 1024))
    report("scores")
    scores = score_rows(model, tokenizer, job.held_out.rows, max_length=limit)
    return Outcome(arm, seed, scores, text_loss(model, tokenizer, job.text), **trained)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep what libraries show from running through the bars of the comparison."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
        yield
        datasets.enable_progress_bars()
        logging.enable_progress_bar()


def _run_reporting(job: Job, arm: str, seed: int, name: str, reports: Any) -> Outcome:
    with _without_bars():
        return run_arm(job, arm, seed, name, lambda note: reports.put((arm, seed, note)))


def compare(
    job: Job,
    arms: Sequence[str] = ARMS,
    seeds: Sequence[int] = (0,),
    *,
    processes: int = 1,
    report: Callable[[str, int, str], None] = lambda arm, seed, note: None,
) -> list[Outcome]:
    """Train and score every arm with every seed; the base model is scored once.

    Args:
        job: What all arms share.
        arms: Of `ARMS`. Default all.
        seeds: Of initialization and order. Default one.
        processes: How many run at a time, each in a process of its own. Default 1: in this process.
        report: Called with arm, seed and what is being done.

    Returns:
        The outcomes: the base model's, then those of each seed in the order of the arms.
    """
    if TALAN in arms:
        check_axes(job)
    wanted = [(BASE, 0), *((arm, seed) for seed in seeds for arm in arms)]
    names = {(arm, seed): arm if len(seeds) == 1 else f"{arm}-seed-{seed}" for arm, seed in wanted}
    if processes == 1:
        outcomes = []
        with _without_bars():
            for arm, seed in wanted:
                outcomes.append(run_arm(job, arm, seed, names[arm, seed], partial(report, arm, seed)))
                report(arm, seed, DONE)
        return outcomes
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, context) as pool:
        reports = manager.Queue()
        waiting = {key: pool.submit(_run_reporting, job, *key, name, reports) for key, name in names.items()}
        finished: set[tuple[str, int]] = set()
        while len(finished) < len(waiting):
            try:
                report(*reports.get(timeout=0.2))
            except Empty:
                for key, future in waiting.items():
                    if future.done() and key not in finished:
                        future.result()
                        finished.add(key)
                        report(*key, DONE)
        return [future.result() for future in waiting.values()]
