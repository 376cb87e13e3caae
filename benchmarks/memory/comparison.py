"""Facts in words, a small RULER and bAbI inside a text, by what reads them and with how many bytes.

    python -m benchmarks.memory.comparison                                # the arms that need no training
    python -m benchmarks.memory.comparison --rows-to data.jsonl --tasks "4 facts" --lengths 64 170 --rows 800
    peft-talan train --model MODEL --data data.jsonl --window 32 --output adapter
    python -m benchmarks.memory.comparison --adapter adapter --trained-on "4 facts" --training "200 steps of 4 rows"
    python -m benchmarks.memory.comparison_report --page docs/evidence.md

An answer is right if greedy decoding gives all of its tokens; the end-of-sequence token after it, which a base model
doesn't know of, isn't asked for. All arms read the same rows, of parts of the real texts that no adapter is trained
on. Every cell is a line of the results, and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from peft_talan.demo.base_model import default_model_folder
from peft_talan.sft.models import load_tokenizer
from peft_talan.sft.prompts import encode
from peft_talan.sft.scores import default_text, score_rows, text_loss

from ..measure import code_version, machine
from ..runs import Row, RunSettings, finished, run_missing
from .context_arms import FULL, UNTRAINED, WINDOW, Arm, arm_of, digest_of, load_trained, load_untrained
from .recall_tasks import LENGTHS, TaskRows

RESULTS = Path(__file__).parents[1] / "results" / "memory_comparison.jsonl"
PLAIN_TEXT = "plain text"
TEXT_WINDOWS = (32, 64, 128, 256)
HELD_OUT_SEED = 1
BATCH_TOKENS = 2048
"""Of the rows that are scored at once."""


@dataclass(frozen=True)
class Settings(RunSettings):
    """All that a cell depends on.

    Args:
        model: The base model's name.
        arm: A name of `context_arms`.
        task: A name of `LENGTHS`, or plain text.
        tokens: The rows' length; of plain text: 0, it is read as it is.
        window: Keys that a token sees, where the arm has a window.
        rows: Held-out rows.
        dtype: Of the weights and the cache.
        adapter: A digest of the adapter's weights; None: there is none.
        trained_on: The tasks whose rows the adapter was trained on; all others are held out.
        training: How, in words.
        seed: Of the adapter's training.
    """

    model: str
    arm: str
    task: str
    tokens: int
    window: int
    rows: int
    dtype: str
    adapter: str | None = None
    trained_on: tuple[str, ...] = ()
    training: str = ""
    seed: int = 0


@lru_cache(maxsize=1)
def load(model: str, arm: str, adapter: str | None, window: int, dtype: str) -> Arm:
    """The arm of the cell before, or another one."""
    if adapter is not None:
        return load_trained(model, adapter, window, dtype)
    return load_untrained(model, arm, window, dtype)


def run(settings: Settings, model: str, adapter: str | None) -> Row:
    """Score one cell on one thread."""
    torch.set_num_threads(1)
    arm = load(model, settings.arm, adapter, settings.window, settings.dtype)
    # Without an end token, rows end with their answer.
    arm.tokenizer.eos_token = None
    started, found = time.monotonic(), {}
    if settings.task == PLAIN_TEXT:
        tokens = len(arm.tokenizer(default_text())["input_ids"])
        found = {
            "text_loss": text_loss(arm.model, arm.tokenizer, default_text(), window=tokens),
            "text_tokens": tokens,
        }
    else:
        tokens = settings.tokens
        made = TaskRows(arm.tokenizer, held_out=True).rows(settings.task, settings.rows, tokens, tokens, HELD_OUT_SEED)
        rows = [encode(arm.tokenizer, row) for row in made]
        size = max(1, BATCH_TOKENS // tokens)
        scores = score_rows(arm.model, arm.tokenizer, rows, batch_size=size, max_length=2 * tokens)
        found = {"right": sum(scores.exact), "exact": list(map(int, scores.exact)), "loss": round(scores.loss, 4)}
    return {
        "key": settings.key(),
        "settings": asdict(settings),
        **found,
        "keys_seen": None if arm.window is None else arm.window + arm.sinks,
        "bytes_a_row": arm.state_bytes(tokens),
        "seconds": round(time.monotonic() - started, 1),
        "code": code_version(),
        "machine": machine(),
    }


def describe(row: Row) -> str:
    """A cell with its right answers, or its loss."""
    settings = row["settings"]
    found = f"{row['right']} of {settings['rows']}" if "right" in row else f"{row['text_loss']:.3f}"
    return f"{settings['arm']}, {settings['task']}, {settings['tokens'] or settings['window']}: {found}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder or a hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--arms", nargs="+", choices=UNTRAINED, default=list(UNTRAINED))
    parser.add_argument("--adapter", default=None, help="a folder; it is scored in place of the arms, on --model")
    parser.add_argument("--trained-on", nargs="+", choices=list(LENGTHS), default=[], help="the adapter's tasks")
    parser.add_argument("--training", default="", help="how the adapter was trained, in words")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter's training")
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--tasks", nargs="+", choices=[*LENGTHS, PLAIN_TEXT], default=[*LENGTHS, PLAIN_TEXT])
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=None, help="only these of the tasks' lengths, tokens"
    )
    parser.add_argument("--rows", type=int, default=32, help="of each cell, or those that are written")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--limit-seconds", type=float, default=math.inf, help="start no cell after this time")
    parser.add_argument(
        "--rows-to", type=Path, default=None, help="writes rows to train on, between the shortest and longest length"
    )
    return parser


def cells(options: argparse.Namespace, model: str) -> Iterator[Settings]:
    """All cells that are asked for, arm by arm."""
    trained = {}
    if options.adapter is not None:
        trained = {
            "adapter": digest_of(options.adapter),
            "trained_on": tuple(options.trained_on),
            "training": options.training,
            "seed": options.seed,
        }
    arms = options.arms if options.adapter is None else [arm_of(options.adapter)]
    for arm in arms:
        for task in options.tasks:
            if task == PLAIN_TEXT:
                windows = TEXT_WINDOWS if arm == WINDOW or trained else (options.window,) if arm == FULL else ()
                places = [(0, window) for window in windows]
            else:
                lengths = [n for n in LENGTHS[task] if options.lengths is None or n in options.lengths]
                places = [(tokens, options.window) for tokens in lengths]
            for tokens, window in places:
                rows = 0 if task == PLAIN_TEXT else options.rows
                yield Settings(Path(model).name, arm, task, tokens, window, rows, options.dtype, **trained)


def write_rows(options: argparse.Namespace, model: str) -> None:
    """Write rows of the tasks, mixed, with the parts of the texts that are trained on."""
    if options.lengths is None or PLAIN_TEXT in options.tasks:
        raise SystemExit("--rows-to: give --tasks, without plain text, and the shortest and longest row as --lengths")
    maker, shortest, longest = (
        TaskRows(load_tokenizer(model), held_out=False),
        min(options.lengths),
        max(options.lengths),
    )
    counts = [len(range(first, options.rows, len(options.tasks))) for first in range(len(options.tasks))]
    rows = [
        row
        for task, count in zip(options.tasks, counts, strict=True)
        for row in maker.rows(task, count, shortest, longest, 1000 + options.seed)
    ]
    random.Random(options.seed).shuffle(rows)
    options.rows_to.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    model = options.model or str(default_model_folder())
    if options.rows_to is not None:
        write_rows(options, model)
        return
    done, wanted = finished(options.results), list(cells(options, model))
    run_missing(
        lambda: [settings for settings in wanted if settings.key() not in done],
        lambda settings: run(settings, model, options.adapter),
        options.results,
        done,
        describe,
        seconds=options.limit_seconds,
    )


if __name__ == "__main__":
    main()
