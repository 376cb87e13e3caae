"""A fact asked for beyond the window, learned from ordinary rows as `peft-talan train --window` trains on them.

    python -m benchmarks.memory.ordinary_rows --arms TALAN --seeds 0 1 2 --changes '{"by_command": true}'
    python -m benchmarks.memory.ordinary_rows --arms LoRA --seeds 0 1 2 --changes '{"shrinking": {}}'
    python -m benchmarks.memory.ordinary_rows --page docs/how-to/recall.md docs/evidence.md

A row is a fact, a piece of a text, and one question about the fact; the loss is that of the answer alone. The facts
are of one kind, or of three kinds mixed, and there are two texts: Python's manual, which every Python carries, and a
licence. No row comes twice. Scored are rows of the parts of both texts that aren't trained on, by length in windows;
an answer is right if greedy decoding gives all of its tokens and its end. Every run is a line of the results, and is
not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TrainerCallback

from peft_talan import TalanConfig, initialize_talan_weights
from peft_talan.axes import RECALL_AXES
from peft_talan.demo.base_model import default_model_folder
from peft_talan.sft.data import Rows
from peft_talan.sft.models import load_adapter, load_tokenizer
from peft_talan.sft.prompts import PromptForm, encode, encode_rows
from peft_talan.sft.recall import ShrinkingWindow
from peft_talan.sft.scores import default_text, score_rows, text_loss
from peft_talan.sft.training import START_BATCHES, make_trainer, start_from_data
from peft_talan.sft.window import with_sliding_window

from ..measure import code_version, machine
from ..runs import Row, RunSettings, finished, read_lines, run_missing
from .ordinary_rows_report import fill
from .recall_tasks import TaskRows
from .row_maker import FACTS, RowMaker

RESULTS = Path(__file__).parents[1] / "results" / "memory_ordinary_rows.jsonl"
ARMS = ("TALAN", "LoRA")

Trained = tuple[Any, list[dict[str, Any]]]
"""The model in evaluation mode, and the log of its training."""


@dataclass(frozen=True)
class Settings(RunSettings):
    """All that a run depends on.

    Args:
        arm: One of `ARMS`.
        seed: Of the adapter, the rows, their order and the windows.
        facts: A name of `row_maker.FACTS`, or a task of `recall_tasks.MAKERS`.
        form: `prompt-completion` or `messages`.
        window: Keys that a token sees.
        steps: Optimizer steps.
        batch_size: Rows a step.
        shortest: The shortest row in tokens.
        longest: The longest row in tokens.
        shrinking: The options of `ShrinkingWindow`; None: the window doesn't shrink.
        learning_rate: The highest.
        side_path_lr_scale: The side path's learning rate divided by it.
        prompt_loss_weight: Of the prompts' tokens in the loss. Earlier runs don't have the field, and 0.
        start: Of the side paths: that of the command, a `memory` where it can be; from `data`; or `random`. Runs that
            were stored before there was a memory don't have the field, and had side paths in all blocks.
        scheduler: Of the learning rate.
        decay_steps: Of the scheduler, where it takes them.
        rank: Of the low-rank adapter; its alpha is twice the rank.
        axes: Of the side path. Earlier runs have those alone that differ from the command's of then, or None.
        scored: The lengths that are scored, in windows.
        rows: Held-out rows of each length.
        bf16: Whether products are rounded to bfloat16 in training.
        by_command: Whether `peft-talan train` trains, in a process of its own.
    """

    arm: str
    seed: int
    facts: str = "mixed"
    form: str = "prompt-completion"
    window: int = 32
    steps: int = 200
    batch_size: int = 4
    shortest: int = 40
    longest: int = 170
    shrinking: dict[str, Any] | None = None
    learning_rate: float = 3e-4
    side_path_lr_scale: float = 1.0
    prompt_loss_weight: float = 0.2
    start: str = "memory"
    scheduler: str = "linear"
    decay_steps: int | None = None
    rank: int = 16
    axes: dict[str, Any] = field(default_factory=lambda: dict(RECALL_AXES))
    scored: tuple[int, ...] = (1, 2, 4, 10)
    rows: int = 48
    bf16: bool = False
    by_command: bool = False


class Printed(TrainerCallback):
    """Prints the loss now and then."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and state.global_step % 10 == 0:
            recent = [entry["loss"] for entry in state.log_history[-10:] if "loss" in entry]
            print(state.global_step, round(sum(recent) / len(recent), 3), logs.get("window"), flush=True)


