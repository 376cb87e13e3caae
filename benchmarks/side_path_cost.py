"""How the time of one side path by itself grows with tokens, slots, latent width and the width of the model.

python benchmarks/side_path_cost.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from long_context import make_parameters
from measure import code_version, in_turns, machine

from peft_talan.functional import fused
from peft_talan.functional.parameters import SidePathOptions

RESULTS = Path(__file__).parent / "results" / "side_path_cost.json"
DEFAULT = {"hidden_size": 1024, "slots": 8, "width": 32}
PREFILL, LONGEST = 2048, 32768
SWEEPS: dict[str, tuple[int, ...]] = {
    "tokens": (512, 1024, 2048, 4096, 8192, LONGEST),
    "slots": (4, 8, 16, 32, 64),
    "width": (16, 32, 64, 128),
    "hidden_size": (576, 1024, 2048, 4096, 8192),
}


def side_path_call(tokens: int, hidden_size: int, slots: int, width: int) -> Callable[[], object]:
    """One pass, which for a single token goes on from a memory."""
    parameters = make_parameters(hidden_size, slots, width)
    hidden_states = torch.randn(1, tokens, hidden_size)
    state = torch.rand(1, slots, width + 1) if tokens == 1 else None

    def run() -> object:
        with torch.no_grad():
            return fused.side_path(hidden_states, parameters, SidePathOptions(), state=state)

    return run


def sweep(what: str, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Median milliseconds along one axis, all points in turns."""
    calls = {}
    for value in SWEEPS[what]:
        shape = {**DEFAULT, "tokens": tokens, what: value}
        calls[str(value)] = partial(side_path_call(**shape))
    times = in_turns(calls, rounds, 3, 20)
    return [{what: int(name), "milliseconds": statistics.median(values)} for name, values in times.items()]


def grid(rounds: int) -> list[dict[str, Any]]:
    """Median milliseconds at the widths and lengths of bench_overhead.py's prefills."""
    shapes = [(size, tokens) for size in (576, 1024, 2048) for tokens in (512, 2048, 8192)]
    calls = {
        f"{size} {tokens}": side_path_call(tokens, size, DEFAULT["slots"], DEFAULT["width"]) for size, tokens in shapes
    }
    times = in_turns(calls, rounds, 2, 20)
    return [
        {"hidden_size": size, "tokens": tokens, "milliseconds": statistics.median(times[f"{size} {tokens}"])}
        for size, tokens in shapes
    ]


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {"machine": machine(), "code": code_version(), "default": DEFAULT, "prefill": PREFILL}
    result["passes"] = {what: sweep(what, PREFILL, 20) for what in SWEEPS}
    result["one_token"] = {what: sweep(what, 1, 400) for what in SWEEPS if what != "tokens"}
    result["grid"] = grid(12)
    print(json.dumps(result, indent=2))
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
