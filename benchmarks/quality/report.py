"""Tables and plots of the study, from its results; a part of a study gives a part of them.

python -m benchmarks.quality.report                          # prints the tables
python -m benchmarks.quality.report --page docs/evidence-tables.md  # puts them into the page, and the plots beside it
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..pages import filled
from . import initial_scales, inside, strength
from .arms import MATCHED, VARIANTS
from .paired import Summary, summarise
from .study import RESULTS, finished

Row = dict[str, Any]
PAIRS = (
    ("lora+talan", "lora"),
    ("lora+talan", "lora-matched"),
    ("lora-matched", "lora"),
    ("dora+talan", "dora"),
    ("rslora+talan", "rslora"),
)
# Differences so that more is better: points of exact match, per cent of the loss.
MEASURES: dict[str, Callable[[Row, Row], float]] = {
    "exact match, points": lambda new, old: 100 * (new["exact_match"] - old["exact_match"]),
    "loss, % lower": lambda new, old: 100 * (1 - new["loss"] / old["loss"]),
    "known tasks, points": lambda new, old: 100 * (new["known_exact_match"] - old["known_exact_match"]),
    "known tasks, loss % lower": lambda new, old: 100 * (1 - new["known_loss"] / old["known_loss"]),
    "plain text, nats lower": lambda new, old: old["text_loss"] - new["text_loss"],
}


def _place(row: Row) -> tuple[Any, ...]:
    """All that the partners of a pair share."""
    settings = row["settings"]
    names = ("backbone", "task", "seed", "steps", "batch_size", "learning_rate", "held_out", "held_out_known")
    return tuple(settings[name] for name in names)


def pair_up(new: Iterable[Row], old: Iterable[Row]) -> list[tuple[Row, Row]]:
    partners = {_place(row): row for row in old}
    return [(row, partners[_place(row)]) for row in new if _place(row) in partners]


def cells_of(
    pairs: list[tuple[Row, Row]], difference: Callable[[Row, Row], float]
) -> dict[tuple[str, str], list[float]]:
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for new, old in pairs:
        cells[new["settings"]["backbone"], new["settings"]["task"]].append(difference(new, old))
    return dict(sorted(cells.items()))


def _arm(rows: Iterable[Row], adapter: str, variant: str = "default") -> list[Row]:
    return [r for r in rows if r["settings"]["adapter"] == adapter and r["settings"]["variant"] == variant]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _interval(summary: Summary) -> str:
    if math.isnan(summary.low):
        return f"{summary.mean:+.2f}"
    return f"{summary.mean:+.2f} [{summary.low:+.2f}, {summary.high:+.2f}]"


def scores_table(rows: list[Row]) -> str:
    """Mean exact match and loss of every arm in every cell."""
    lines = ["| backbone | task | adapter | seeds | trainable | exact match | loss | known tasks | text perplexity |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        settings = row["settings"]
        if settings["variant"] == "default":
            groups[settings["backbone"], settings["task"], settings["adapter"]].append(row)
    for (backbone, task, adapter), found in sorted(groups.items()):
        lines.append(
            f"| {backbone} | {task} | {adapter} | {len(found)} | {found[0].get('trainable', 0):,} "
            f"| {100 * _mean(r['exact_match'] for r in found):.1f}% | {_mean(r['loss'] for r in found):.4f} "
            f"| {100 * _mean(r['known_exact_match'] for r in found):.1f}% "
            f"| {math.exp(_mean(r['text_loss'] for r in found)):.2f} |"
        )
    return "\n".join(lines)


def cells_table(rows: list[Row], measure: str) -> str:
    """The table of the paper's kind: a row a comparison and backbone, a column a task, cells at or above zero."""
    tasks = sorted({row["settings"]["task"] for row in rows})
    lines = [f"| {measure} | backbone | {' | '.join(tasks)} | mean | cells >= 0 |"]
    lines.append("|---" * (len(tasks) + 4) + "|")
    for new, old in PAIRS:
        cells = cells_of(pair_up(_arm(rows, new), _arm(rows, old)), MEASURES[measure])
        for backbone in sorted({name for name, _ in cells}):
            # Rounded, for equal scores to differ by nothing.
            means = [round(_mean(cells[backbone, task]), 9) if (backbone, task) in cells else None for task in tasks]
            there = [value for value in means if value is not None]
            shown = " | ".join("" if value is None else f"{value:+.2f}" for value in means)
            reached = f"{sum(value >= 0 for value in there)} of {len(there)}"
            lines.append(f"| {new} - {old} | {backbone} | {shown} | {_mean(there):+.2f} | {reached} |")
    return "\n".join(lines)


def summary_table(rows: list[Row]) -> str:
    """Each comparison over all cells, by every measure."""
    lines = ["| comparison | measure | mean [95% interval] | pairs +/-/all | sign test p |", "|---|---|---|---|---|"]
    for new, old in PAIRS:
        pairs = pair_up(_arm(rows, new), _arm(rows, old))
        for name, difference in MEASURES.items():
            if pairs:
                summary = summarise(list(cells_of(pairs, difference).values()))
                lines.append(
                    f"| {new} - {old} | {name} | {_interval(summary)} "
                    f"| {summary.positive}/{summary.negative}/{summary.pairs} | {summary.sign_test:.3f} |"
                )
    return "\n".join(lines)


