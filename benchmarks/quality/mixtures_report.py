"""Tables of the study of mixtures, from its results; a part of a study gives a part of them.

    python -m benchmarks.quality.mixtures_report                                 # prints the tables
    python -m benchmarks.quality.mixtures_report --page docs/evidence-tables.md  # puts them into the page

Intervals are Student's at 95% over the fresh seeds, paired by seed for differences. Names come from `report.py`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peft_talan.sft.intervals import Interval

from . import inside
from .mixtures import GROUPS, MIXTURE_RESULTS, best
from .paired import symbol
from .report import MEASURES, PAIRS, show
from .study import finished
from .tasks import DEVELOPMENT_SEED, TASKS

INSIDE_RESULTS = MIXTURE_RESULTS.with_name("mixtures_inside.jsonl")
Row = dict[str, Any]
NAMES = {
    "base": "backbone",
    "lora": "LoRA",
    "lora+talan": "LoRA+TALAN",
    "lora-matched": "LoRA, as many parameters",
    "dora": "DoRA",
    "dora+talan": "DoRA+TALAN",
    "rslora": "rsLoRA",
    "rslora+talan": "rsLoRA+TALAN",
}
ARMS = [arm for group in GROUPS for arm in group]


def place(row: Row) -> str:
    """The backbone, and the mixture if it is not the tasks as they are."""
    settings = row["settings"]
    return settings["backbone"] + ("" if settings["task"] == "mixture" else f", {settings['task']}")


def of_arm(rows: Sequence[Row], backbone: str, arm: str, development: bool = False) -> list[Row]:
    """The runs of one arm by seed, or its tries in their order."""
    return sorted(
        (
            row
            for row in rows
            if (place(row), row["settings"]["adapter"]) == (backbone, arm)
            and (row["settings"]["seed"] == DEVELOPMENT_SEED) == development
        ),
        key=lambda row: 0 if development else row["settings"]["seed"],
    )


def backbones(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(map(place, rows)))


def differences(
    rows: Sequence[Row], backbone: str, new: str, old: str, measure: Callable[[Row, Row], float]
) -> list[float]:
    """By seed; positive is better for the first."""
    partners = {row["settings"]["seed"]: row for row in of_arm(rows, backbone, old)}
    mine = of_arm(rows, backbone, new)
    return [measure(row, partners[seed]) for row in mine if (seed := row["settings"]["seed"]) in partners]


def compared(rows: Sequence[Row], measures: Sequence[str]) -> Iterator[tuple[str, str, str, str, Interval, int]]:
    """Backbone, both arms, measure, difference and its seeds, where there are two seeds at least."""
    for backbone in backbones(rows):
        for new, old in PAIRS:
            for measure in measures:
                found = differences(rows, backbone, new, old, MEASURES[measure])
                if len(found) > 1:
                    yield backbone, NAMES[new], NAMES[old], measure, Interval.of_mean(found), len(found)


def differences_table(rows: Sequence[Row]) -> str:
    lines = ["| backbone | compared | measure | | difference [95% interval] | seeds |", "|---|---|---|---|---|---|"]
    for backbone, new, old, measure, found, seeds in compared(rows, list(MEASURES)):
        text = f"{symbol(found)} | {found.text(2, sign='+')}"
        lines.append(f"| {backbone} | {new} against {old} | {measure} | {text} | {seeds} |")
    return "\n".join(lines)


def scores_table(rows: Sequence[Row]) -> str:
    """Every arm's mean over its seeds by task, and what it kept."""
    lines = [
        f"| backbone | arm | seeds | learning rate | side path | trainable | mean | {' | '.join(TASKS)} | known tasks "
        "| text perplexity |",
        "|---" * (9 + len(TASKS)) + "|",
    ]
    for backbone in backbones(rows):
        for arm in ARMS:
            found = of_arm(rows, backbone, arm)
            if not found:
                continue
            first = found[0]["settings"]
            means = [sum(row["tasks"][task]["exact_match"] for row in found) / len(found) for task in TASKS]
            means.append(sum(row["known_exact_match"] for row in found) / len(found))
            shares = [Interval.of_mean([row["exact_match"] for row in found]).text(1, 100.0) + "%"]
            shares += [f"{100 * share:.1f}%" for share in means]
            perplexity = math.exp(sum(row["text_loss"] for row in found) / len(found))
            chosen = f"{first['learning_rate']:g} | {first['variant'] if arm.endswith('+talan') else ''}"
            chosen = " | " if arm == "base" else chosen
            lines.append(
                f"| {backbone} | {NAMES[arm]} | {len(found)} | {chosen} "
                f"| {found[0].get('trainable', 0):,} | {' | '.join(shares)} | {perplexity:.1f} |"
            )
    return "\n".join(lines)


def tries_table(rows: Sequence[Row]) -> str:
    """Every try on the development seed, and which was taken."""
    lines = [
        "| backbone | arm | learning rate | side path | loss | exact match | text perplexity / backbone's | best |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for backbone in backbones(rows):
        base = of_arm(rows, backbone, "base")[0]
        for arm in ARMS:
            tries = of_arm(rows, backbone, arm, development=True)
            taken = best(tries, base)["key"] if tries else ""
            for row in tries:
                settings = row["settings"]
                lines.append(
                    f"| {backbone} | {NAMES[arm]} | {settings['learning_rate']:g} "
                    f"| {settings['variant'] if arm.endswith('+talan') else ''} | {row['loss']:.4f} "
                    f"| {100 * row['exact_match']:.1f}% | {math.exp(row['text_loss'] - base['text_loss']):.3f} "
                    f"| {'yes' if row['key'] == taken else ''} |"
                )
    return "\n".join(lines)


def inside_tables(measured: Sequence[Row]) -> str:
    """The inner states of the trained adapters, a table for each backbone."""
    by_place: dict[str, list[Row]] = {}
    for row in measured:
        by_place.setdefault(place(row), []).append(row)
    return "\n\n".join(f"{name}:\n\n{inside.table(found)}" for name, found in by_place.items())


def tables_of(results: Path, inside_results: Path) -> dict[str, str]:
    rows, measured = list(finished(results).values()), list(finished(inside_results).values())
    return {
        "mixtures differences": differences_table(rows),
        "mixtures scores": scores_table(rows),
        "mixtures tries": tries_table(rows),
        "mixtures inside": inside_tables(measured),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=MIXTURE_RESULTS)
    parser.add_argument("--inside", type=Path, default=INSIDE_RESULTS)
    parser.add_argument(
        "--page", type=Path, default=None, help="a page with marks like <!-- table mixtures scores -->"
    )
    options = parser.parse_args(arguments)
    show(tables_of(options.results, options.inside), options.page)


if __name__ == "__main__":
    main()
