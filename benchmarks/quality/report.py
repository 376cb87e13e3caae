"""Tables and plots of the study, from its results; a part of a study makes a part of them.

python -m benchmarks.quality.report                          # prints the tables
python -m benchmarks.quality.report --page docs/evidence-tables.md  # puts them into the page, and the plots beside it
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..pages import markdown, show
from ..runs import Row, finished, matching
from . import inside, strength
from .arms import MATCHED, VARIANTS
from .initial_scales import SCALES_RESULTS
from .paired import MEASURES, PAIRS, Summary, summarise
from .study import RESULTS

Pairs = list[tuple[Row, Row]]


def _place(row: Row) -> tuple[Any, ...]:
    """All that the partners of a pair share."""
    names = ("backbone", "task", "seed", "steps", "batch_size", "learning_rate", "held_out", "held_out_known")
    return tuple(row["settings"][name] for name in names)


def pairs_of(rows: Iterable[Row], new: str, old: str, variant: str = "default") -> Pairs:
    """The runs of an arm with those of another one that differ in nothing else."""
    partners = {_place(row): row for row in matching(rows, adapter=old, variant="default")}
    mine = matching(rows, adapter=new, variant=variant)
    return [(row, partners[_place(row)]) for row in mine if _place(row) in partners]


def cells_of(pairs: Pairs, measure: str) -> dict[tuple[str, str], list[float]]:
    """The differences by backbone and task."""
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for new, old in pairs:
        cells[new["settings"]["backbone"], new["settings"]["task"]].append(MEASURES[measure](new, old))
    return dict(sorted(cells.items()))


def summary_of(pairs: Pairs, measure: str) -> Summary:
    return summarise(list(cells_of(pairs, measure).values()))


def compared(rows: Sequence[Row]) -> dict[str, Pairs]:
    """The pairs of each comparison of which there are any."""
    found = {f"{new} - {old}": pairs_of(rows, new, old) for new, old in PAIRS}
    return {name: pairs for name, pairs in found.items() if pairs}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def scores_table(rows: Sequence[Row]) -> str:
    """Mean exact match and loss of every arm in every cell."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in matching(rows, variant="default"):
        settings = row["settings"]
        groups[settings["backbone"], settings["task"], settings["adapter"]].append(row)
    lines = []
    for place, found in sorted(groups.items()):
        exact, known, loss, text = (
            _mean(row[name] for row in found) for name in ("exact_match", "known_exact_match", "loss", "text_loss")
        )
        scores = f"{100 * exact:.1f}%", f"{loss:.4f}", f"{100 * known:.1f}%", f"{math.exp(text):.2f}"
        lines.append([*place, len(found), f"{found[0].get('trainable', 0):,}", *scores])
    heads = ("backbone", "task", "adapter", "seeds", "trainable", "exact match", "loss", "known tasks")
    return markdown([*heads, "text perplexity"], lines)


def cells_table(rows: Sequence[Row], measure: str) -> str:
    """The table of the paper's kind: a row per comparison and backbone, a column per task, cells at or above zero."""
    tasks = sorted({row["settings"]["task"] for row in rows})
    lines = []
    for name, pairs in compared(rows).items():
        cells = cells_of(pairs, measure)
        for backbone in sorted({name for name, _ in cells}):
            # Rounded, for equal scores to differ by nothing.
            means = [round(_mean(cells[backbone, task]), 9) if (backbone, task) in cells else None for task in tasks]
            there = [value for value in means if value is not None]
            shown = ["" if value is None else f"{value:+.2f}" for value in means]
            reached = f"{sum(value >= 0 for value in there)} of {len(there)}"
            lines.append([name, backbone, *shown, f"{_mean(there):+.2f}", reached])
    return markdown([measure, "backbone", *tasks, "mean", "cells >= 0"], lines)


def summary_table(rows: Sequence[Row]) -> str:
    """Each comparison over all cells, by every measure."""
    lines = []
    for name, pairs in compared(rows).items():
        for measure in MEASURES:
            found = summary_of(pairs, measure)
            signs = f"{found.positive}/{found.negative}/{found.pairs}"
            lines.append([name, measure, found.text(), signs, f"{found.sign_test:.3f}"])
    return markdown(["comparison", "measure", "mean [95% interval]", "pairs +/-/all", "sign test p"], lines)


def _judge(summary: Summary, unit: str) -> str:
    numbers = f"{summary.text()} {unit}, {summary.positive} of {summary.pairs} pairs better"
    if math.isnan(summary.low):
        return f"too few seeds to say ({numbers})"
    if summary.excludes_zero:
        return f"{'better' if summary.low > 0 else 'worse'} ({numbers})"
    return f"no difference that this study can tell ({numbers})"


def verdict(rows: Sequence[Row]) -> str:
    """What the intervals say of each comparison, in words."""
    shown = (
        ("loss on the task", "loss, % lower", "% lower"),
        ("exact match", "exact match, points", "points"),
        ("known tasks", "known tasks, points", "points"),
        ("plain text", "plain text, nats lower", "nats lower"),
    )
    lines = []
    for name, pairs in compared(rows).items():
        words = [f"{what}: {_judge(summary_of(pairs, measure), unit)}" for what, measure, unit in shown]
        lines.append(f"- **{name.replace(' - ', ' against ')}.** " + "; ".join(words) + ".")
    return "\n".join(lines)


