"""Runs the demo: the base model and two adapters, each in its own process, then a table, a plot and a question."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..version import __version__
from .base_model import default_model_folder
from .data import make_examples, split_examples
from .options import DemoError, DemoOptions
from .plot import plot_losses
from .worker import ARMS


class _Worker(threading.Thread):
    """One worker process, and the thread that follows what it says."""

    def __init__(self, job_file: Path, role: str, progress: Progress, task: TaskID) -> None:
        super().__init__(daemon=True)
        self.role, self.progress, self.task = role, progress, task
        self.result: dict[str, Any] = {}
        self.answer = ""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.errors = job_file.with_name(f"{role}.stderr")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "peft_talan.demo.worker", str(job_file), role],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self.start()

    def run(self) -> None:
        if self.process.stdout is None:
            raise RuntimeError(f"{self.role}: the worker process has no output to follow")
        for line in self.process.stdout:
            fields = json.loads(line)
            if "step" in fields:
                self.progress.update(self.task, advance=1, note=f"loss {fields['loss']:.3f}")
            elif "evaluated" in fields:
                self.progress.update(self.task, note=f"evaluated {fields['evaluated']}")
            self.result = fields.get("result", self.result)
            self.answer = fields.get("answer", self.answer)

    def wait(self) -> None:
        """Wait for the process to end.

        Raises:
            RuntimeError: It failed; the message is its own last line.
        """
        self.join()
        if self.process.wait() != 0:
            lines = self.errors.read_text().strip().splitlines() or ["no message"]
            raise RuntimeError(f"the process for {self.role} failed: {lines[-1]} (all of it: {self.errors})")
        self.errors.unlink()


def _make_job(options: DemoOptions) -> dict[str, Any]:
    if options.examples is not None:
        train, held_out = split_examples(list(options.examples), options.held_out, options.seed)
    else:
        wanted = options.steps * options.batch_size + options.held_out
        try:
            examples = make_examples(options.task, wanted, options.seed)
        except ValueError as error:
            raise DemoError(f"--task {options.task}: {error}") from None
        train, held_out = examples[options.held_out :], examples[: options.held_out]
    job = {name: value for name, value in options.as_dict().items() if name != "examples"}
    base = options.model or default_model_folder()
    return {**job, "base": base, "train": train, "held_out": held_out}


def _print_table(console: Console, results: dict[str, dict[str, Any]], held_out: int) -> None:
    table = Table(title=f"held out: {held_out} items")
    for column in ("", "exact match", "loss", "trainable parameters", "seconds a step"):
        table.add_column(column, justify="left" if column == "" else "right")
    for arm, result in results.items():
        trained = bool(result["losses"])
        table.add_row(
            arm,
            f"{100 * result['exact_match']:.1f}%",
            f"{result['loss']:.4f}",
            f"{result['trainable']:,}" if trained else "-",
            f"{result['seconds']:.2f}" if trained else "-",
        )
    console.print(table)


def run_demo(options: DemoOptions) -> None:
    """Train both adapters, print the table, save plot and adapters, reload one and ask it.

    Args:
        options: What was asked for.

    Raises:
        RuntimeError: A process failed.
        DemoError: The task is unknown.
    """
    console = Console()
    started = time.perf_counter()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    console.print(
        f"peft_talan {__version__}, peft {peft.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, one thread a process"
    )
    job = _make_job(options)
    job_file = output / "job.json"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    console.print(
        f"base model {job['base']}, {len(job['train'])} examples to train on, {len(job['held_out'])} held out, "
        f"{options.steps} steps of {options.batch_size}, seed {options.seed}"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    results: dict[str, dict[str, Any]] = {}
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        totals = {"base": None, **dict.fromkeys(ARMS, options.steps)}
        tasks = {arm: progress.add_task(arm, total=total, note="") for arm, total in totals.items()}
        base = _Worker(job_file, "base", progress, tasks["base"])
        base.wait()
        progress.update(tasks["base"], total=1, completed=1, note="evaluated")
        workers = {arm: _Worker(job_file, arm, progress, tasks[arm]) for arm in ARMS}
        for worker in workers.values():
            worker.wait()
        results = {"base": base.result, **{arm: worker.result for arm, worker in workers.items()}}
    _print_table(console, results, len(job["held_out"]))
    (output / "results.json").write_text(json.dumps({"job": {**job, "train": None}, "results": results}, indent=1))
    plot_losses({arm: results[arm]["losses"] for arm in ARMS}, output / "losses.png")
    with Progress(*columns, console=console, transient=True) as progress:
        asked = _Worker(job_file, "ask", progress, progress.add_task("a fresh process", total=None, note="loads"))
        asked.wait()
    console.print(f"{ARMS[1]}, reloaded in a fresh process: {options.ask!r} -> {asked.answer!r}", highlight=False)
    console.print(f"adapters, losses.png and results.json in {output}; {time.perf_counter() - started:.0f} s in all")
