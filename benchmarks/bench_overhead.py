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
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from calls import (
    OPERATORS,
    Calls,
    attach_calls,
    compiled_decode_calls,
    compiled_prefill_calls,
    decode_calls,
    key_bytes,
    load_calls,
    operator_calls,
    prefill_calls,
    prefill_operations,
    train_calls,
)
from conditions import GROUPS, MATCHED, MODELS, SMALLER_GROUPS, load_base, make_conditions, trainable_shares
from measure import (
    CLOCKS,
    bytes_of,
    card_memory_of,
    clock_name,
    code_version,
    in_turns,
    interval_text,
    machine,
    memory_of,
    operations_of,
    profiled,
    summary,
)
from runs import Row, append_line, read_lines
from torch import nn

RESULTS = Path(__file__).parent / "results" / "overhead.jsonl"
PROBE_TOKENS = 64
"""Length of the prefill from which the time of longer ones is foretold."""
LONG_SECONDS = 5.0
"""Calls of at least this length need no warm-up, and two turns are enough for a median with an interval."""
ROOM = 64
"""Places of a static cache beside those that are timed: for warming up and compiling."""
MODES = {"eager": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}
KINDS = ("parameters", "attach", "load", "decode", "prefill", "train")
UNTRAINED = ("base", "merged", "kept")


class LeftOut(Exception):
    """A measurement that would cost too much."""


def probe(models: dict[str, nn.Module], group: str) -> dict[str, float]:
    """Seconds of a short prefill of the group's plain adapter, taken for all of its conditions."""
    name = group if group in models else next(iter(models))
    call = prefill_calls({name: models[name]}, PROBE_TOKENS)[name]
    clock = CLOCKS[clock_name()]
    call()
    start = clock()
    call()
    return dict.fromkeys(models, clock() - start)


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
        f"{turns} turns of two conditions need {least:.0f} s ({max(seconds.values()):.0f} s per call); "
        f"the limit is {time_limit:.0f} s"
    )


def calls_of(models: dict[str, nn.Module], cell: Row, mode: str, options: argparse.Namespace) -> Calls:
    """What is timed of whole models."""
    if cell["measure"] == "train":
        return train_calls(models, cell["tokens"], options.checkpointing)
    if cell["measure"] == "prefill":
        return (prefill_calls if mode == "eager" else compiled_prefill_calls)(models, cell["tokens"])
    context, batch = cell["context"], cell["batch"]
    if mode == "eager":
        return decode_calls(models, context, batch)
    return compiled_decode_calls(models, context, batch, options.decode_rounds + ROOM, MODES[mode])


