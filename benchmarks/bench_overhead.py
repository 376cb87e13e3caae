"""What the side path costs in a whole model, beside matched LoRA and DoRA, the base model and merged models.

All conditions of a model live in one process and share its base weights. They take turns call by call, so that a
change of the machine's clock hits all of them; a ratio is the median of the ratios within a turn, with a bootstrap
interval over the turns. `lora again` is a second LoRA model: its ratio to the first shows the noise of the same run.

    python benchmarks/bench_overhead.py --models smollm2 --measure attach decode prefill train
    python benchmarks/bench_overhead.py --models smollm2 --measure decode prefill --compile
    python benchmarks/bench_overhead.py --report

One JSON object per finished measurement is appended to the results; what is stored for this version of the code is
skipped, unless --again. What would take too long or too much memory is measured with fewer conditions, or is stored
as left out, with the reason. `--report` prints the tables, and writes them and the plots into the docs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from calls import (
    attach_calls,
    compiled_decode_calls,
    compiled_prefill_calls,
    decode_calls,
    key_bytes,
    load_calls,
    prefill_calls,
    prefill_operations,
    train_calls,
)
from conditions import GROUPS, MATCHED, MODELS, SMALLER_GROUPS, load_base, make_conditions, trainable_shares
from measure import code_version, in_turns, interval_text, machine, memory_of, operations_of, summary
from runs import append_line, read_lines
from torch import nn

RESULTS = Path(__file__).parent / "results" / "overhead.jsonl"
PROBE_TOKENS = 64
"""Length of the prefill from which the time of longer ones is foretold."""
PROFILED_SECONDS = 8.0
"""Memory and operations are counted where a call takes at most as long: they need several calls of each condition."""
LONG_SECONDS = 5.0
"""Calls of at least this length need no warm-up, and two turns are enough for a median with an interval."""


class LeftOut(Exception):
    """A measurement that would cost too much."""


def probe(models: dict[str, nn.Module], group: str) -> dict[str, float]:
    """Seconds of a short prefill of the group's plain adapter, taken for all of its conditions."""
    name = group if group in models else next(iter(models))
    call = prefill_calls({name: models[name]}, PROBE_TOKENS)[name]
    call()
    start = time.perf_counter()
    call()
    return dict.fromkeys(models, time.perf_counter() - start)


def chosen(
    group: str,
    models: dict[str, nn.Module],
    turns: int,
    seconds: dict[str, float],
    bytes_each: float,
    options: argparse.Namespace,
) -> dict[str, nn.Module]:
    """The largest set of conditions whose turns fit into the time and whose caches fit into the memory."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in next(iter(models.values())).parameters())
    room = options.memory * 2**30 - weights
    time_limit = 1.5 * options.seconds
    for names in [list(models), *SMALLER_GROUPS[group]]:
        names = [name for name in names if name in models]
        least, needed = turns * sum(seconds[name] for name in names), len(names) * bytes_each
        if least <= time_limit and needed <= room:
            return {name: models[name] for name in names}
    if needed > room:
        gigabytes = (weights + needed) / 2**30
        raise LeftOut(f"the caches of two conditions need {gigabytes:.0f} GiB; the limit is {options.memory:g}")
    raise LeftOut(
        f"{turns} turns of two conditions need {least:.0f} s ({max(seconds.values()):.0f} s a call); "
        f"the limit is {time_limit:.0f} s"
    )


def measure_prefill(models: dict[str, nn.Module], group: str, tokens: int, options: Any) -> dict[str, Any]:
    """Forward passes over a prompt."""
    short = probe(models, group)
    first = next(iter(models.values()))
    growth = prefill_operations(first, tokens) / prefill_operations(first, PROBE_TOKENS)
    # DoRA's surplus, the norms of its weights, is there once a call, whatever the length.
    foretold = {name: value + options.plain_probe * (growth - 1) for name, value in short.items()}
    cached = tokens * key_bytes(first.config, first.dtype.itemsize) * 2
    warm_up, fewest = (0, 2) if max(foretold.values()) > LONG_SECONDS else (1, 3)
    models = chosen(group, models, warm_up + fewest, foretold, cached, options)
    calls = compiled_prefill_calls(models, tokens) if options.compile else prefill_calls(models, tokens)
    result = summary(in_turns(calls, options.rounds, warm_up, options.seconds, fewest), MATCHED)
    if not options.compile and max(foretold.values()) < PROFILED_SECONDS:
        result["memory"] = {name: memory_of(call) for name, call in calls.items()}
    return result


def measure_decode(models: dict[str, nn.Module], group: str, context: int, batch: int, options: Any) -> dict[str, Any]:
    """Single tokens that continue from a cache."""
    first = next(iter(models.values()))
    # The cache is copied with every token: one layer's keys exist twice.
    cached = (context + options.decode_rounds) * batch * key_bytes(first.config, first.dtype.itemsize)
    cached *= 1 + 1 / first.config.num_hidden_layers
    short = {name: seconds / 4 for name, seconds in probe(models, group).items()}
    models = chosen(group, models, 8, short, cached, options)
    if options.compile:
        calls = compiled_decode_calls(models, context, batch, options.decode_rounds + 64)
    else:
        calls = decode_calls(models, context, batch)
    result = summary(in_turns(calls, options.decode_rounds, 3, options.seconds, 5), MATCHED)
    if not options.compile and context == min(options.contexts):
        result["operations"] = {name: operations_of(call) for name, call in calls.items()}
        result["memory"] = {name: memory_of(call) for name, call in calls.items()}
    return result


def measure_train(models: dict[str, nn.Module], group: str, tokens: int, options: Any) -> dict[str, Any]:
    """Training steps."""
    models = {name: model for name, model in models.items() if name not in ("base", "merged", "kept")}
    first = next(iter(models.values()))
    growth = 3 * prefill_operations(first, tokens) / prefill_operations(first, PROBE_TOKENS)
    foretold = {name: value * growth for name, value in probe(models, group).items()}
    calls = train_calls(chosen(group, models, 4, foretold, 0, options), tokens)
    result = summary(in_turns(calls, options.rounds, 1, options.seconds), MATCHED)
    if max(foretold.values()) < PROFILED_SECONDS:
        result["memory"] = {name: memory_of(call) for name, call in calls.items()}
        result["operations"] = {name: operations_of(call) for name, call in calls.items()}
    return result


def measure_attach(base: nn.Module, what: str, options: argparse.Namespace) -> dict[str, Any]:
    """Attaching fresh adapters, or loading saved ones; taking them off again is not timed."""
    names = ["lora", "talan", "lora again"]
    with tempfile.TemporaryDirectory() as folder:
        calls = attach_calls(base, names) if what == "attach" else load_calls(base, names, Path(folder))
        times = in_turns(calls, options.rounds * 2, 2, options.seconds, after=lambda model: model.unload())
    return summary(times, MATCHED)


def cells(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What was asked for, one measurement at a time."""
    groups = [group for group in GROUPS if group in options.groups]
    for what in options.measure:
        if what in ("attach", "load", "parameters"):
            yield {"measure": what}
        elif what == "decode":
            sizes = [{"context": context, "batch": batch} for batch in options.batches for context in options.contexts]
            yield from ({"measure": what, "group": group, **size} for group in groups for size in sizes)
        else:
            lengths = options.tokens if what == "prefill" else options.train_tokens
            yield from ({"measure": what, "group": group, "tokens": length} for group in groups for length in lengths)


