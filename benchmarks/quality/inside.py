"""The inner states of the study's trained adapters, beside the figures that the paper reports.

python -m benchmarks.quality.inside
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm import tqdm

from peft_talan.analysis import measure_blocks, measure_propagation, measure_reads, to_rows

from ..supervised import encode, make_batch
from .backbones import cache_folder
from .one_run import loaded
from .study import RESULTS, finished
from .tasks import DEVELOPMENT_SEED, scored_items

INSIDE_RESULTS = RESULTS.with_name("quality_inside.jsonl")
EXAMPLES = 64


def measure_adapter(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    settings = row["settings"]
    base, tokenizer, _ = loaded(settings["backbone"], "cpu", "float32")
    model = PeftModel.from_pretrained(base, folder / row["key"]).eval()
    items = scored_items(settings["task"], EXAMPLES, settings["seed"]).values()
    # Of a mixture a part of each task.
    examples = [encode(tokenizer, example) for part in items for example in part[: EXAMPLES // len(items)]]
    inputs = make_batch(examples, tokenizer.pad_token_id)
    reads = measure_reads(model, inputs)
    found = {
        "key": row["key"],
        "settings": settings,
        "blocks": to_rows(measure_blocks(model, inputs)),
        "propagation": to_rows(measure_propagation(model, inputs)),
        "slots": [
            {
                "block": item.block,
                "usage": item.slot_usage.tolist(),
                "read_entropy": float(item.measures.read_entropy[item.valid].mean()),
                "relative_norm": float(item.measures.relative_norm[item.valid].mean()),
            }
            for item in reads
        ],
    }
    model.unload()
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Medians and ranges over the adapters, where the side path writes and behind the last block."""
    values: dict[str, list[float]] = {
        "low-rank update / perturbation, where it is written": [],
        "cosine of both there": [],
        "low-rank update / change by the side path, behind the last block": [],
        "cosine of both there, behind the last block": [],
        "amplification from its block to the last": [],
        "perturbation / residual stream": [],
        "read entropy (1: all slots alike)": [],
    }
    for row in rows:
        written = [block for block in row["blocks"] if block["written_norm"]]
        last = row["blocks"][-1]
        measured = (
            [block["written_ratio"] for block in written],
            [block["written_cosine"] for block in written],
            [last["ratio"]],
            [last["cosine"]],
            [item["amplification"] for item in row["propagation"] if item["block"] == last["block"]],
            [slot["relative_norm"] for slot in row["slots"]],
            [slot["read_entropy"] for slot in row["slots"]],
        )
        for found, new in zip(values.values(), measured, strict=True):
            found.extend(value for value in new if value is not None)
    lines = ["| measure | adapters | median | lowest | highest |", "|---|---|---|---|---|"]
    for name, found in values.items():
        if found:
            middle = torch.tensor(found).quantile(0.5)
            lines.append(f"| {name} | {len(rows)} | {middle:.3f} | {min(found):.3f} | {max(found):.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=RESULTS)
    parser.add_argument("--results", type=Path, default=INSIDE_RESULTS)
    parser.add_argument("--adapters-folder", type=Path, default=cache_folder() / "study")
    parser.add_argument("--limit-seconds", type=float, default=math.inf)
    options = parser.parse_args()
    deadline = time.monotonic() + options.limit_seconds
    done = finished(options.results)
    rows = [
        row
        for row in finished(options.study).values()
        if row["settings"]["adapter"].endswith("+talan") and row["settings"]["seed"] != DEVELOPMENT_SEED
    ]
    for row in tqdm([row for row in rows if row["key"] not in done], desc="adapters"):
        if time.monotonic() > deadline:
            break
        if (options.adapters_folder / row["key"]).exists():
            measured = measure_adapter(row, options.adapters_folder)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(measured) + "\n")
    print(table(list(finished(options.results).values())))


if __name__ == "__main__":
    main()
