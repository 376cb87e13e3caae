"""The memory study: recall beyond the attention window, task x adapter x seed, every arm tuned by equally many tries.

    python -m benchmarks.memory.study                  # runs what is not in the results yet
    python -m benchmarks.memory.report --page docs/evidence.md

Each arm is first trained with every learning rate on a development seed; the one with the lowest training loss is
taken for the fresh seeds. One JSON line per finished run, so a study that was stopped continues where it was.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from peft_talan.demo.recall import SCORED_WINDOWS, TASKS

from ..runs import DEVELOPMENT_SEED, Row, finished, run_missing, tuned
from .one_run import ARMS, BASE_STEPS, STEPS, Settings, run

RESULTS = Path(__file__).parents[1] / "results" / "memory.jsonl"
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
DEVELOPMENT_SCORED = (4, 10)


def describe(row: Row) -> str:
    """A run with its recall by distance."""
    shown = " ".join(f"{windows}:{100 * share:.0f}%" for windows, share in row["recall"].items())
    settings = row["settings"]
    return f"{settings['arm']} {settings['seed']} {settings['learning_rate']:g}: {shown}"


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
    done = finished(options.results)
    tries = {}
    for task in options.tasks:
        if (options.base, task) not in BASE_STEPS:
            raise SystemExit(f"--base {options.base} --tasks {task}: choose one of {sorted(BASE_STEPS)}")
        first = Settings(
            task,
            options.arms[0],
            DEVELOPMENT_SEED,
            LEARNING_RATES[0],
            base=options.base,
            steps=options.steps or STEPS[task],
            batch_size=options.batch_size,
            scored=DEVELOPMENT_SCORED,
            rows=options.rows,
        )
        tries[task] = [[replace(first, arm=arm, learning_rate=r) for r in LEARNING_RATES] for arm in options.arms]

    def missing() -> Iterator[Settings]:
        for of_task in tries.values():
            yield from tuned(of_task, done, options.seeds, scored=tuple(options.scored))

    total = len(options.tasks) * len(options.arms) * (len(LEARNING_RATES) + len(options.seeds))
    run_missing(missing, run, options.results, done, describe, total=total, seconds=options.limit_seconds)


if __name__ == "__main__":
    main()
