"""The inner states of the study's trained adapters, beside the figures that the paper reports.

python -m benchmarks.quality.inside
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from peft_talan.analysis import measure_blocks, measure_propagation, measure_reads, to_rows
from peft_talan.sft.prompts import encode

from ..pages import markdown
from ..runs import DEVELOPMENT_SEED, Row
from ..training import make_batch
from .study import RESULTS, make_adapters_parser, measure_adapters
from .tasks import scored_items

INSIDE_RESULTS = RESULTS.with_name("quality_inside.jsonl")
EXAMPLES = 64


def measure_inside(model: Any, tokenizer: Any, settings: dict[str, Any]) -> Row:
    """Sizes and directions of what an adapter changes, on held-out examples of its task."""
    items = scored_items(settings["task"], EXAMPLES, settings["seed"]).values()
    # Of a mixture a part of each task.
    examples = [example for part in items for example in part[: EXAMPLES // len(items)]]
    inputs = make_batch(model, tokenizer, [encode(tokenizer, example.row(tokenizer)) for example in examples])
    return {
        "blocks": to_rows(measure_blocks(model, inputs)),
        "propagation": to_rows(measure_propagation(model, inputs)),
        "slots": [
            {
                "block": item.block,
                "usage": item.slot_usage.tolist(),
                "read_entropy": float(item.measures.read_entropy[item.valid].mean()),
                "relative_norm": float(item.measures.relative_norm[item.valid].mean()),
            }
            for item in measure_reads(model, inputs)
        ],
    }


def _written(row: Row) -> list[Row]:
    return [block for block in row["blocks"] if block["written_norm"]]


def _amplified(row: Row) -> list[Any]:
    last = row["blocks"][-1]["block"]
    return [item["amplification"] for item in row["propagation"] if item["block"] == last]


SHOWN: dict[str, Callable[[Row], list[Any]]] = {
    "low-rank update / perturbation, where it is written": lambda row: [b["written_ratio"] for b in _written(row)],
    "cosine of both there": lambda row: [block["written_cosine"] for block in _written(row)],
    "low-rank update / change by the side path, behind the last block": lambda row: [row["blocks"][-1]["ratio"]],
    "cosine of both there, behind the last block": lambda row: [row["blocks"][-1]["cosine"]],
    "amplification from its block to the last": _amplified,
    "perturbation / residual stream": lambda row: [slot["relative_norm"] for slot in row["slots"]],
    "read entropy (1: all slots alike)": lambda row: [slot["read_entropy"] for slot in row["slots"]],
}


def table(rows: Sequence[Row]) -> str:
    """Medians and ranges over the adapters, where the side path writes and behind the last block."""
    lines = []
    for name, values_of in SHOWN.items():
        found = [value for row in rows for value in values_of(row) if value is not None]
        if found:
            numbers = (torch.tensor(found).quantile(0.5), min(found), max(found))
            lines.append([name, len(rows), *(f"{number:.3f}" for number in numbers)])
    return markdown(["measure", "adapters", "median", "lowest", "highest"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_adapters_parser(__doc__, INSIDE_RESULTS).parse_args(arguments)

    def wanted(settings: dict[str, Any]) -> bool:
        return settings["adapter"].endswith("+talan") and settings["seed"] != DEVELOPMENT_SEED

    print(table(measure_adapters(options, wanted, measure_inside)))


if __name__ == "__main__":
    main()
