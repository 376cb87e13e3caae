"""Task score and retention of the study's trained adapters against the run-time strength of the side path.

python -m benchmarks.quality.strength                                  # measures what is not in the results yet
python -m benchmarks.quality.strength --plot docs/images/strength.png  # draws
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from tqdm import tqdm

from peft_talan import talan_strength

from .backbones import cache_folder
from .one_run import Settings, loaded, measure
from .study import RESULTS, finished

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)
STRENGTH_RESULTS = RESULTS.with_name("quality_strength.jsonl")
CURVES = {
    "exact_match": "exact match",
    "loss": "loss of an answer's token",
    "known_exact_match": "known tasks, exact match",
    "text_loss": "loss of a token of plain text",
}


def measure_adapter(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    settings = row["settings"]
    base, tokenizer, weights = loaded(settings["backbone"], "cpu", "float32")
    if weights != row["weights"]:
        raise SystemExit(f"{settings['backbone']} has other weights than the study's: {weights}, not {row['weights']}")
    model = PeftModel.from_pretrained(base, folder / row["key"]).eval()
    scores = []
    for strength in STRENGTHS:
        with talan_strength(model, strength):
            found = measure(model, tokenizer, Settings(**settings))
        scores.append({"strength": strength, **{name: found[name] for name in CURVES}})
    model.unload()
    return {"key": row["key"], "settings": settings, "scores": scores}


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """One panel a measure: the mean change from strength 1, over the adapters of each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    tasks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        tasks[row["settings"]["task"]].append(row)
    for axes, (name, label) in zip(panels, CURVES.items(), strict=True):
        for task, found in sorted(tasks.items()):
            means = [sum(row["scores"][place][name] for row in found) / len(found) for place in range(len(STRENGTHS))]
            axes.plot(STRENGTHS, means, "o-", label=f"{task} ({len(found)} adapters)")
        axes.set_title(label)
        axes.set_xlabel("strength")
        axes.axvline(1.0, color="grey", linewidth=0.8)
    panels[0].legend(fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def table(rows: list[dict[str, Any]]) -> str:
    """The means over all adapters at each strength."""
    lines = [
        "| strength | adapters | exact match | loss | known tasks | text perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for place, strength in enumerate(STRENGTHS):
        mean = {name: sum(row["scores"][place][name] for row in rows) / len(rows) for name in CURVES}
        lines.append(
            f"| {strength:g} | {len(rows)} | {100 * mean['exact_match']:.1f}% | {mean['loss']:.4f} "
            f"| {100 * mean['known_exact_match']:.1f}% | {math.exp(mean['text_loss']):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=RESULTS)
    parser.add_argument("--results", type=Path, default=STRENGTH_RESULTS)
    parser.add_argument("--adapters-folder", type=Path, default=cache_folder() / "study")
    parser.add_argument("--adapter", default="lora+talan")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--limit-seconds", type=float, default=math.inf)
    parser.add_argument("--plot", type=Path, default=None)
    options = parser.parse_args()
    if options.plot is not None:
        rows = list(finished(options.results).values())
        plot(rows, options.plot)
        print(table(rows))
        return
    deadline = time.monotonic() + options.limit_seconds
    done = finished(options.results)
    wanted = [
        row
        for row in finished(options.study).values()
        if row["settings"]["adapter"] == options.adapter
        and row["settings"]["seed"] in options.seeds
        and row["key"] not in done
        and (options.adapters_folder / row["key"]).exists()
    ]
    for row in tqdm(wanted, desc="adapters"):
        if time.monotonic() > deadline:
            break
        measured = measure_adapter(row, options.adapters_folder)
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main()
