"""What the side path costs on a GPU, beside LoRA: its operators by themselves, and whole models in bfloat16.

    python benchmarks/bench_gpu.py                          # every measurement, Qwen3-0.6B's shape
    python benchmarks/bench_gpu.py --models qwen3-1.7b llama-3.2-1b --measure prefill decode
    python benchmarks/bench_gpu.py --report                 # prints the stored tables

All conditions of a measurement take turns in one process and share the base model's weights; a ratio is the median of
the ratios within a turn, with a bootstrap interval over the turns. `lora again` is a second LoRA model: its ratio to
the first is the noise of the same run. Decoding runs eager, compiled, and compiled with CUDA graphs. One JSON object a
finished measurement is appended to the results. Without a GPU it runs on the processor, to try the script out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from calls import Calls, compiled_decode_calls, decode_calls, prefill_calls, train_calls
from conditions import MATCHED, SHAPES, load_base, make_conditions
from measure import append_line, code_version, in_turns, machine, read_lines, summary, wait_for_device
from torch import nn

from peft_talan.functional import fused, one_token, ragged, ragged_reference, reference
from peft_talan.functional.parameters import SidePathOptions, SidePathParameters

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
CONDITIONS = ("base", "lora", "talan", "talan, 8 blocks", "talan, all blocks", "lora again")
MODES = {"eager": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}
KINDS = ("operators", "prefill", "decode", "train")
SLOTS, WIDTH = 8, 32
ROOM = 64
"""Places of a static cache beside those that are timed: for warming up and compiling."""


def make_parameters(hidden_size: int, device: str) -> SidePathParameters:
    """Random tensors of a side path with the attention mixer, which want gradients."""
    shapes = [(2 * WIDTH + SLOTS, hidden_size), (SLOTS,), (hidden_size, WIDTH)]
    read, bias, write = ((0.05 * torch.randn(shape, device=device)).requires_grad_() for shape in shapes)
    return SidePathParameters(read, (bias,), write)


def operator_calls(hidden_size: int, tokens: int, requests: int, device: str, dtype: torch.dtype) -> dict[str, Calls]:
    """The reference and the fused operator, by what they do."""
    parameters, options = make_parameters(hidden_size, device), SidePathOptions()
    hidden_states = torch.randn(1, tokens, hidden_size, device=device, dtype=dtype)
    asked = [parameters.read, *parameters.mixer, parameters.write]

    def forward(module: Any) -> Callable[[], object]:
        return torch.no_grad()(lambda: module.side_path(hidden_states, parameters, options))

    def backward(module: Any) -> Callable[[], object]:
        def run() -> object:
            output = module.side_path(hidden_states, parameters, options).hidden_states
            return torch.autograd.grad(output, asked, torch.ones_like(output))

        return run

    one = torch.randn(requests, 1, hidden_size, device=device, dtype=dtype)
    state = torch.rand(requests, SLOTS, WIDTH + 1, device=device)
    buffers = one_token.TokenBuffers(state.clone(), torch.float32)
    longest = max(tokens // requests, 1)
    starts = torch.arange(0, tokens + 1, longest, device=device)
    together = {
        "cu_seqlens": starts,
        "state": torch.zeros(len(starts) - 1, SLOTS, WIDTH + 1, device=device),
        "max_query_length": longest,
    }
    flat = hidden_states[0, : longest * (len(starts) - 1)]
    return {
        "forward": {"reference": forward(reference), "fused": forward(fused)},
        "forward and backward": {"reference": backward(reference), "fused": backward(fused)},
        f"one token, {requests} rows": {
            "reference": torch.no_grad()(lambda: reference.side_path(one, parameters, options, state=state)),
            "fused": torch.no_grad()(lambda: one_token.one_token(one, parameters, options, buffers)),
        },
        f"{len(starts) - 1} requests in one call": {
            "reference": torch.no_grad()(
                lambda: ragged_reference.ragged_side_path(flat, parameters, options, **together)
            ),
            "fused": torch.no_grad()(lambda: ragged.ragged_side_path(flat, parameters, options, **together)),
        },
    }


def peak_memory(calls: Calls) -> dict[str, int] | None:
    """The highest number of bytes allocated in each call, weights included; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    peaks = {}
    for name, call in calls.items():
        torch.cuda.reset_peak_memory_stats()
        call()
        wait_for_device()
        peaks[name] = torch.cuda.max_memory_allocated()
    return peaks


