"""The stored runs of the studies, one JSON line per run, and the running of those that are missing."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

Row = dict[str, Any]
Rows = dict[Any, Row]
"""Runs by key, or by seed."""
DEVELOPMENT_SEED = 100
"""The seed of the runs that choose learning rate and axes; it is in no comparison."""


@dataclass(frozen=True)
class RunSettings:
    """All that a run depends on: two runs of equal settings are one run."""

    def key(self) -> str:
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


S = TypeVar("S", bound=RunSettings)
T = TypeVar("T")


def read_lines(file: Path) -> list[Row]:
    """The stored results, oldest first; a line that was cut off is none."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def finished(file: Path) -> Rows:
    """The stored runs by key."""
    return {row["key"]: row for row in read_lines(file)}


def matching(rows: Iterable[Row], **settings: Any) -> list[Row]:
    """The runs whose settings have these values."""
    return [row for row in rows if settings.items() <= row["settings"].items()]


def by_seed(rows: Iterable[Row]) -> Rows:
    """The runs on fresh seeds, by seed."""
    found = {row["settings"]["seed"]: row for row in rows}
    return {seed: found[seed] for seed in sorted(found) if seed != DEVELOPMENT_SEED}


def append_line(file: Path, row: Row) -> None:
    """Store one finished run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def write_json(file: Path, found: Row) -> None:
    """Store a measurement that is made as a whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def read_json(file: Path) -> Row:
    """What `write_json` stored; nothing if it has not been measured."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def tuned(tries: Sequence[Sequence[S]], done: Rows, seeds: Iterable[int], **fresh: Any) -> Iterator[S]:
    """The missing runs whose settings are known: the tries of all arms, then each seed with every arm's best try."""
    waiting = [settings for of_arm in tries for settings in of_arm if settings.key() not in done]
    yield from waiting
    if waiting:
        return
    best = [min(of_arm, key=lambda settings: done[settings.key()]["last_loss"]) for of_arm in tries]
    wanted = [replace(settings, seed=seed, **fresh) for seed in seeds for settings in best]
    yield from (settings for settings in wanted if settings.key() not in done)


def in_processes(wanted: Sequence[T], run: Callable[[T], Row], jobs: int, stop: float) -> Iterator[Row]:
    """Run in several processes; none begins after the time `stop`."""
    queue = list(reversed(wanted))
    running: set[Future[Row]] = set()
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        while running or (queue and time.monotonic() < stop):
            while queue and len(running) < jobs and time.monotonic() < stop:
                running.add(pool.submit(run, queue.pop()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def run_missing(
    missing: Callable[[], Iterable[T]],
    run: Callable[[T], Row],
    results: Path,
    done: Rows,
    describe: Callable[[Row], str],
    *,
    total: int | None = None,
    initial: int = 0,
    jobs: int = 1,
    seconds: float = math.inf,
    most: float = math.inf,
) -> None:
    """Run what is missing and store it in `results` and in `done`, on which the next call of `missing` may depend."""
    stop, count = time.monotonic() + seconds, 0
    with tqdm(total=total, initial=initial, desc="runs", mininterval=1) as bar:
        while count < most and time.monotonic() < stop and (wanted := list(missing())):
            # A single process makes one run at a time, so that the next can depend on it.
            for row in in_processes(wanted, run, jobs, stop) if jobs > 1 else [run(wanted[0])]:
                append_line(results, row)
                # As it will be read back: JSON has no tuples, and its keys are strings.
                done[row["key"]] = json.loads(json.dumps(row))
                bar.set_postfix_str(describe(row))
                bar.update()
                count += 1
