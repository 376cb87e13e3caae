"""Runs the demo: recall beyond the window, then two adapters of a real model side by side, and what to type next."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from transformers import AutoConfig

from ..sft.comparison import LORA, TALAN, Job, Outcome, check_axes
from ..sft.data import Rows
from ..sft.models import load_tokenizer
from ..sft.prompts import encode
from ..sft.reporting import compare_with_bars, difference_lines, draw_comparison, make_console, make_table
from ..sft.scores import default_text
from ..version import __version__
from .base_model import default_model_folder
from .recall_run import draw_recall, recall_difference, recall_table, run_recall
from .tasks import make_rows

LONGEST_ANSWER = 32
ARMS = (LORA, TALAN)
SYSTEM = "Give the answer alone."
"""For the default model, whose template would add a longer one, a fifth of all tokens; others may take none."""
STARTING = 30.0
"""Seconds to import, load and save."""
TRAINING, SCORING = 5.2, 3.0
"""Operations of a matrix product, a weight and token, that take as long as a training step, and as all scores of the
base model and an adapter one after the other: measured on SmolLM2-135M."""
RECALL_STEP, RECALL_SCORES = 9.3e9, 3.3e11
"""Operations of a matrix product that take as long as one step of all models of the recall, and as all its scores."""


@dataclass(frozen=True)
class DemoOptions:
    """One run of the demo.

    Args:
        model: A hub id or a folder; None: SmolLM2-135M-Instruct from its package.
        task: The reasoning-gym task.
        recall_steps: Optimizer steps an adapter of the recall; 0 leaves it out.
        steps: Optimizer steps an adapter of the task.
        batch_size: Examples a step.
        learning_rate: The highest learning rate.
        rank: The rank of the low-rank half.
        held_out: The number of held-out items.
        seed: Of data, initialization and order.
        ask: The question that the reloaded adapter answers; None: a held-out one that it answered right.
        output: The folder for adapters, table and picture.
        axes: The side path's axes, fields of `TalanConfig`.
    """

    model: str | None
    task: str
    recall_steps: int
    steps: int
    batch_size: int
    learning_rate: float
    rank: int
    held_out: int
    seed: int
    ask: str | None
    output: str
    axes: dict[str, Any]


def _parameters(model: str) -> int:
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        return int(transformers.AutoModelForCausalLM.from_config(config).num_parameters())


def _multiply(seconds: float) -> float:
    torch.set_num_threads(1)  # of this thread
    side = torch.rand(512, 512)
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        side @ side
        products += 1
    return products * 2 * 512**3 / (time.perf_counter() - started)


def matrix_speed() -> float:
    """Measure the speed of a matrix product as it is now, where two run side by side on a thread each.

    Returns:
        Operations a second of each.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(2) as pool:
        speeds = list(pool.map(_multiply, [1.0, 1.0]))
    torch.set_num_threads(threads)
    return sum(speeds) / 2


def estimate_seconds(model: str, rows: Rows, options: DemoOptions) -> float:
    """Estimate how long the demo takes on this machine, from the speed of a matrix product.

    Args:
        model: The base model's folder or hub id.
        rows: What is trained on.
        options: What was asked for.

    Returns:
        Seconds.
    """
    tokenizer = load_tokenizer(model)
    lengths = [len(prompt) + len(completion) for prompt, completion in (encode(tokenizer, r) for r in rows.rows[:50])]
    tokens = max(lengths) * (TRAINING * options.batch_size * options.steps + SCORING * options.held_out)
    operations = _parameters(model) * tokens
    if options.recall_steps:
        operations += RECALL_SCORES + RECALL_STEP * options.recall_steps
    return STARTING + operations / matrix_speed()


def _right_question(held_out: Rows, outcome: Outcome) -> str:
    exact = outcome.scores.exact
    return str(held_out.rows[exact.index(True) if any(exact) else 0]["prompt"][-1]["content"])


