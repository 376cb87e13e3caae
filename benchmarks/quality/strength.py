"""Task score and retention of the study's trained adapters against the run-time strength of the side path.

python -m benchmarks.quality.strength  # measures what is not in the results yet; benchmarks.quality.report draws
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_talan import talan_strength

from ..pages import markdown
from ..runs import Row
from .one_run import Settings, measure
from .study import RESULTS, make_adapters_parser, measure_adapters

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)
STRENGTH_RESULTS = RESULTS.with_name("quality_strength.jsonl")
CURVES = {
    "exact_match": "exact match",
    "loss": "loss of an answer's token",
    "known_exact_match": "known tasks, exact match",
    "text_loss": "loss of a token of plain text",
}


def measure_strengths(model: Any, tokenizer: Any, settings: dict[str, Any]) -> Row:
    scores = []
    for strength in STRENGTHS:
        with talan_strength(model, strength):
            found = measure(model, tokenizer, Settings(**settings))
        scores.append({"strength": strength, **{name: found[name] for name in CURVES}})
    return {"scores": scores}


def means(rows: Sequence[Row], name: str) -> list[float]:
    """A score's mean over adapters at each strength."""
    return [sum(row["scores"][place][name] for row in rows) / len(rows) for place in range(len(STRENGTHS))]


def plot(rows: Sequence[Row], file: Path) -> None:
    """A panel for each measure: the mean at each strength over the adapters of each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    tasks: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        tasks[row["settings"]["task"]].append(row)
    for axes, (name, label) in zip(panels, CURVES.items(), strict=True):
        for task, found in sorted(tasks.items()):
            axes.plot(STRENGTHS, means(found, name), "o-", label=f"{task} ({len(found)} adapters)")
        axes.set_title(label)
        axes.set_xlabel("strength")
        axes.axvline(1.0, color="grey", linewidth=0.8)
    panels[0].legend(fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def table(rows: Sequence[Row]) -> str:
    """The means over all adapters at each strength."""
    lines = []
    for strength, exact, loss, known, text in zip(STRENGTHS, *(means(rows, name) for name in CURVES), strict=True):
        scores = f"{100 * exact:.1f}%", f"{loss:.4f}", f"{100 * known:.1f}%", f"{math.exp(text):.2f}"
        lines.append([f"{strength:g}", len(rows), *scores])
    return markdown(["strength", "adapters", "exact match", "loss", "known tasks", "text perplexity"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_adapters_parser(__doc__, STRENGTH_RESULTS)
    parser.add_argument("--adapter", default="lora+talan")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args(arguments)

    def wanted(settings: dict[str, Any]) -> bool:
        return settings["adapter"] == options.adapter and settings["seed"] in options.seeds

    print(table(measure_adapters(options, wanted, measure_strengths)))


if __name__ == "__main__":
    main()
