"""Compares LoRA, LoRA of a matched size and TALAN on one set of rows, one after the other or in several processes."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.utils import logging

from ..config import TalanConfig
from .callbacks import StepReport
from .data import Rows
from .models import load_model, load_tokenizer
from .prompts import PromptForm, encode, encode_rows
from .scores import Scores, score_rows, text_loss
from .training import make_trainer, save

BASE, LORA, MATCHED, TALAN = "base model", "LoRA", "LoRA-matched", "LoRA+TALAN"
ARMS = (LORA, MATCHED, TALAN)

Report = Callable[[tuple[str, int], str, int], None]
"""Called with arm and seed, what is being done, and how many steps were."""


@dataclass(frozen=True)
class Job:
    """What all arms share.

    Args:
        model: The base model's folder or hub id.
        rows: What to train on.
        held_out: What to score on.
        text: The plain text for retention.
        output: The folder for the adapters.
        rank: The rank of the LoRA weights.
        axes: The axes of the side path, fields of `TalanConfig`.
        arguments: Of `make_trainer`.
        dtype: The dtype of the base model. Default `"auto"`: as it was saved.
        device: Where to run. Default None: an accelerator if there is one.
        threads: Threads per process. Default None: torch's choice.
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

    def adapted_shapes(self, config: LoraConfig) -> Any:
        """Build the model with an adapter on the meta device; no weight is read."""
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.model))
            return get_peft_model(empty, config, low_cpu_mem_usage=True)

    def config(self, arm: str) -> LoraConfig:
        """Return the configuration of one of `ARMS`.

        `MATCHED` has the smallest rank at which LoRA trains at least as many parameters as LoRA with the side path.
        """
        talan = TalanConfig(**lora_options(self.rank), **self.axes)
        if arm == TALAN:
            return talan
        lora = LoraConfig(**lora_options(self.rank))
        if arm == LORA:
            return lora
        sizes = [self.adapted_shapes(config).get_nb_trainable_parameters()[0] for config in (talan, lora)]
        return LoraConfig(**lora_options(math.ceil(self.rank * sizes[0] / sizes[1])))

    def check(self) -> None:
        """Raise `ValueError` for axes that the base model can't have."""
        self.adapted_shapes(self.config(TALAN))


@dataclass(frozen=True)
class Outcome:
    """What was measured of one arm with one seed.

    Args:
        arm: One of `ARMS`, or `BASE`.
        seed: Of initialization and order.
        scores: On the held-out rows.
        text_loss: The mean loss per token of the plain text, nats.
        trainable: The number of trainable parameters.
        losses: The training loss by step, nats per token.
        seconds: Of training, per step.
        folder: Where the adapter is.
    """

    arm: str
    seed: int
    scores: Scores
    text_loss: float
    trainable: int = 0
    losses: Sequence[float] = ()
    seconds: float = 0.0
    folder: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The outcome as JSON can hold it."""
        measured = {"loss": self.scores.loss, "exact_match": self.scores.exact_match, "text_loss": self.text_loss}
        trained = {"trainable": self.trainable, "seconds_per_step": self.seconds, "losses": list(self.losses)}
        return {"arm": self.arm, "seed": self.seed, **measured, **trained, "adapter": self.folder}


def lora_options(rank: int) -> dict[str, Any]:
    """The options of LoRA in every arm, by their names in `LoraConfig`."""
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def run_arm(job: Job, arm: str, seed: int, name: str, report: Callable[[str, int], None]) -> Outcome:
    """Train and score one arm in this process, and save its adapter as `name`; `BASE` is scored alone."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    model: Any = load_model(job.model, job.dtype, job.device)
    tokenizer = load_tokenizer(job.model)
    trained: dict[str, Any] = {}
    if arm != BASE:
        steps = StepReport(lambda loss: report(f"loss {loss:.3f}", 1))
        folder = Path(job.output, name)
        set_seed(seed)
        form = PromptForm.of(job.rows, tokenizer)
        trainer: Any = make_trainer(
            model,
            tokenizer,
            encode_rows(tokenizer, job.rows),
            form,
            job.config(arm),
            folder,
            callbacks=[steps],
            **{**job.arguments, "seed": seed, "logging_steps": 1, "save_strategy": "no"},
        )
        trainer.train()
        save(trainer, form, folder)
        model = trainer.model.eval()
        trained = {"losses": steps.losses, "seconds": statistics.median(steps.seconds), "folder": str(folder)}
        trained["trainable"] = model.get_nb_trainable_parameters()[0]
    report("scores", 0)
    held_out = [encode(tokenizer, row) for row in job.held_out.rows]
    scores = score_rows(model, tokenizer, held_out, max_length=int(job.arguments.get("max_length", 1024)))
    outcome = Outcome(arm, seed, scores, text_loss(model, tokenizer, job.text), **trained)
    report("done", int(arm == BASE))
    return outcome


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep what libraries show from running through the bars of the comparison, and leave their settings as found."""
    shown = [
        (datasets.is_progress_bar_enabled, datasets.disable_progress_bars, datasets.enable_progress_bars),
        (logging.is_progress_bar_enabled, logging.disable_progress_bar, logging.enable_progress_bar),
    ]
    with warnings.catch_warnings(), ExitStack() as restored:
        warnings.simplefilter("ignore", FutureWarning)
        for is_shown, disable, enable in shown:
            if is_shown():
                restored.callback(enable)
                disable()
        yield


def _run_reporting(job: Job, key: tuple[str, int], name: str, reports: Any) -> Outcome:
    with _without_bars():
        return run_arm(job, *key, name, lambda note, steps: reports.put((key, note, steps)))


def compare(
    job: Job,
    arms: Sequence[str] = ARMS,
    seeds: Sequence[int] = (0,),
    *,
    processes: int = 1,
    report: Report = lambda key, note, steps: None,
) -> list[Outcome]:
    """Train and score every arm with every seed; the base model is scored once."""
    job.check()
    keys = [(BASE, 0), *((arm, seed) for seed in seeds for arm in arms)]
    names = [arm if len(seeds) == 1 else f"{arm}-seed-{seed}" for arm, seed in keys]
    if processes == 1:
        with _without_bars():
            return [run_arm(job, *key, name, partial(report, key)) for key, name in zip(keys, names, strict=True)]
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, context) as pool:
        reports, others = manager.Queue(), set(multiprocessing.active_children())
        futures = [pool.submit(_run_reporting, job, key, name, reports) for key, name in zip(keys, names, strict=True)]
        running = set(futures)
        try:
            while running:
                ended, running = wait(running, timeout=0.2)
                while not reports.empty():
                    report(*reports.get())
                for future in ended:
                    future.result()
        except BaseException:
            # At once: the pool would run all that waits, and wait for what runs.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
        return [future.result() for future in futures]