def measure_models(base: nn.Module, cell: Row, mode: str, options: argparse.Namespace) -> Row:
    """Prefill, decoding or training in all conditions of a group that there is time and memory for."""
    kind, group, tokens = cell["measure"], cell["group"], cell.get("tokens", PROBE_TOKENS)
    names = [name for name in GROUPS[group] if name in options.conditions]
    names = [name for name in names if kind != "train" or name not in UNTRAINED]
    models = make_conditions(base, names, options.adapters)
    first = next(iter(models.values()))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    short, plain = probe(models, group), probe({"base": base}, "base")["base"]
    growth = prefill_operations(first, tokens) / prefill_operations(first, PROBE_TOKENS)
    token_bytes = key_bytes(first.config, first.dtype.itemsize)
    rounds, warm_up, fewest, cached = options.rounds, 1, 3, 0.0
    if kind == "decode":
        rounds, warm_up, fewest = options.decode_rounds, 3, 5
        foretold = {name: value / 4 for name, value in short.items()}
        # The cache is copied with every token: one layer's keys exist twice.
        cached = (cell["context"] + rounds) * cell["batch"] * token_bytes * (1 + 1 / first.config.num_hidden_layers)
    elif kind == "prefill":
        # DoRA's surplus, the norms of its weights, is there once per call, whatever the length.
        foretold = {name: value + plain * (growth - 1) for name, value in short.items()}
        cached = tokens * token_bytes * 2
    else:
        foretold = {name: value * 3 * growth for name, value in short.items()}
    long, profiles = kind != "decode" and max(foretold.values()) > LONG_SECONDS, {}
    if long:
        warm_up, fewest = 0, 2
    calls = calls_of(chosen(group, models, warm_up + fewest, foretold, cached, options), cell, mode, options)
    seconds, contexts = max(foretold.values()), (None, min(options.contexts))
    is_counted = mode == "eager" and seconds < options.profiled_seconds and cell.get("context") in contexts
    timed = calls
    if long and is_counted and options.device == "cpu":
        timed = {name: profiled(call, partial(profiles.__setitem__, name)) for name, call in calls.items()}
    result = summary(in_turns(timed, rounds, warm_up, options.seconds, fewest), MATCHED)
    if mode != "eager":
        result["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
        result["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    elif profiles:
        result["memory"] = {name: bytes_of(found) for name, found in profiles.items()}
    elif is_counted:
        count = memory_of if options.device == "cpu" else card_memory_of
        result["memory"] = {name: count(call) for name, call in calls.items() if not name.endswith("again")}
        if kind != "prefill":
            result["operations"] = {name: operations_of(call) for name, call in calls.items()}
    missing = [name for name in models if name not in calls]
    return {**result, "not_measured": missing} if missing else result


def cells(options: argparse.Namespace) -> Iterator[tuple[Row, str]]:
    """What was asked for, one measurement with its mode at a time."""
    groups = [group for group in GROUPS if group in options.groups]
    for what in options.measure:
        modes = {"decode": options.modes, "prefill": [mode for mode in options.modes if mode != "CUDA graphs"]}
        if what == "operators":
            sizes = [{"tokens": tokens, "what": name} for tokens in options.tokens for name in OPERATORS]
        elif what == "decode":
            sizes = [{"context": context, "batch": batch} for batch in options.batches for context in options.contexts]
        else:
            lengths = {"prefill": options.tokens, "train": options.train_tokens}.get(what)
            sizes = [{"tokens": length} for length in lengths] if lengths else [{}]
        of_groups = [{"group": group} for group in groups] if what in ("decode", "prefill", "train") else [{}]
        yield from (
            ({"measure": what, **group, **size}, mode)
            for group in of_groups
            for mode in modes.get(what, ["eager"])
            for size in sizes
        )


def run_cell(base: nn.Module, cell: Row, mode: str, options: argparse.Namespace) -> Row:
    """Measure one thing; attaching and loading without the taking off."""
    if cell["measure"] == "parameters":
        return {"shares": trainable_shares(base)}
    if cell["measure"] == "operators":
        calls = operator_calls(base, cell["tokens"], max(options.batches))[cell["what"]]
        return summary(in_turns(calls, options.rounds, 3, options.seconds), {"fused": "reference"})
    if cell["measure"] in ("attach", "load"):
        names = ["lora", "talan", "lora again"]
        with tempfile.TemporaryDirectory() as folder:
            attaches = cell["measure"] == "attach"
            calls = attach_calls(base, names) if attaches else load_calls(base, names, Path(folder))
            times = in_turns(calls, options.rounds * 2, 2, options.seconds, after=lambda model: model.unload())
        return summary(times, MATCHED)
    try:
        return measure_models(base, cell, mode, options)
    except LeftOut as reason:
        return {"left_out": str(reason)}


def short_line(cell: dict[str, Any], result: dict[str, Any]) -> str:
    """One measurement as a line of text."""
    if "left_out" in result:
        return f"{cell}: left out, {result['left_out']}"
    rows = [f"{name} {interval_text(ratio)}" for name, ratio in result.get("ratios", {}).items()]
    first = {name: round(value, 2) for name, value in result.get("milliseconds", result.get("shares", {})).items()}
    return f"{cell}: {first} {'; '.join(rows)}"


def run(options: argparse.Namespace) -> None:
    """Measure what was asked for and is not stored, print it and store it."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64
    environment, code = machine(), code_version()
    stored = [] if options.again else [(line["key"], line["code"]) for line in read_lines(options.output)]
    print(environment, code)
    stop = time.monotonic() + options.total_seconds
    for model in options.models:
        for dtype in options.dtypes:
            base = None
            for cell, mode in cells(options):
                if time.monotonic() > stop:
                    print(f"left out, {options.total_seconds:g} s are over: {cell}, {mode}")
                    continue
                about = {"model": model, "dtype": dtype}
                key = {**about, "threads": options.threads, "compile": mode != "eager", **cell}
                key |= {"mode": mode} if mode == "CUDA graphs" else {}
                key |= {"device": options.device} if options.device != "cpu" else {}
                key |= {"blocks": options.blocks} if options.blocks is not None else {}
                key |= {"checkpointing": True} if options.checkpointing and cell["measure"] == "train" else {}
                key |= {"adapters": dtype} if options.adapters == "model" and dtype != "float32" else {}
                if (key, code) in stored:
                    continue
                base = base or load_base(model, getattr(torch, dtype), options.blocks).to(options.device)
                result = run_cell(base, cell, mode, options)
                print(short_line({**about, **cell, "mode": mode}, result), flush=True)
                append_line(options.output, {"key": key, "code": code, **result, "machine": environment})


def make_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options, with other defaults than those of a processor."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    conditions = [name for names in GROUPS.values() for name in names]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument(
        "--adapters", choices=["float32", "model"], default="float32", help="their dtype, or the model's"
    )
    parser.add_argument("--measure", nargs="+", choices=[*KINDS, "operators"], default=list(KINDS))
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=["lora"])
    parser.add_argument("--conditions", nargs="+", choices=conditions, default=conditions)
    parser.add_argument("--device", default="cpu", help="where the models run")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 8192], help="lengths of prompts")
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=[128, 2048, 8192], help="tokens before a decoded one"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="rows that are decoded at once")
    parser.add_argument("--train-tokens", nargs="+", type=int, default=[512])
    parser.add_argument("--rounds", type=int, default=9, help="most turns of a prefill or a training step")
    parser.add_argument("--decode-rounds", type=int, default=100, help="most turns of a decoded token")
    parser.add_argument("--seconds", type=float, default=30, help="time after which a measurement takes no more turns")
    parser.add_argument("--total-seconds", type=float, default=math.inf, help="time after which none begins")
    parser.add_argument(
        "--profiled-seconds", type=float, default=8, help="of a call whose memory and operations are counted, at most"
    )
    parser.add_argument("--checkpointing", action="store_true", help="train with gradient checkpointing")
    parser.add_argument("--memory", type=float, default=11, help="GiB that weights and caches may take")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=["eager"], help="of decoding and prefills")
    parser.add_argument(
        "--compile", dest="modes", action="store_const", const=["compiled"], help="--modes compiled: a static cache"
    )
    parser.add_argument("--blocks", type=int, help="cut the models to their first blocks: compiling takes long")
    parser.add_argument("--again", action="store_true", help="measure also what is stored for this code")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="report what is stored, and measure nothing")
    parser.set_defaults(**defaults)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or report: print the tables, and write them and the plots to the docs."""
    options = make_parser(__doc__).parse_args(arguments)
    if options.report:
        from report_overhead import report

        report(options.output)
        return
    run(options)


if __name__ == "__main__":
    main()
