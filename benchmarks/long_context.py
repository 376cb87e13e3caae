"""The side path by itself at lengths that no model of ours reaches here: its memory, and how its sums drift.

`lengths`: a pass, and a pass with its gradients, up to 131072 tokens: time and allocated bytes, against the tokens.
What grows is O(tokens x width): the projections.
`drift`: one million decoded tokens of a float32 model, one at a time as in generation, against the reference in
float64. The latent memory is a long sum, so its error could grow; what is written back, from ratios of two such sums,
is what the model sees.

    python benchmarks/long_context.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import code_version, in_turns, machine, medians, memory_of
from runs import Row, read_json, write_json

from peft_talan.functional import fused, reference, slot_reference
from peft_talan.functional.parameters import SidePathOptions, SidePathParameters
from peft_talan.memory.latent_memory import LatentMemory

RESULTS = Path(__file__).parent / "results" / "long_context.json"
HIDDEN_SIZE, SLOTS, WIDTH = 576, 8, 32
DRIFT_HIDDEN_SIZE = 64
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
PIECE = 2000


def make_parameters(hidden_size: int, slots: int, width: int) -> SidePathParameters:
    """Random tensors of one side path, as large as trained ones may become."""
    scale = hidden_size**-0.5
    return SidePathParameters(
        read=scale * torch.randn(2 * width + slots, hidden_size),
        mixer=(0.1 * torch.randn(slots),),
        write=0.05 * torch.randn(hidden_size, width),
    )


def side_path_calls(hidden_size: int, tokens: int) -> dict[str, Callable[[], object]]:
    """A pass of a side path by itself, and one with the gradients of its input and of its tensors."""
    parameters, trained = (make_parameters(hidden_size, SLOTS, WIDTH) for _ in range(2))
    leaves = [tensor.requires_grad_() for tensor in (trained.read, *trained.mixer, trained.write)]
    hidden_states = torch.randn(1, tokens, hidden_size)
    stream = hidden_states.clone().requires_grad_()

    def train() -> object:
        output = fused.side_path(stream, trained, SidePathOptions()).hidden_states
        return torch.autograd.grad(output, [stream, *leaves], hidden_states)

    return {
        "prefill": torch.no_grad()(partial(fused.side_path, hidden_states, parameters, SidePathOptions())),
        "training step": train,
    }


def by_length(lengths: Sequence[int], rounds: int) -> list[Row]:
    """Microseconds and peak bytes a token of passes over so many tokens."""
    rows = []
    for tokens in lengths:
        calls = side_path_calls(HIDDEN_SIZE, tokens)
        times = medians(in_turns(calls, rounds, 1))
        row: Row = {"tokens": tokens}
        for name, call in calls.items():
            row[name] = {
                "microseconds_a_token": 1e3 * times[name] / tokens,
                "peak_bytes_a_token": memory_of(call)["peak"] / tokens,
            }
        print(row, flush=True)
        rows.append(row)
    return rows


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    """|found - right| / |right|, over all numbers."""
    return float((found.double() - right).norm() / right.norm())


@torch.no_grad()
def drift(tokens: int, seed: int) -> Row:
    """Errors of the memory and of what is written after single steps of generation, against float64, along the way."""
    generator = torch.Generator().manual_seed(seed)
    parameters = make_parameters(DRIFT_HIDDEN_SIZE, SLOTS, WIDTH)
    exact_parameters = SidePathParameters(
        parameters.read.double(), tuple(tensor.double() for tensor in parameters.mixer), parameters.write.double()
    )
    options = SidePathOptions()
    memory = LatentMemory(static=False, max_recorded=0)
    exact = torch.zeros(1, SLOTS, WIDTH + 1, dtype=torch.float64)
    # A mean beside the noise, so that the sums have a direction to grow in, and the slots differ.
    mean = torch.randn(DRIFT_HIDDEN_SIZE, generator=generator)
    rows: list[Row] = []
    checkpoints = {10**power * digit for power in range(3, 8) for digit in (1, 2, 5)} | {tokens}
    begin, stepping = time.perf_counter(), 0.0
    for done in range(0, tokens, PIECE):
        count = min(PIECE, tokens - done)
        hidden_states = mean + torch.randn(count, 1, 1, DRIFT_HIDDEN_SIZE, generator=generator)
        start = time.perf_counter()
        for token in hidden_states:
            written = memory.append(token, parameters, options)
        stepping += time.perf_counter() - start
        values, _, logits = reference.read(
            hidden_states.view(1, count, -1).double(), exact_parameters.read, (WIDTH, WIDTH, SLOTS)
        )
        weights = slot_reference.slot_weights(logits, None)
        padded = torch.nn.functional.pad(values, (0, 1), value=1.0)
        before_last = exact + weights[:, :-1].mT @ padded[:, :-1]
        exact = exact + weights.mT @ padded
        if any(done < checkpoint <= done + count for checkpoint in checkpoints) and memory.state is not None:
            last = hidden_states[-1].double()
            right = reference.side_path(last, exact_parameters, options, state=before_last).hidden_states
            errors = {
                "tokens": done + count,
                "memory_error": relative_error(memory.state, exact),
                "mean_error": relative_error(
                    memory.state[..., :WIDTH] / memory.state[..., WIDTH:], exact[..., :WIDTH] / exact[..., WIDTH:]
                ),
                # Beside what is written, not beside the far larger hidden state.
                "written_error": float((written.double() - right).norm() / (right - last).norm()),
            }
            print(errors, f"{time.perf_counter() - begin:.0f} s", flush=True)
            rows.append(errors)
    kept_in = str(None if memory.state is None else memory.state.dtype)
    return {"memory_dtype": kept_in, "microseconds_a_token": 1e6 * stepping / tokens, "along_the_way": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", choices=["lengths", "drift"], default=["lengths", "drift"])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each pass (default 5)")
    parser.add_argument("--decoded", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    facts: dict[str, Any] = {"machine": machine(), "code": code_version(), "seed": options.seed}
    facts |= {"hidden_size": HIDDEN_SIZE, "slots": SLOTS, "width": WIDTH, "dtype": "float32"}
    stored = read_json(options.output)
    if "lengths" in options.measure:
        stored["lengths"] = {**facts, "rows": by_length(options.lengths, options.rounds)}
    if "drift" in options.measure:
        stored["drift"] = {**facts, **drift(options.decoded, options.seed)}
    write_json(options.output, stored)


if __name__ == "__main__":
    main()
