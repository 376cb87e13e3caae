"""Runs the demo: recall beyond the window, then two adapters of a real model side by side, and what to type next."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console

from ..sft.comparison import LORA, TALAN, Job
from ..sft.display import make_console
from ..sft.models import load_model, load_tokenizer
from ..sft.prompts import encode
from ..sft.reporting import compare_with_bars, comparison_table, difference_lines, draw_comparison
from ..sft.scores import default_text, score_rows
from ..version import __version__
from . import DemoOptions
from .base_model import default_model_folder
from .recall_run import draw_recall, recall_difference, recall_table, run_recall
from .tasks import make_rows

LONGEST_ANSWER = 32
ARMS = (LORA, TALAN)
SYSTEM = "Give the answer alone."
"""For the default model, whose template would add a longer one, a fifth of all tokens; others may take none."""
STARTING = 30.0
"""Seconds to import, load and save."""
SLOWEST = 2.0
"""How many times longer two trainings side by side can take than one alone."""


def estimate_minutes(job: Job, options: DemoOptions) -> tuple[int, int]:
    """Estimate the least and the most minutes of the demo, from the time that the base model takes to score rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(job.threads or threads)
    model, tokenizer, sample = (
        load_model(job.model, job.dtype, job.device),
        load_tokenizer(job.model),
        job.rows.rows[:4],
    )
    encoded = [encode(tokenizer, row) for row in sample]
    score_rows(model, tokenizer, encoded[:1])  # The first forward pass is slower.
    started = time.perf_counter()
    score_rows(model, tokenizer, encoded)
    seconds = (time.perf_counter() - started) / len(sample)
    torch.set_num_threads(threads)
    # In such times, measured on SmolLM2-135M with one thread: a row in training; a held-out row, scored with the base
    # model and an adapter one after the other; the recall, by steps and for its own scores.
    times = 3.6 * options.steps * options.batch_size + 2.2 * options.held_out
    times += options.recall_steps + 40 if options.recall_steps else 0
    total = STARTING + times * seconds
    return max(1, math.floor(total / 60)), math.ceil(SLOWEST * total / 60)


def _generate(adapter: Path, model: str, question: str) -> str:
    """Answer a question in a fresh process."""
    words = ["generate", str(adapter), question, "--model", model, "--max-new-tokens", str(LONGEST_ANSWER)]
    answered = subprocess.run(
        [sys.executable, "-m", "peft_talan", *words], capture_output=True, text=True, check=False
    )
    if answered.returncode:
        raise RuntimeError(f"peft-talan {' '.join(words)} failed: {answered.stderr.strip()}")
    return answered.stdout.strip()


def run_demo(options: DemoOptions, axes: dict[str, Any]) -> None:
    """Show the recall beyond the window, train two adapters, save pictures and adapters, reload one and prompt it."""
    console = make_console()
    started = time.perf_counter()
    console.print(
        f"peft_talan {__version__}, peft {peft.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores"
    )
    seed, output = options.seed, options.output
    count = options.steps * options.batch_size + options.held_out
    rows = make_rows(options.task, count, seed, SYSTEM if options.model is None else None)
    train, held_out = rows.split(options.held_out, None)
    on_cpu = not torch.accelerator.is_available()
    job = Job(
        model=options.model or default_model_folder(),
        rows=train,
        held_out=held_out,
        text=default_text(),
        output=str(output),
        rank=options.rank,
        axes=axes,
        arguments={
            "max_steps": options.steps,
            "per_device_train_batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "warmup_steps": max(1, options.steps // 10),
            "gradient_checkpointing": False,
        },
        dtype="float32",
        device="cpu" if on_cpu else None,
        threads=1 if on_cpu else None,
    )
    console.print(
        f"base model {job.model}, task {options.task}: {len(train)} examples to train on, {len(held_out)} held out, "
        f"{options.steps} steps of {options.batch_size}, seed {seed}"
    )
    job.check()
    if on_cpu:
        least, most = estimate_minutes(job, options)
        console.print(f"takes about {least} to {most} min at the present speed of this machine")
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"model": job.model, "task": options.task}
    if options.recall_steps:
        results["recall"] = _show_recall(options, console)
    outcomes = compare_with_bars(job, ARMS, [seed], processes=2, steps=options.steps, console=console)
    console.print(comparison_table(outcomes), *difference_lines(outcomes), sep="\n")
    results["outcomes"] = [outcome.as_dict() for outcome in outcomes]
    (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    draw_comparison(outcomes, output / "losses.png")
    adapter = Path(str(outcomes[-1].folder))
    exact = outcomes[-1].scores.exact
    first_right = job.held_out.rows[exact.index(True) if any(exact) else 0]
    question = options.ask or str(first_right["prompt"][-1]["content"])
    answer = _generate(adapter, job.model, question)
    console.print(f"{TALAN}, reloaded in a fresh process: {question!r} -> {answer!r}")
    pictures = "recall.png, losses.png" if options.recall_steps else "losses.png"
    console.print(f"{output}: adapters, {pictures}, results.json; {time.perf_counter() - started:.0f} s in all\n")
    console.print("Next:", *_next_commands(adapter, job.model, question), sep="\n  ", soft_wrap=True)


def _show_recall(options: DemoOptions, console: Console) -> list[dict[str, Any]]:
    console.print(
        "1. beyond the window: a small Mistral with a sliding window of 16 tokens is trained here; a key stands at "
        "the start of a text and is asked for at its end"
    )
    outcomes = run_recall(options.recall_steps, options.seed, console)
    console.print(recall_table(outcomes), recall_difference(outcomes), sep="\n")
    draw_recall({outcome.arm: outcome.shares for outcome in outcomes}, options.output / "recall.png")
    console.print("2. a real model: both adapters learn sums, and one is reloaded and asked")
    return [outcome.as_dict() for outcome in outcomes]


def _next_commands(adapter: Path, model: str, question: str) -> list[str]:
    # Of this environment, which need not be activated: `make demo` has its own.
    beside = Path(sys.executable).with_name("peft-talan")
    program = "peft-talan" if shutil.which("peft-talan") or not beside.exists() else os.path.relpath(beside)
    return [
        f"{program} inspect {adapter}",
        f"{program} generate {adapter} {shlex.quote(question)}",
        f"{program} compare --model {model} --data YOUR.jsonl --output outputs/compare",
    ]
