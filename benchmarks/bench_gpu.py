"""What the side path costs on a GPU, beside LoRA: first whether it is right there, then its times in bfloat16.

    python benchmarks/bench_gpu.py                          # meant for 8 minutes, Qwen3-0.6B's shape
    python benchmarks/bench_gpu.py --models qwen3-1.7b llama-3.2-1b --measure prefill decode
    python benchmarks/bench_gpu.py --report                 # the stored table

It ends with exit code 1, and times nothing, where `gpu_equality.py` finds a difference that is not rounding. The times
are those of bench_overhead.py with other defaults: the operators beside their reference, prefill, decoding and a
training step in eager mode, then decoding in CUDA graphs on the first eight blocks, since compiling takes long. A
second LoRA model (`lora again`) shows the noise. At the end the table is in docs/performance.md. Without a GPU it runs
on the processor, to try the script out, and leaves the page as it is.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_overhead import KINDS, MODES, make_parser, run
from conditions import load_base
from gpu_equality import check
from measure import code_version, interval_text, machine
from pages import markdown, show
from runs import Row, append_line, read_lines

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
CONDITIONS = ["base", "lora", "talan", "talan, recall", "lora again"]
EAGER_SECONDS, SECONDS = 240, 330
"""After these no further measurement in eager mode, and none at all, begins: the last one may compile for a while."""
COMPILED_BLOCKS = 8
EQUALITY_BLOCKS = 4


def table(lines: list[Row]) -> str:
    """The stored results as Markdown, for each card (or processor) and version of the code."""
    tables: dict[str, list[list[str]]] = {}
    for line in lines:
        title = f"{line['machine']['accelerator'] or line['machine']['processor']}, code {line['code']}"
        rows = tables.setdefault(title, [])
        what = ", ".join(f"{name} {value}" for name, value in line["key"].items())
        for name, differences in line.get("differences", {}).items():
            worst = max(differences, key=lambda way: differences[way])
            rows.append([what, name, "-", f"differs by {differences[worst]:.1e} at most ({worst})"])
        if "differences" in line:
            served = line["vllm"]
            rows.append([what, "vLLM", "-", "not installed" if served is None else f"differs in {served:.0%}"])
        for name, milliseconds in line.get("milliseconds", {}).items():
            ratio = line["ratios"].get(name)
            shown = "-" if ratio is None else f"{interval_text(ratio)} of {ratio['to']}"
            rows.append([what, name, f"{milliseconds:.3f}", shown])
    heads = ["measurement", "condition", "ms", "ratio"]
    return "\n\n".join(f"{title}\n\n{markdown(heads, rows)}" for title, rows in tables.items()) or "Nothing yet."


def page_tables(output: Path = RESULTS) -> dict[str, str]:
    """The page's tables."""
    return {"measured on a GPU": table(read_lines(output))}


def equal(options: Namespace) -> bool:
    """Check equality in float32, store it, and say whether there was none but rounding."""
    model = options.models[0]
    base = load_base(model, torch.float32, EQUALITY_BLOCKS).to(options.device)
    found = check(base, compiled=options.modes != ["eager"])
    key = {"model": model, "dtype": "float32", "measure": "equality", "device": options.device}
    append_line(options.output, {"key": key, "code": code_version(), **found, "machine": machine()})
    print(found, flush=True)
    return bool(found["equal"])


def report(options: Namespace) -> None:
    """Print the stored table and write it into the page."""
    print(table(read_lines(options.output)))
    show(page_tables(options.output), options.page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and measure, or write the stored table into the page; the exit code."""
    parser = make_parser(
        __doc__,
        models=["qwen3-0.6b"],
        dtypes=["bfloat16"],
        device="cuda" if torch.cuda.is_available() else "cpu",
        measure=["operators", *KINDS[3:]],
        modes=list(MODES),
        conditions=CONDITIONS,
        tokens=[2048],
        contexts=[2048],
        batches=[1, 16],
        train_tokens=[2048],
        rounds=100,
        seconds=10,
        total_seconds=SECONDS,
        memory=70.0,
        output=RESULTS,
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that has the table")
    options = parser.parse_args(arguments)
    if options.report:
        report(options)
        return 0
    start = time.monotonic()
    if not equal(options):
        print("not equal: nothing is timed", file=sys.stderr)
        return 1
    eager = Namespace(**vars(options))
    eager.modes, eager.total_seconds = ["eager"], min(EAGER_SECONDS, options.total_seconds)
    run(eager)
    compiled = Namespace(**vars(options))
    compiled.modes = [mode for mode in ("CUDA graphs",) if mode in options.modes]
    compiled.measure = [measure for measure in ("decode",) if measure in options.measure]
    compiled.conditions = [name for name in CONDITIONS if name in options.conditions]
    compiled.blocks, compiled.batches = COMPILED_BLOCKS, options.batches[:1]
    compiled.total_seconds = options.total_seconds - (time.monotonic() - start)
    if compiled.modes:
        run(compiled)
    print(f"{time.monotonic() - start:.0f} s")
    if options.device != "cpu":
        report(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