def run_cell(base: nn.Module, cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one thing."""
    what = cell["measure"]
    if what == "parameters":
        return {"shares": trainable_shares(base)}
    if what in ("attach", "load"):
        return measure_attach(base, what, options)
    group = cell["group"]
    models = make_conditions(base, [name for name in GROUPS[group] if name in options.conditions])
    options.plain_probe = probe({"base": base}, "base")["base"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if what == "decode":
        result = measure_decode(models, group, cell["context"], cell["batch"], options)
    elif what == "prefill":
        result = measure_prefill(models, group, cell["tokens"], options)
    else:
        result = measure_train(models, group, cell["tokens"], options)
    if options.compile:
        result["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
        result["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    missing = [name for name in models if name not in result["milliseconds"]]
    return {**result, "not_measured": missing} if missing else result


def short_line(cell: dict[str, Any], result: dict[str, Any]) -> str:
    """One measurement as a line of text."""
    if "left_out" in result:
        return f"{cell}: left out, {result['left_out']}"
    rows = [f"{name} {interval_text(ratio)}" for name, ratio in result.get("ratios", {}).items()]
    first = {name: round(value, 2) for name, value in result.get("milliseconds", result.get("shares", {})).items()}
    return f"{cell}: {first} {'; '.join(rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what was asked for, print it and store it; or report."""
    conditions = [name for names in GROUPS.values() for name in names]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    kinds = ["parameters", "attach", "load", "decode", "prefill", "train"]
    parser.add_argument("--measure", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=["lora"])
    parser.add_argument("--conditions", nargs="+", choices=conditions, default=conditions)
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 8192], help="lengths of prompts")
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=[128, 2048, 8192], help="tokens before a decoded one"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="rows that are decoded at once")
    parser.add_argument("--train-tokens", nargs="+", type=int, default=[512])
    parser.add_argument("--rounds", type=int, default=9, help="most turns of a prefill or a training step")
    parser.add_argument("--decode-rounds", type=int, default=100, help="most turns of a decoded token")
    parser.add_argument("--seconds", type=float, default=30, help="time after which a measurement takes no more turns")
    parser.add_argument("--memory", type=float, default=11, help="GiB that weights and caches may take")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile every condition; decode: static cache")
    parser.add_argument("--blocks", type=int, help="cut the models to their first blocks: compiling takes long")
    parser.add_argument("--again", action="store_true", help="measure also what is stored for this code")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="print the tables; write them and the plots to docs/")
    options = parser.parse_args(arguments)
    if options.report:
        from report_overhead import report

        report(options.output)
        return
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64
    environment, code = machine(), code_version()
    stored = [] if options.again else [(line["key"], line["code"]) for line in read_lines(options.output)]
    print(environment, code)
    for model in options.models:
        for dtype in options.dtypes:
            base = None
            for cell in cells(options):
                key = {"model": model, "dtype": dtype, "threads": options.threads, "compile": options.compile, **cell}
                if options.blocks is not None:
                    key["blocks"] = options.blocks
                if (key, code) in stored:
                    continue
                base = base or load_base(model, getattr(torch, dtype), options.blocks)
                try:
                    result = run_cell(base, cell, options)
                except LeftOut as reason:
                    result = {"left_out": str(reason)}
                print(short_line({"model": model, "dtype": dtype, **cell}, result), flush=True)
                append_line(options.output, {"key": key, "code": code, **result, "machine": environment})


if __name__ == "__main__":
    main()
