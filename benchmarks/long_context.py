"""The side path by itself at lengths that no model of ours reaches here: its memory, and how its sums drift.

`prefill`: one pass of the whole side path up to 131072 tokens; the bytes that it allocates beyond its input and
output, against the tokens. What grows is O(tokens x width): the projections.
`drift`: one million decoded tokens of a float32 model, one at a time as in generation, against the reference in
float64. The latent memory is a long sum, so its error could grow; what is written back, from ratios of two such sums,
is what the model sees.

    python benchmarks/long_context.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import code_version, machine, memory_of
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


def prefill(lengths: Sequence[int]) -> list[Row]:
    """Seconds and bytes of one pass over so many tokens."""
    rows = []
    parameters = make_parameters(HIDDEN_SIZE, SLOTS, WIDTH)
    for tokens in lengths:
        hidden_states = torch.randn(1, tokens, HIDDEN_SIZE)
        run = torch.no_grad()(partial(fused.side_path, hidden_states, parameters, SidePathOptions()))
        run()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        peak, output = memory_of(run)["peak"], hidden_states.nbytes
        row = {
            "tokens": tokens,
            "seconds": seconds,
            "peak_bytes": peak,
            "peak_bytes_a_token_beyond_the_output": (peak - output) / tokens,
            "output_bytes_a_token": output / tokens,
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
    parser.add_argument("--measure", nargs="+", choices=["prefill", "drift"], default=["prefill", "drift"])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
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
    if "prefill" in options.measure:
        stored["prefill"] = {**facts, "rows": prefill(options.lengths)}
    if "drift" in options.measure:
        stored["drift"] = {**facts, **drift(options.decoded, options.seed)}
    write_json(options.output, stored)


if __name__ == "__main__":
    main()
