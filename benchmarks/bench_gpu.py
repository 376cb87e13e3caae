"""What the side path costs on a GPU, beside LoRA: its operators by themselves, and whole models in bfloat16.

    python benchmarks/bench_gpu.py                          # every measurement, Qwen3-0.6B's shape
    python benchmarks/bench_gpu.py --models qwen3-1.7b llama-3.2-1b --measure prefill decode
    python benchmarks/bench_gpu.py --report                 # prints the stored tables

All conditions of a measurement take turns in one process and share the base model's weights; a ratio is the median of
the ratios within a turn, with a bootstrap interval over the turns. `lora again` is a second LoRA model: its ratio to
the first is the noise of the same run. Decoding runs eager, compiled, and compiled with CUDA graphs. One JSON object
per finished measurement is appended to the results. Without a GPU it runs on the processor, to try the script out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from calls import Calls, compiled_decode_calls, decode_calls, prefill_calls, train_calls
from conditions import MATCHED, SHAPES, load_base, make_conditions
from long_context import make_parameters
from measure import code_version, in_turns, interval_text, machine, summary, wait_for_device
from pages import markdown
from runs import Row, append_line, read_lines
from torch import nn

from peft_talan.functional import fused, one_token, ragged, ragged_reference, reference
from peft_talan.functional.parameters import SidePathOptions

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
CONDITIONS = ("base", "lora", "talan", "talan, 8 blocks", "talan, all blocks", "lora again")
MODES = {"eager": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}
KINDS = ("operators", "prefill", "decode", "train")
SLOTS, WIDTH = 8, 32
ROOM = 64
"""Places of a static cache beside those that are timed: for warming up and compiling."""


def operator_calls(hidden_size: int, tokens: int, requests: int, device: str, dtype: torch.dtype) -> dict[str, Calls]:
    """The reference and the fused operator, by what they do."""
    parameters = make_parameters(hidden_size, SLOTS, WIDTH).to(torch.device(device))
    options = SidePathOptions()
    hidden_states = torch.randn(1, tokens, hidden_size, device=device, dtype=dtype)
    trained = [tensor.requires_grad_() for tensor in (parameters.read, *parameters.mixer, parameters.write)]

    def backward(module: Any) -> object:
        output = module.side_path(hidden_states, parameters, options).hidden_states
        return torch.autograd.grad(output, trained, torch.ones_like(output))

    def without_gradients(call: Callable[..., object], *arguments: Any, **named: Any) -> Callable[[], object]:
        return torch.no_grad()(partial(call, *arguments, **named))

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
        "forward": {
            name: without_gradients(module.side_path, hidden_states, parameters, options)
            for name, module in (("reference", reference), ("fused", fused))
        },
        "forward and backward": {"reference": partial(backward, reference), "fused": partial(backward, fused)},
        f"one token, {requests} rows": {
            "reference": without_gradients(reference.side_path, one, parameters, options, state=state),
            "fused": without_gradients(one_token.one_token, one, parameters, options, buffers),
        },
        f"{len(starts) - 1} requests in one call": {
            "reference": without_gradients(ragged_reference.ragged_side_path, flat, parameters, options, **together),
            "fused": without_gradients(ragged.ragged_side_path, flat, parameters, options, **together),
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


def run_of(line: Row) -> tuple[str, str]:
    """The card, or the processor, and the version of the code."""
    return line["machine"]["accelerator"] or line["machine"]["processor"], line["code"]


def table(lines: list[Row]) -> str:
    """The stored results as Markdown, one table per card and version of the code."""
    tables = []
    for run in sorted(set(map(run_of, lines))):
        rows = []
        for line in (line for line in lines if run_of(line) == run):
            what = ", ".join(f"{name} {value}" for name, value in line["key"].items())
            for name, milliseconds in line["milliseconds"].items():
                ratio = line["ratios"].get(name)
                shown = "-" if ratio is None else f"{interval_text(ratio)} of {ratio['to']}"
                rows.append([what, name, f"{milliseconds:.3f}", shown])
        tables.append(f"\n{', code '.join(run)}\n\n" + markdown(["measurement", "condition", "ms", "ratio"], rows))
    return "\n".join(tables)


def main(arguments: Sequence[str] | None = None) -> None:
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
    options = parser.parse_args(arguments)
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
                    "machine": environment,
                }
                append_line(options.output, line)
                print(table([line]), flush=True)


if __name__ == "__main__":
    main()
