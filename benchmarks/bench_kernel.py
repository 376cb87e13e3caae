"""Compare the fused side path with the readable reference, and with the reference under torch.compile.

All sides run in one process and in turns, some calls per turn (5 by default), so that a change of the machine's clock
hits all of them. Times are medians over all calls, the first of a turn, which is cold, included. Peak extra
memory is the highest sum of bytes that the CPU allocator had handed out and not got back since the call began
(torch.profiler's memory events), results and gradients included, inputs excluded.

    python benchmarks/bench_kernel.py
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import in_turns, machine, medians, memory_of, operations_of
from pages import markdown
from runs import write_json

from peft_talan.functional import fused, reference, slot_reference
from peft_talan.functional.parameters import SidePathOptions, SidePathParameters

TOKENS, LONG_TOKENS = 2048, 32768
SLOTS, WIDTH, HIDDEN_SIZE, MIXER_HIDDEN = 8, 32, 576, 32
TARGETS = {
    "forward_speedup_at_least": 10.0,
    "forward_backward_speedup_at_least": 5.0,
    "extra_memory_share_at_most": 0.2,
    "time_at_32768_over_time_at_2048_at_most": 18.0,
}


TIMED = ("attention", "linear", "mlp")
"""The readable `delta` goes through the tokens one by one, and would take minutes to compile."""


def mixer_parameters(mixer: str) -> tuple[torch.Tensor, ...]:
    """Random tensors of one mixer, with gradients."""
    shapes = {
        "attention": [(SLOTS,)],
        "linear": [(WIDTH, SLOTS)],
        "mlp": [(SLOTS,), (MIXER_HIDDEN, SLOTS), (SLOTS, MIXER_HIDDEN), (MIXER_HIDDEN, WIDTH), (WIDTH, MIXER_HIDDEN)],
    }
    return tuple((0.1 * torch.randn(shape)).requires_grad_() for shape in shapes[mixer])


def remix_calls(
    remix: Callable[..., Any], mixer: str, tokens: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward pass without gradients, and the forward and backward pass, of one implementation."""
    parameters = mixer_parameters(mixer)
    values, queries = torch.randn(1, tokens, WIDTH), torch.randn(1, tokens, WIDTH)
    weights = slot_reference.slot_weights(torch.randn(1, tokens, SLOTS), None)
    inputs = [tensor.requires_grad_() for tensor in (values, queries, weights)]
    direction = torch.randn(1, tokens, WIDTH)

    def forward() -> object:
        with torch.no_grad():
            return remix(*inputs, mixer, parameters)

    def forward_backward() -> object:
        readouts, _ = remix(*inputs, mixer, parameters)
        return torch.autograd.grad(readouts, (*inputs, *parameters), direction)

    return forward, forward_backward


