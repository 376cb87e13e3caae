"""How far one side path is from the least bytes and operations that it can't do without.

The least is what a single kernel would read, compute and write; its time on this machine is by the rates of a large
product of matrices and of a sum, measured in the same run. On an H200 it is on paper.

    python benchmarks/limit.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from long_context import make_parameters, side_path_calls
from measure import code_version, in_turns, machine, medians, operations_of, prepare
from roofline import SLOTS, WIDTH, side_path_operations, side_path_parameters
from runs import write_json

from peft_talan.functional.one_token import TokenBuffers, one_token
from peft_talan.functional.parameters import SidePathOptions

RESULTS = Path(__file__).parent / "results" / "limit.json"
HIDDEN_SIZE, TOKENS = 576, 512
"""Of SmolLM2-135M, and of the prompts and training steps that are timed in bench_overhead.py."""
FLOAT = 4
"""Bytes of a float32."""
H200 = {"bytes a second": 4.8e12, "operations a second": 67e12}
"""On paper: its memory, and float32 products without tensor cores."""
SQUARE, LARGE = 1024, 2**26
"""The matrices whose product, and the numbers whose sum, give this machine's rates."""


def needed(call: str) -> dict[str, float]:
    """The operations and the bytes that a call of a side path can't do without."""
    parameters, stream = side_path_parameters(HIDDEN_SIZE), FLOAT * HIDDEN_SIZE
    if call == "decoded token":
        state = 2 * 8 * SLOTS * (WIDTH + 1)  # in and out, in float64
        return {
            "operations": side_path_operations(HIDDEN_SIZE, True),
            "bytes": FLOAT * parameters + 2 * stream + state,
        }
    operations = TOKENS * side_path_operations(HIDDEN_SIZE, False)
    if call == "prefill":
        return {"operations": operations, "bytes": FLOAT * parameters + 2 * stream * TOKENS}
    # The backward pass has two products for each one of the forward pass; it reads the hidden states and their
    # gradient, writes a gradient, and does the same for the parameters.
    return {"operations": 3 * operations, "bytes": 3 * FLOAT * parameters + 5 * stream * TOKENS}


def calls() -> dict[str, Callable[[], object]]:
    """What is timed: a side path by itself, whose numbers stay in the processor's caches."""
    parameters, token = make_parameters(HIDDEN_SIZE, SLOTS, WIDTH), torch.randn(1, 1, HIDDEN_SIZE)
    buffers = TokenBuffers(torch.rand(1, SLOTS, WIDTH + 1, dtype=torch.float64), torch.float32)
    decode = torch.no_grad()(lambda: one_token(token, parameters, SidePathOptions(), buffers))
    return {**side_path_calls(HIDDEN_SIZE, TOKENS), "decoded token": decode}


def rates(rounds: int) -> dict[str, float]:
    """Bytes and operations a second of this machine."""
    matrix, numbers = torch.randn(SQUARE, SQUARE), torch.randn(LARGE)
    times = medians(in_turns({"product": lambda: matrix @ matrix, "sum": numbers.sum}, rounds, 2))
    return {
        "bytes a second": 1e3 * FLOAT * LARGE / times["sum"],
        "operations a second": 1e3 * 2 * SQUARE**3 / times["product"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = prepare(__doc__, RESULTS, 30, arguments)
    timed = calls()
    times = medians(in_turns(timed, options.rounds, 3, calls_per_turn=10))
    result: dict[str, Any] = {
        "machine": machine(),
        "code": code_version(),
        "rates": rates(options.rounds),
        "h200": H200,
    }
    result["calls"] = {
        name: {**needed(name), "milliseconds": times[name], "kernels": operations_of(call)["no_views"]}
        for name, call in timed.items()
    }
    print(json.dumps(result, indent=2))
    write_json(options.output, result)


if __name__ == "__main__":
    main()
