"""Tries the side path beside plain LoRA on every causal, image-text, sequence-to-sequence and encoder model type.

    python -m benchmarks.architectures                          # what has no result yet
    python -m benchmarks.architectures --types mpt xlnet        # again, these
    python -m benchmarks.architectures --types mpt --checks causal left_padding --show
    python -m benchmarks.architectures --report                 # writes docs/reference/architectures.md

Models are those of the installed transformers at tiny size with random weights, in float64 where they run so. Each
type has a process of its own and a time limit; results are JSON lines, the last one of a type counts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from ..runs import Row, append_line
from .checks import CHECKS
from .compare import SEVEREST, examine
from .report import page, read_results
from .tiny import FAMILIES

RESULTS = Path(__file__).parents[1] / "results" / "architectures.jsonl"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"
EVERY_CHECK = ["fresh", "effect", *CHECKS]


def _work(pipe: Any, family: str, model_type: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    pipe.send(examine(family, model_type, names))


def in_processes(work: list[tuple[str, str]], names: list[str], limit: float, jobs: int) -> Iterator[Row]:
    """Run `examine` on families and types, each in a process of its own, which inherits what is imported here.

    `limit`: seconds of a type.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(work))
    running: dict[Any, tuple[Row, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            family, model_type = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(sender, family, model_type, names), daemon=True)
            process.start()
            sender.close()
            running[receiver] = ({"family": family, "type": model_type}, process, time.monotonic() + limit)
        ready = set(connection.wait(running, timeout=1))
        for receiver, (about, process, deadline) in list(running.items()):
            if receiver not in ready and time.monotonic() < deadline:
                continue
            found: Row = {"base": "not built", "message": f"no result within {limit:.0f} seconds"}
            try:
                if receiver in ready:
                    found = receiver.recv()
            except EOFError:
                found["message"] = "the process ended without a result"
            process.kill()
            process.join()
            del running[receiver]
            yield {**about, **found}


def show(row: Row) -> None:
    """Print one line per type, and one for each check that is not right."""
    cells = [(name, where, cell) for name, found in row.get("checks", {}).items() for where, cell in found.items()]
    outcomes = [cell["outcome"] for _, _, cell in cells]
    worst = min(outcomes, key=SEVEREST.index) if outcomes else f"{row['base']}: {row['message']}"
    print(f"{row['family']} {row['type']}: {worst}")
    for name, where, cell in cells:
        if cell["outcome"] != "right":
            detail = cell.get("message") or f"{cell['difference']:.1e}"
            print(f"    {name} [{where}]: {cell['outcome']}: {detail}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="model types; default: all that have no result yet")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--checks", nargs="+", choices=EVERY_CHECK, default=EVERY_CHECK)
    parser.add_argument("--seconds", type=float, default=300, help="time limit of a type")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print only: nothing is stored")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="write the page of the documentation from the results")
    options = parser.parse_args(arguments)
    if options.report:
        types = sum(len(types) for _, types in FAMILIES.values())
        PAGE.write_text(page(read_results(options.results), types), encoding="utf-8")
        return
    versions = {"transformers": transformers.__version__, "peft": peft.__version__, "torch": torch.__version__}
    done = {(row["family"], row["type"]) for row in read_results(options.results)}
    work = [
        (family, model_type)
        for family in options.families
        for model_type in FAMILIES[family][1]
        if (model_type in options.types if options.types else (family, model_type) not in done)
    ]
    for found in in_processes(work, options.checks, options.seconds, options.jobs):
        show(found)
        if not options.show:
            append_line(options.results, {**found, **versions})


if __name__ == "__main__":
    main()