def cells(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What was asked for, one measurement of a model at a time."""
    tokens, context = options.tokens, options.context
    for what in options.measure:
        if what == "operators":
            yield {"measure": what, "tokens": tokens}
        elif what == "decode":
            sizes = [{"context": context, "batch": batch} for batch in (1, options.batch)]
            yield from ({"measure": what, **size, "mode": mode} for mode in options.modes for size in sizes)
        else:
            yield {"measure": what, "tokens": tokens}


def calls_of(cell: dict[str, Any], base: nn.Module, options: argparse.Namespace) -> dict[str, Calls]:
    """The calls of a measurement of whole models; they take turns."""
    names = [name for name in CONDITIONS if name != "base" or cell["measure"] != "train"]
    models = make_conditions(base, names)
    if cell["measure"] == "prefill":
        return {"prefill": prefill_calls(models, cell["tokens"])}
    if cell["measure"] == "train":
        return {"train": train_calls(models, cell["tokens"])}
    torch._dynamo.reset()
    context, batch, mode = cell["context"], cell["batch"], cell["mode"]
    if mode == "eager":
        return {"decode": decode_calls(models, context, batch)}
    return {"decode": compiled_decode_calls(models, context, batch, options.rounds + ROOM, MODES[mode])}


def run_of(line: dict[str, Any]) -> tuple[str, str]:
    """The card, or the processor, and the version of the code."""
    return line["machine"]["accelerator"] or line["machine"]["processor"], line["code"]


def table(lines: list[dict[str, Any]]) -> str:
    """The stored results as Markdown, one table a card and version of the code."""
    rows: list[str] = []
    for run in sorted(set(map(run_of, lines))):
        rows += ["", ", code ".join(run), "", "| measurement | condition | ms | ratio |", "|---|---|---|---|"]
        for line in (line for line in lines if run_of(line) == run):
            what = ", ".join(f"{name} {value}" for name, value in line["key"].items())
            for name, milliseconds in line["milliseconds"].items():
                ratio = line["ratios"].get(name)
                shown = "-"
                if ratio is not None:
                    shown = f"{ratio['median']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}] of {ratio['to']}"
                rows.append(f"| {what} | {name} | {milliseconds:.3f} | {shown} |")
    return "\n".join(rows)


def main() -> None:
    """Measure what was asked for, store it and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["qwen3-0.6b"], help="shapes")
    parser.add_argument("--measure", nargs="+", choices=KINDS, default=list(KINDS), help="what to measure")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="of decoding")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and activations (default bfloat16)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where it runs")
    parser.add_argument("--tokens", type=int, default=2048, help="of a prompt or training sample (default 2048)")
    parser.add_argument("--context", type=int, default=2048, help="tokens before a decoded one (default 2048)")
    parser.add_argument("--batch", type=int, default=16, help="rows of the larger batches (default 16)")
    parser.add_argument("--blocks", type=int, help="keep this many of the model's blocks (default: all)")
    parser.add_argument("--rounds", type=int, default=100, help="most turns (default 100)")
    parser.add_argument("--seconds", type=float, default=30.0, help="a measurement begins no turn later (default 30)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results are appended")
    parser.add_argument("--report", action="store_true", help="print what is stored; measure nothing")
    options = parser.parse_args()
    if options.report:
        print(table(read_lines(options.output)))
        return
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    environment, code = machine(), code_version()
    print(environment, code)
    for name in options.models:
        base = load_base(name, dtype, options.blocks).to(options.device)
        for cell in cells(options):
            key = {**cell, "model": name, "dtype": options.dtype, "blocks": base.config.num_hidden_layers}
            if cell["measure"] == "operators":
                found = operator_calls(base.config.hidden_size, options.tokens, options.batch, options.device, dtype)
            else:
                found = calls_of(cell, base, options)
            for what, calls in found.items():
                times = in_turns(calls, options.rounds, 3, options.seconds)
                line = {
                    "key": {**key, **({} if what == cell["measure"] else {"what": what})},
                    "code": code,
                    **summary(times, {**MATCHED, "fused": "reference"}),
                    "memory": peak_memory(calls),
                }
                append_line(options.output, {**line, "machine": environment})
                print(table([{**line, "machine": environment}]), flush=True)


if __name__ == "__main__":
    main()