def train_by_command(settings: Settings, folder: str, made: list[dict[str, Any]], output: Path) -> Trained:
    """Train as a user does; the options are those of the command, and its own choices are left to it."""
    others = settings.shrinking is not None or settings.decay_steps is not None or settings.start != "memory"
    if settings.arm != "TALAN" or others:
        raise ValueError("by_command: the command trains TALAN, with its own start, window that shrinks and schedule")
    data = output / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    words = ["--model", folder, "--data", str(data), "--output", str(output / "adapter"), "--window", settings.window]
    words += ["--steps", settings.steps, "--batch-size", settings.batch_size, "--seed", settings.seed]
    words += ["--learning-rate", settings.learning_rate, "--rank", settings.rank, "--logging-steps", 1]
    words += ["--prompt-loss-weight", settings.prompt_loss_weight]
    words += ["--lr-scheduler-type", settings.scheduler, "--save-steps", settings.steps]
    words += ["--bf16" if settings.bf16 else "--no-bf16"]
    for name, value in settings.axes.items():
        if RECALL_AXES.get(name) != value:
            words += ["--" + name.replace("_", "-"), value]
    subprocess.run([sys.executable, "-m", "peft_talan", "train", *map(str, words)], check=True, stdout=sys.stderr)
    model, _ = load_adapter(str(output / "adapter"), dtype="float32")
    state = output / "adapter" / f"checkpoint-{settings.steps}" / "trainer_state.json"
    return model, json.loads(state.read_text(encoding="utf-8"))["log_history"]