def _judge(summary: Summary, unit: str) -> str:
    numbers = f"{_interval(summary)} {unit}, {summary.positive} of {summary.pairs} pairs better"
    if math.isnan(summary.low):
        return f"too few seeds to say ({numbers})"
    if summary.low > 0:
        return f"better ({numbers})"
    if summary.high < 0:
        return f"worse ({numbers})"
    return f"no difference that this study can tell ({numbers})"


def verdict(rows: list[Row]) -> str:
    """What the intervals say of each comparison, in words."""
    lines = []
    for new, old in PAIRS:
        pairs = pair_up(_arm(rows, new), _arm(rows, old))
        if not pairs:
            continue
        words = [
            f"{what}: {_judge(summarise(list(cells_of(pairs, MEASURES[measure]).values())), unit)}"
            for what, measure, unit in (
                ("loss on the task", "loss, % lower", "% lower"),
                ("exact match", "exact match, points", "points"),
                ("known tasks", "known tasks, points", "points"),
                ("plain text", "plain text, nats lower", "nats lower"),
            )
        ]
        lines.append(f"- **{new} against {old}.** " + "; ".join(words) + ".")
    return "\n".join(lines)


def _variants(rows: list[Row]) -> list[str]:
    """Those of the ablation in its order, then any that `--axes` made."""
    found = {row["settings"]["variant"] for row in rows}
    return [name for name in VARIANTS if name in found] + sorted(found - set(VARIANTS))


def ablation_table(rows: list[Row]) -> str:
    """Each change of one axis against LoRA alone, and against the defaults."""
    lines = [
        "| variant | pairs | trainable | loss, % lower than LoRA | loss, % lower than the default "
        "| exact match, points over LoRA | known tasks, points over LoRA | plain text, nats lower than LoRA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lora, default = _arm(rows, "lora"), _arm(rows, "lora+talan")
    names = _variants(rows)
    places = {_place(row) for row in rows if row["settings"]["variant"] not in ("default",)}
    arms = [(MATCHED, "default", "no side path, rank raised")] + [("lora+talan", name, name) for name in names]
    for adapter, variant, name in arms:
        found = [row for row in _arm(rows, adapter, variant) if _place(row) in places]
        over_lora, over_default = pair_up(found, lora), pair_up(found, default)
        if not over_lora:
            continue
        parts = [
            _interval(summarise(list(cells_of(pairs, MEASURES[measure]).values()))) if pairs else ""
            for pairs, measure in (
                (over_lora, "loss, % lower"),
                (over_default if name != "default" else [], "loss, % lower"),
                (over_lora, "exact match, points"),
                (over_lora, "known tasks, points"),
                (over_lora, "plain text, nats lower"),
            )
        ]
        lines.append(f"| {name} | {len(over_lora)} | {found[0]['trainable']:,} | {' | '.join(parts)} |")
    return "\n".join(lines)


def against_the_defaults(rows: list[Row]) -> str:
    """The variants whose interval against the defaults leaves zero out, in words."""
    default = _arm(rows, "lora+talan")
    told: dict[str, list[str]] = {"better": [], "worse": []}
    for name in _variants(rows):
        pairs = pair_up(_arm(rows, "lora+talan", name), default) if name != "default" else []
        if pairs:
            summary = summarise(list(cells_of(pairs, MEASURES["loss, % lower"]).values()))
            if summary.low > 0 or summary.high < 0:
                told["better" if summary.low > 0 else "worse"].append(f"{name} ({_interval(summary)})")
    return "\n".join(
        f"- The loss is {how}, in per cent of the default's: {', '.join(names) or 'none'}."
        for how, names in told.items()
    )


def forest_plot(rows: list[Row], file: Path, measure: str = "loss, % lower") -> None:
    """Every cell of every comparison with its interval."""
    from matplotlib.figure import Figure

    labels, summaries = [], []
    for new, old in PAIRS:
        cells = cells_of(pair_up(_arm(rows, new), _arm(rows, old)), MEASURES[measure])
        for (backbone, task), values in cells.items():
            labels.append(f"{new} - {old}: {backbone}, {task}")
            summaries.append(summarise([values]))
        if cells:
            labels.append(f"{new} - {old}: all cells")
            summaries.append(summarise(list(cells.values())))
    figure = Figure(figsize=(8, 1 + 0.24 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    for place, (label, summary) in enumerate(zip(labels, summaries, strict=True)):
        whole = label.endswith("all cells")
        axes.plot(
            [summary.low, summary.high], [-place, -place], color="black" if whole else "grey", lw=2 if whole else 1
        )
        axes.plot(summary.mean, -place, "D" if whole else "o", color="black" if whole else "tab:blue")
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks([-place for place in range(len(labels))], labels, fontsize=7)
    axes.set_xlabel(f"{measure}: mean and 95% interval")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def show(tables: dict[str, str], page: Path | None, note: str = "") -> None:
    """Put the tables into a page, or print them, each under its name and the note, if there is none."""
    if page is not None:
        page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
        return
    for name, table in tables.items():
        print(f"\n{name}{note}\n\n{table}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", default=[RESULTS])
    parser.add_argument("--ablation", type=Path, default=RESULTS.with_name("quality_ablation.jsonl"))
    parser.add_argument("--ablation-tasks", nargs="+", default=["arithmetic", "code"])
    parser.add_argument("--page", type=Path, default=None, help="a page with marks like <!-- table summary -->")
    options = parser.parse_args()
    rows = [row for file in options.results for row in finished(file).values()]
    changed = [*finished(options.ablation).values(), *finished(initial_scales.SCALES_RESULTS).values()]
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
