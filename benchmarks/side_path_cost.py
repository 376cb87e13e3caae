"""How the time of one side path by itself grows with slots, latent width and the width of the model.

How it grows with the tokens, long_context.py measures.

python benchmarks/side_path_cost.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from long_context import make_parameters
from measure import code_version, in_turns, machine, medians, prepare
from runs import write_json

from peft_talan.functional import fused
from peft_talan.functional.parameters import SidePathOptions

RESULTS = Path(__file__).parent / "results" / "side_path_cost.json"
DEFAULT = {"hidden_size": 1024, "slots": 8, "width": 32}
PREFILL = 2048
SWEEPS: dict[str, tuple[int, ...]] = {
    "slots": (4, 8, 16, 32, 64),
    "width": (16, 32, 64, 128),
    "hidden_size": (576, 1024, 2048, 4096, 8192),
}


def side_path_call(tokens: int, hidden_size: int, slots: int, width: int) -> Callable[[], object]:
    """One pass, which for a single token continues from a memory."""
    parameters = make_parameters(hidden_size, slots, width)
    hidden_states = torch.randn(1, tokens, hidden_size)
    state = torch.rand(1, slots, width + 1) if tokens == 1 else None

    def run() -> object:
        with torch.no_grad():
            return fused.side_path(hidden_states, parameters, SidePathOptions(), state=state)

    return run


def sweep(what: str, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Median milliseconds along one axis, all values in turns."""
    shapes = [{**DEFAULT, "tokens": tokens, what: value} for value in SWEEPS[what]]
    calls = {str(place): side_path_call(**shape) for place, shape in enumerate(shapes)}
    times = medians(in_turns(calls, rounds, 3, 20)).values()
    return [{what: value, "milliseconds": time} for value, time in zip(SWEEPS[what], times, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    options = prepare(__doc__, RESULTS, 20, arguments)
    result: dict[str, Any] = {"machine": machine(), "code": code_version(), "default": DEFAULT, "prefill": PREFILL}
    result["passes"] = {what: sweep(what, PREFILL, options.rounds) for what in SWEEPS}
    result["one_token"] = {what: sweep(what, 1, 20 * options.rounds) for what in SWEEPS}
    print(json.dumps(result, indent=2))
    write_json(options.output, result)


if __name__ == "__main__":
    main()