def train_here(settings: Settings, folder: str, made: list[dict[str, Any]], output: Path) -> Trained:
    """Train with the parts that the command is made of, and with other settings of theirs."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = {"r": settings.rank, "lora_alpha": 2 * settings.rank, "target_modules": "all-linear"}
    config = LoraConfig(task_type="CAUSAL_LM", **adapter)
    if settings.arm == "TALAN":
        config = TalanConfig(task_type="CAUSAL_LM", **adapter, **settings.axes)
    callbacks: list[TrainerCallback] = [Printed()]
    if settings.shrinking is not None:
        callbacks.insert(0, ShrinkingWindow(seed=settings.seed, **settings.shrinking))
    tokenizer, rows = load_tokenizer(folder), Rows("ordinary rows", made, [str(i) for i in range(len(made))])
    trainer = make_trainer(
        with_sliding_window(model, settings.window),
        tokenizer,
        encode_rows(tokenizer, rows),
        PromptForm.of(rows, tokenizer),
        config,
        output,
        callbacks=callbacks,
        side_path_lr_scale=settings.side_path_lr_scale,
        prompt_loss_weight=settings.prompt_loss_weight,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        lr_scheduler_kwargs=None if settings.decay_steps is None else {"num_decay_steps": settings.decay_steps},
        warmup_steps=0.03,
        seed=settings.seed,
        bf16=settings.bf16,
        logging_steps=1,
        save_strategy="no",
    )
    if settings.start not in ("memory", "data", "random"):
        raise ValueError(f"start={settings.start!r}: choose 'memory', 'data' or 'random'")
    if settings.arm == "TALAN" and settings.start == "memory":
        start_from_data(trainer)
    elif settings.arm == "TALAN" and settings.start == "data":
        initialize_talan_weights(trainer.model, islice(trainer.get_train_dataloader(), START_BATCHES))
    # The loss and the gradients of padded rows, without the time that padding takes.
    trainer.data_collator.padding_free = True
    trainer.train()
    return trainer.model.eval(), trainer.state.log_history


def row_maker(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, held_out: bool
) -> Callable[[int, int, int, int], list[dict[str, Any]]]:
    """What makes a number of rows, of lengths from one to another, by a seed."""
    if settings.facts in FACTS:
        return RowMaker(tokenizer, settings.form, held_out, settings.facts).rows
    if settings.form != "prompt-completion":
        raise ValueError(f"form={settings.form!r}: rows of {settings.facts!r} are of 'prompt-completion'")
    return partial(TaskRows(tokenizer, held_out).rows, settings.facts)


def run(settings: Settings, folder: str) -> Row:
    """Train and score once, on one thread."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(folder)
    # Before the training, which would be lost where there is no room for so short rows.
    scored, make = row_maker(settings, tokenizer, held_out=True), row_maker(settings, tokenizer, held_out=False)
    held_out = {n: scored(settings.rows, n * settings.window, n * settings.window, 1) for n in settings.scored}
    made = make(settings.steps * settings.batch_size, settings.shortest, settings.longest, settings.seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as output:
        train = train_by_command if settings.by_command else train_here
        model, log = train(settings, folder, made, Path(output))
    seconds = time.monotonic() - started
    history = [entry for entry in log if "loss" in entry]
    losses = [float(entry["loss"]) for entry in history]
    of_completions = [float(entry["completion_loss"]) for entry in history if "completion_loss" in entry]
    right, by_kind, kinds = {}, {}, len(FACTS.get(settings.facts, "1"))
    for windows, rows in held_out.items():
        found = score_rows(model, tokenizer, [encode(tokenizer, row) for row in rows], batch_size=4)
        right[windows] = sum(found.exact)
        by_kind[windows] = [sum(found.exact[i::kinds]) for i in range(kinds)]
    return {
        "key": settings.key(),
        "settings": asdict(settings),
        "right": right,
        "right_by_kind": by_kind,
        "text_loss": text_loss(model, tokenizer, default_text()),
        "last_loss": sum(losses[-40:]) / len(losses[-40:]),
        "losses": [round(loss, 3) for loss in losses],
        # Without the prompts' part, where there is one.
        "completion_losses": [round(loss, 3) for loss in of_completions],
        "windows": [entry.get("window", settings.window) for entry in history],
        # An adapter that was loaded is frozen: counted by name.
        "axes": axes_of(model),
        "trainable": sum(p.numel() for name, p in model.named_parameters() if "lora_" in name),
        "seconds": round(seconds, 1),
        "code": code_version(),
        "machine": machine(),
    }


def describe(row: Row) -> str:
    """A run with its right answers by length."""
    settings = row["settings"]
    return f"{settings['arm']} {settings['seed']}: {row['right']} {row['right_by_kind']} {row['last_loss']:.3f}"


def axes_of(model: Any) -> dict[str, Any]:
    """The axes of an adapter's side paths that a window has defaults for; none of LoRA."""
    config = model.peft_config["default"]
    return {name: getattr(config, name) for name in RECALL_AXES} if isinstance(config, TalanConfig) else {}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder or a hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--form", choices=("prompt-completion", "messages"), default="prompt-completion")
    parser.add_argument("--changes", type=json.loads, default={}, help="other settings, as JSON")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, nargs="+", default=(), help="puts tables of the stored runs into pages")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    if options.page:
        for page in options.page:
            fill(page, read_lines(options.results))
        return
    folder, done = options.model or default_model_folder(), finished(options.results)
    wanted = [
        Settings(arm, seed, form=options.form, **options.changes) for seed in options.seeds for arm in options.arms
    ]
    run_missing(
        lambda: [settings for settings in wanted if settings.key() not in done],
        lambda settings: run(settings, folder),
        options.results,
        done,
        describe,
    )


if __name__ == "__main__":
    main()
