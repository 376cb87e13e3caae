"""What the benchmarks measure with: times in turns, allocated bytes, dispatched operations, the machine."""

from __future__ import annotations

import argparse
import gc
import hashlib
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import peft_talan

RESAMPLES = 2000
"""Resamples of the turns behind each confidence interval."""


class DispatchCounter(TorchDispatchMode):
    """Counts the operations that reach the dispatcher below autograd, and which of them only make a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.views = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count one operation and run it."""
        self.count += 1
        self.views += bool(getattr(func, "is_view", False))
        return func(*args, **(kwargs or {}))


CLOCKS: dict[str, Callable[[], float]] = {"process time": time.process_time, "wall time": time.perf_counter}
"""What times are read from: the first leaves out other programs, and a GPU's work."""


def clock_name() -> str:
    """Which of the `CLOCKS` this machine's calls are timed by."""
    return "wall time" if torch.cuda.is_available() else "process time"


def wait_for_device() -> None:
    """Wait until an accelerator, if there is one, has done all that it was given: else only launches are timed."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def processor_name() -> str:
    """The processor's name as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def machine() -> dict[str, Any]:
    """What a measurement depends on beside its own options."""
    return {
        "processor": processor_name(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "clock": clock_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def prepare(
    description: str | None, results: Path, rounds: int, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """The options of what is measured as a whole and stored in one file; threads and the seed are set."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"most turns of each call (default {rounds})")
    parser.add_argument("--output", type=Path, default=results)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def code_version() -> str:
    """A digest of the package's source files: a result belongs to the code that it was measured with."""
    package = Path(peft_talan.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:10]


def in_turns(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    warm_up: int,
    seconds: float = math.inf,
    fewest: int = 3,
    after: Callable[[Any], object] = lambda result: None,
    calls_per_turn: int = 1,
) -> dict[str, list[float]]:
    """Time all calls in turns, so that a change of the machine's clock hits all of them; milliseconds by name.

    The order is rotated from turn to turn, and every second one is backwards: no call always follows the same other
    one, and two that are compared stay neighbours. After so many `seconds`, no turn beyond the `fewest` begins.
    `after` undoes what a call did, outside of its time.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, clock = list(calls), CLOCKS[clock_name()]
    gc.collect()
    gc.freeze()  # Else a full collection walks all models, in whoever's call it falls.
    begin = time.perf_counter()
    for turn in range(-warm_up, rounds):
        if turn == 0:
            begin = time.perf_counter()  # Warming up may have compiled.
        if turn >= fewest and time.perf_counter() - begin > seconds:
            break
        shift = (turn // 2) % len(names)
        order = (names[shift:] + names[:shift])[:: 1 if turn % 2 else -1]
        for name in [name for name in order for _ in range(calls_per_turn)]:
            wait_for_device()
            start = clock()
            result = calls[name]()
            wait_for_device()
            if turn >= 0:
                times[name].append(1e3 * (clock() - start))
            after(result)
            del result
    gc.unfreeze()
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def ratio_of(times: list[float], others: list[float]) -> dict[str, float]:
    """The median of the turns' ratios with its 95% confidence interval, by bootstrap over the turns."""
    ratios = torch.tensor(times, dtype=torch.float64) / torch.tensor(others, dtype=torch.float64)
    picked = torch.randint(len(ratios), (RESAMPLES, len(ratios)), generator=torch.Generator().manual_seed(0))
    resampled = ratios[picked].quantile(0.5, dim=1)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"median": statistics.median(ratios.tolist()), "low": low, "high": high}


def interval_text(ratio: dict[str, float], digits: int = 4) -> str:
    """A ratio with its interval."""
    return "{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]".format(**ratio, digits=digits)


def summary(times: dict[str, list[float]], partners: dict[str, str]) -> dict[str, Any]:
    """Medians, ratios within the turns to each one's partner where both were timed, and the turns themselves."""
    pairs = [(name, partners[name]) for name in times if partners.get(name) in times]
    return {
        "milliseconds": medians(times),
        "ratios": {name: {"to": other, **ratio_of(times[name], times[other])} for name, other in pairs},
        "times": {name: [round(value, 3) for value in values] for name, values in times.items()},
    }


def operations_of(call: Callable[[], object]) -> dict[str, int]:
    """Operations of one call: at the dispatcher, those of them that are no view, and torch.profiler's events.

    The profiler also counts the composite operations above autograd (`linear` beside the `addmm` that it becomes), so
    its number is larger. What is no view, and no allocation, is what a GPU gets launched.
    """
    with DispatchCounter() as counter:
        call()
    with profile(activities=[ProfilerActivity.CPU]) as run:
        call()
    events = sum(event.name().startswith("aten::") for event in run.profiler.kineto_results.events())
    return {"dispatched": counter.count, "no_views": counter.count - counter.views, "profiler": events}


def profiled(call: Callable[[], object], keep: Callable[[profile], object]) -> Callable[[], None]:
    """The call, of which each time a profile of its memory is kept: a long one is not made again for that alone."""

    def run() -> None:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            call()
        keep(found)

    return run


def bytes_of(run: profile) -> dict[str, int]:
    """The bytes that a profiled call allocated, results included, inputs excluded.

    `peak`: the highest balance of allocated minus freed bytes since the call began. `allocated`: all allocations.
    """
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    balance = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        balance += event.nbytes()
        peak = max(peak, balance)
    return {"peak": peak, "allocated": sum(event.nbytes() for event in events if event.nbytes() > 0)}


def memory_of(call: Callable[[], object]) -> dict[str, int]:
    """The bytes that one call, not its first, allocates; see `bytes_of`."""
    found: list[profile] = []
    profiled(call, found.append)()
    return bytes_of(found[0])


def card_memory_of(call: Callable[[], object]) -> dict[str, int]:
    """The highest number of bytes allocated on the GPU during one call, weights included."""
    torch.cuda.reset_peak_memory_stats()
    call()
    wait_for_device()
    return {"peak": torch.cuda.max_memory_allocated()}