def compare(
    sides: dict[str, Callable[..., Any]], mixer: str, repeats: int, seed: int, calls_per_turn: int
) -> dict[str, Any]:
    """Times and memory of all sides for one mixer at TOKENS, and of the fused one at LONG_TOKENS."""
    calls = {}
    for name, remix in sides.items():
        torch.manual_seed(seed)
        calls[name] = remix_calls(remix, mixer, TOKENS)
    failed: dict[str, str] = {}
    start = time.perf_counter()
    try:
        for call in calls.get("compiled_reference", ()):
            call()
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        failed["compiled_reference"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        del calls["compiled_reference"]
    compile_seconds = round(time.perf_counter() - start, 1)
    result: dict[str, Any] = {"mixer": mixer, "compile_seconds": compile_seconds, "failed": failed}
    timed = partial(in_turns, warm_up=3, calls_per_turn=calls_per_turn)
    for place, what in enumerate(("forward", "forward_backward")):
        times = medians(timed({name: pair[place] for name, pair in calls.items()}, repeats))
        memory = {name: memory_of(pair[place])["peak"] for name, pair in calls.items()}
        torch.manual_seed(seed)
        long = remix_calls(sides["fused"], mixer, LONG_TOKENS)[place]
        both = medians(timed({"short": calls["fused"][place], "long": long}, max(repeats // 3, 3)))
        result[what] = {
            "milliseconds": times,
            "peak_extra_bytes": memory,
            "speedup": times["reference"] / times["fused"],
            "extra_memory_share": memory["fused"] / memory["reference"],
            "milliseconds_at_32768": both["long"],
            "time_at_32768_over_time_at_2048": both["long"] / both["short"],
        }
    return result


def compare_one_token(repeats: int, seed: int, calls_per_turn: int) -> dict[str, Any]:
    """Operations and microseconds of one decoded token's whole side path, which continues from a memory."""
    torch.manual_seed(seed)
    result: dict[str, Any] = {"hidden_size": HIDDEN_SIZE}
    for mixer in TIMED:
        parameters = SidePathParameters(
            read=0.05 * torch.randn(2 * WIDTH + SLOTS, HIDDEN_SIZE),
            mixer=tuple(tensor.detach() for tensor in mixer_parameters(mixer)),
            write=0.05 * torch.randn(HIDDEN_SIZE, WIDTH),
        )
        hidden_states, state = torch.randn(1, 1, HIDDEN_SIZE), torch.rand(1, SLOTS, WIDTH + 1)
        arguments = (hidden_states, parameters, SidePathOptions(mixer=mixer))
        calls = {
            name: torch.no_grad()(partial(module.side_path, *arguments, state=state))
            for name, module in (("reference", reference), ("fused", fused))
        }
        times = medians(in_turns(calls, 20 * repeats, 3, calls_per_turn=calls_per_turn))
        result[mixer] = {
            name: {"operations": operations_of(call)["dispatched"], "microseconds": 1e3 * times[name]}
            for name, call in calls.items()
        }
    return result


def tables(results: list[dict[str, Any]], one_token: dict[str, Any]) -> str:
    """The comparisons as text."""
    rows, long_rows = [], []
    for result in results:
        for what in ("forward", "forward_backward"):
            row = result[what]
            times, memory = row["milliseconds"], row["peak_extra_bytes"]
            for side, time_of_side in times.items():
                numbers = (times["reference"] / time_of_side, memory[side] / 2**20, memory[side] / memory["reference"])
                rows.append([result["mixer"], what, side, *(f"{number:.3f}" for number in (time_of_side, *numbers))])
            growth = row["milliseconds_at_32768"], row["time_at_32768_over_time_at_2048"]
            long_rows.append([result["mixer"], what, *(f"{number:.2f}" for number in growth)])
        rows.extend([result["mixer"], why, side, *4 * [None]] for side, why in result["failed"].items())
    tokens = [
        [mixer, side, row["operations"], f"{row['microseconds']:.1f}"]
        for mixer in TIMED
        for side, row in one_token[mixer].items()
    ]
    heads = ["mixer", "pass", "side", "ms", "x faster", "extra MiB", "share"]
    long_heads = ["mixer", "pass", f"fused, ms at T={LONG_TOKENS}", f"times T={TOKENS}"]
    token_heads = ["mixer", "one token", "operations", "microseconds"]
    return "\n\n".join([markdown(heads, rows), markdown(long_heads, long_rows), markdown(token_heads, tokens)])


def check_targets(attention: dict[str, Any]) -> dict[str, bool]:
    """Which of TARGETS the attention mixer meets; memory and long sequences in both passes."""
    passes = [attention["forward"], attention["forward_backward"]]
    forward, backward, share, growth = TARGETS.values()
    met = (
        passes[0]["speedup"] >= forward,
        passes[1]["speedup"] >= backward,
        all(row["extra_memory_share"] <= share for row in passes),
        all(row["time_at_32768_over_time_at_2048"] <= growth for row in passes),
    )
    return dict(zip(TARGETS, met, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print it and store it; the exit code is 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use (default 1)")
    parser.add_argument("--repeats", type=int, default=20, help="turns of every side (default 20)")
    parser.add_argument("--calls-per-turn", type=int, default=5, help="calls of one side in a row; 1: always cold")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default 0)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the reference out")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kernel.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    how = {"repeats": options.repeats, "seed": options.seed, "calls_per_turn": options.calls_per_turn}
    shape = {"batch": 1, "tokens": TOKENS, "slots": SLOTS, "width": WIDTH, "dtype": "float32"}
    environment = {**machine(), **how, "shape": shape}
    print(json.dumps(environment, indent=2))
    sides: dict[str, Callable[..., Any]] = {"reference": reference.remix, "fused": fused.remix}
    if not options.no_compile:
        sides["compiled_reference"] = torch.compile(reference.remix, dynamic=False)
    results = [compare(sides, mixer, **how) for mixer in TIMED]
    one_token = compare_one_token(**how)
    print(tables(results, one_token))
    met = check_targets(results[0])
    for target, bound in TARGETS.items():
        print(f"{'met   ' if met[target] else 'MISSED'} {target} {bound}")
    stored = {"environment": environment, "remix": results, "one_token": one_token, "targets": TARGETS, "met": met}
    write_json(options.output, stored)
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