def _variants(rows: Iterable[Row]) -> list[str]:
    """Those of the ablation in its order, then any that `--axes` made."""
    found = {row["settings"]["variant"] for row in rows}
    return [name for name in VARIANTS if name in found] + sorted(found - set(VARIANTS))


def ablation_table(rows: Sequence[Row]) -> str:
    """Each change of one axis against LoRA alone, and against the defaults."""
    lines = []
    places = {_place(row) for row in rows if row["settings"]["variant"] != "default"}
    rows = [row for row in rows if _place(row) in places]
    arms = [(MATCHED, "default", "no side path, rank raised")]
    arms += [("lora+talan", name, name) for name in _variants(rows)]
    measures = ("loss, % lower", "exact match, points", "known tasks, points", "plain text, nats lower")
    for adapter, variant, name in arms:
        over_lora = pairs_of(rows, adapter, "lora", variant)
        over_default = pairs_of(rows, adapter, "lora+talan", variant) if name != "default" else []
        if over_lora:
            loss, *others = (summary_of(over_lora, measure).text() for measure in measures)
            from_default = summary_of(over_default, measures[0]).text() if over_default else ""
            size = f"{over_lora[0][0]['trainable']:,}"
            lines.append([name, len(over_lora), size, loss, from_default, *others])
    heads = ("variant", "pairs", "trainable", "loss, % lower than LoRA", "loss, % lower than the default")
    more = ("exact match, points over LoRA", "known tasks, points over LoRA", "plain text, nats lower than LoRA")
    return markdown([*heads, *more], lines)


def against_the_defaults(rows: Sequence[Row]) -> str:
    """The variants whose interval against the defaults leaves zero out, in words."""
    names: dict[str, list[str]] = {"better": [], "worse": []}
    for name in _variants(rows):
        pairs = pairs_of(rows, "lora+talan", "lora+talan", name) if name != "default" else []
        if pairs and (summary := summary_of(pairs, "loss, % lower")).excludes_zero:
            names["better" if summary.low > 0 else "worse"].append(f"{name} ({summary.text()})")
    return "\n".join(
        f"- The loss is {how}, in per cent of the default's: {', '.join(found) or 'none'}."
        for how, found in names.items()
    )


def forest_plot(rows: Sequence[Row], file: Path, measure: str = "loss, % lower") -> None:
    """Every cell of every comparison with its interval."""
    from matplotlib.figure import Figure

    summaries: dict[str, Summary] = {}
    for name, pairs in compared(rows).items():
        for (backbone, task), values in cells_of(pairs, measure).items():
            summaries[f"{name}: {backbone}, {task}"] = summarise([values])
        summaries[f"{name}: all cells"] = summary_of(pairs, measure)
    figure = Figure(figsize=(8, 1 + 0.24 * len(summaries)), layout="constrained")
    axes = figure.add_subplot()
    for place, (label, found) in enumerate(summaries.items()):
        whole = label.endswith("all cells")
        axes.plot([found.low, found.high], [-place, -place], color="black" if whole else "grey", lw=2 if whole else 1)
        axes.plot(found.mean, -place, "D" if whole else "o", color="black" if whole else "tab:blue")
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks([-place for place in range(len(summaries))], list(summaries), fontsize=7)
    axes.set_xlabel(f"{measure}: mean and 95% interval")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", default=[RESULTS])
    parser.add_argument("--ablation", type=Path, default=RESULTS.with_name("quality_ablation.jsonl"))
    parser.add_argument("--ablation-tasks", nargs="+", default=["arithmetic", "code"])
    parser.add_argument("--page", type=Path, default=None, help="a page with marks like <!-- table summary -->")
    options = parser.parse_args(arguments)
    rows = [row for file in options.results for row in finished(file).values()]
    changed = [*finished(options.ablation).values(), *finished(SCALES_RESULTS).values()]
    ablation = [row for row in changed if row["settings"]["task"] in options.ablation_tasks]
    strengths = list(finished(strength.STRENGTH_RESULTS).values())
    tables = {
        "verdict": verdict(rows),
        "summary": summary_table(rows),
        "exact match": cells_table(rows, "exact match, points"),
        "loss": cells_table(rows, "loss, % lower"),
        "scores": scores_table(rows),
        "ablation": ablation_table(ablation),
        "defaults": against_the_defaults(ablation),
        "strength": strength.table(strengths) if strengths else "",
        "inside": inside.table(list(finished(inside.INSIDE_RESULTS).values())),
    }
    show(tables, options.page)
    if options.page is None:
        return
    images = options.page.parent / "images"
    forest_plot(rows, images / "quality_forest.png")
    if strengths:
        strength.plot(strengths, images / "quality_strength.png")
    print(json.dumps({"page": str(options.page), "runs": len(rows), "ablation": len(ablation)}))


if __name__ == "__main__":
    main()