def _ask(adapter: Path, model: str, question: str) -> str:
    words = ["generate", str(adapter), question, "--model", model, "--max-new-tokens", str(LONGEST_ANSWER)]
    answered = subprocess.run(
        [sys.executable, "-m", "peft_talan", *words], capture_output=True, text=True, check=False
    )
    if answered.returncode:
        raise RuntimeError(f"peft-talan {' '.join(words)} failed: {answered.stderr.strip()}")
    return answered.stdout.strip()


def run_demo(options: DemoOptions) -> None:
    """Show the recall beyond the window, train two adapters, save pictures and adapters, reload one and ask it.

    Args:
        options: What was asked for.

    Raises:
        DataError: The task is unknown.
        RuntimeError: The reloaded adapter could not be asked.
    """
    console = make_console()
    started = time.perf_counter()
    output = Path(options.output)
    console.print(
        f"peft_talan {__version__}, peft {peft.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores"
    )
    count = options.steps * options.batch_size + options.held_out
    rows = make_rows(options.task, count, options.seed, SYSTEM if options.model is None else None)
    held_out, train = (
        rows.select(range(options.held_out)),
        rows.select(range(options.held_out, len(rows))),
    )
    model = options.model or default_model_folder()
    console.print(
        f"base model {model}, task {options.task}: {len(train)} examples to train on, {len(held_out)} held out, "
        f"{options.steps} steps of {options.batch_size}, seed {options.seed}"
    )
    if not torch.accelerator.is_available():
        minutes = max(1, round(estimate_seconds(model, train, options) / 60))
        console.print(f"takes about {minutes} min at the present speed of two cores")
    job = Job(
        model=model,
        rows=train,
        held_out=held_out,
        text=default_text(),
        output=str(output),
        rank=options.rank,
        axes=options.axes,
        arguments={
            "max_steps": options.steps,
            "per_device_train_batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "warmup_steps": max(1, options.steps // 10),
            "gradient_checkpointing": False,
        },
        dtype="float32",
        device="cpu" if not torch.accelerator.is_available() else None,
        threads=1 if not torch.accelerator.is_available() else None,
    )
    check_axes(job)
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"model": model, "task": options.task}
    if options.recall_steps:
        results["recall"] = _show_recall(options, output, console)
    outcomes = compare_with_bars(job, ARMS, [options.seed], processes=2, steps=options.steps, console=console)
    console.print(make_table(outcomes))
    for line in difference_lines(outcomes):
        console.print(line)
    results["outcomes"] = [outcome.as_dict() for outcome in outcomes]
    (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    draw_comparison(outcomes, output / "losses.png")
    adapter = Path(str(outcomes[-1].folder))
    question = options.ask or _right_question(held_out, outcomes[-1])
    answer = _ask(adapter, model, question)
    console.print(f"{TALAN}, reloaded in a fresh process: {question!r} -> {answer!r}")
    pictures = "recall.png, losses.png" if options.recall_steps else "losses.png"
    console.print(f"{output}: adapters, {pictures}, results.json; {time.perf_counter() - started:.0f} s in all\n")
    console.print("Next:", *_next_commands(adapter, model, question), sep="\n  ", soft_wrap=True)


def _show_recall(options: DemoOptions, output: Path, console: Console) -> list[dict[str, Any]]:
    console.print(
        "1. beyond the window: a small Mistral with a sliding window of 16 tokens is trained here; a key stands at "
        "the start of a text and is asked for at its end"
    )
    recalled = run_recall(options.recall_steps, options.seed, console)
    console.print(recall_table(recalled))
    console.print(recall_difference(recalled))
    draw_recall({outcome.arm: outcome.shares for outcome in recalled}, output / "recall.png")
    console.print("2. a real model: both adapters learn sums, and one is reloaded and asked")
    return [outcome.as_dict() for outcome in recalled]


def _next_commands(adapter: Path, model: str, question: str) -> list[str]:
    # Of this environment, which need not be activated: `make demo` has its own.
    beside = Path(sys.executable).with_name("peft-talan")
    program = "peft-talan" if shutil.which("peft-talan") or not beside.exists() else os.path.relpath(beside)
    return [
        f"{program} inspect {adapter}",
        f"{program} generate {adapter} {shlex.quote(question)}",
        f"{program} compare --model {model} --data YOUR.jsonl --output outputs/compare",
    ]
