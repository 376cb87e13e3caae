"""The memory study: recall beyond the attention window, task x adapter x seed, every arm tuned by equally many tries.

    python -m benchmarks.memory.study                  # runs what is not in the results yet
    python -m benchmarks.memory.report --page docs/evidence.md

Each arm is first trained with every learning rate on a development seed; the one with the lowest training loss is
taken for the fresh seeds. One JSON line a finished run, so a study that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from peft_talan.demo.recall import SCORED_WINDOWS, TASKS, Task

from ..measure import append_line
from ..quality.study import finished
from .one_run import ARMS, BASE_STEPS, STEPS, Settings, run

RESULTS = Path(__file__).parents[1] / "results" / "memory.jsonl"
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
DEVELOPMENT_SEED = 100
DEVELOPMENT_SCORED = (4, 10)

Rows = dict[str, dict[str, Any]]


def tries(task: Task, arm: str, options: argparse.Namespace) -> list[Settings]:
    """The runs of one arm on the development seed."""
    return [
        Settings(
            task,
            arm,
            DEVELOPMENT_SEED,
            learning_rate,
            base=options.base,
            steps=options.steps or STEPS[task],
            batch_size=options.batch_size,
            scored=DEVELOPMENT_SCORED,
            rows=options.rows,
        )
        for learning_rate in LEARNING_RATES
    ]


def best_learning_rate(task: Task, arm: str, done: Rows, options: argparse.Namespace) -> float:
    """The learning rate with the lowest loss of the last fifth of the steps, of an arm whose tries are done."""
    found = [done[settings.key()] for settings in tries(task, arm, options)]
    return float(min(found, key=lambda row: row["last_loss"])["settings"]["learning_rate"])


def missing(done: Rows, options: argparse.Namespace) -> Iterator[Settings]:
    """The runs that are not in the results, in order; `done` grows while they are made."""
    for task in options.tasks:
        for arm in options.arms:
            yield from (settings for settings in tries(task, arm, options) if settings.key() not in done)
        for seed in options.seeds:
            for arm in options.arms:
                settings = Settings(
                    task,
                    arm,
                    seed,
                    best_learning_rate(task, arm, done, options),
                    base=options.base,
                    steps=options.steps or STEPS[task],
                    batch_size=options.batch_size,
                    scored=tuple(options.scored),
                    rows=options.rows,
                )
                if settings.key() not in done:
                    yield settings


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["key"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--base", choices=["window", "full"], default="window", help="the base model's pretraining")
    parser.add_argument("--steps", type=int, default=None, help=f"of an adapter; by task: {STEPS}")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--scored", nargs="+", type=int, default=list(SCORED_WINDOWS), help="distances in windows")
    parser.add_argument("--rows", type=int, default=64, help="texts of each distance")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--limit-seconds", type=float, default=math.inf, help="start no run after this time")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    for task in options.tasks:
        if (options.base, task) not in BASE_STEPS:
            raise SystemExit(f"--base {options.base} --tasks {task}: choose one of {sorted(BASE_STEPS)}")
    done = finished(options.results)
    stop = time.monotonic() + options.limit_seconds
    total = len(options.tasks) * len(options.arms) * (len(LEARNING_RATES) + len(options.seeds))
    with tqdm(total=total, desc="runs", mininterval=1) as bar:
        for settings in missing(done, options):
            if time.monotonic() > stop:
                break
            row = run(settings)
            append_line(options.results, row)
            # As it will be read back: JSON's keys are strings.
            done[row["key"]] = json.loads(json.dumps(row))
            shown = " ".join(f"{windows}:{100 * share:.0f}%" for windows, share in row["recall"].items())
            name = f"{settings.task} {settings.arm} {settings.seed} {settings.learning_rate:g}"
            bar.set_postfix_str(f"{name}: {shown}")
            bar.update()


if __name__ == "__main__":
    main()
