"""What the side path costs on a GPU, beside LoRA: its operators by themselves, and whole models in bfloat16.

    python benchmarks/bench_gpu.py                          # every measurement, Qwen3-0.6B's shape
    python benchmarks/bench_gpu.py --models qwen3-1.7b llama-3.2-1b --measure prefill decode
    python benchmarks/bench_gpu.py --report                 # prints the stored tables

It is bench_overhead.py with other defaults: decoding runs eager, compiled, and compiled with CUDA graphs, and the
operators are compared with the reference. Without a GPU it runs on the processor, to try the script out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from bench_overhead import KINDS, MODES, make_parser, run
from measure import interval_text
from pages import markdown
from runs import Row, read_lines

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
CONDITIONS = ["base", "lora", "talan", "talan, 8 blocks", "talan, all blocks", "lora again"]


def table(lines: list[Row]) -> str:
    """The stored results as Markdown, one table per card (or processor) and version of the code."""
    tables: dict[str, list[list[str]]] = {}
    for line in lines:
        title = f"{line['machine']['accelerator'] or line['machine']['processor']}, code {line['code']}"
        what = ", ".join(f"{name} {value}" for name, value in line["key"].items())
        for name, milliseconds in line.get("milliseconds", {}).items():
            ratio = line["ratios"].get(name)
            shown = "-" if ratio is None else f"{interval_text(ratio)} of {ratio['to']}"
            tables.setdefault(title, []).append([what, name, f"{milliseconds:.3f}", shown])
    heads = ["measurement", "condition", "ms", "ratio"]
    return "\n\n".join(f"{title}\n\n{markdown(heads, rows)}" for title, rows in tables.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or print the stored tables."""
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
        memory=70.0,
        output=RESULTS,
    )
    options = parser.parse_args(arguments)
    if options.report:
        print(table(read_lines(options.output)))
    else:
        run(options)


if __name__ == "__main__":
    main()
