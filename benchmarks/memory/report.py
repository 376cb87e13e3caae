"""Tables and the picture of the memory study.

    python -m benchmarks.memory.report                          # prints the tables
    python -m benchmarks.memory.report --page docs/evidence.md  # puts them into the page, and the picture beside it

Intervals are Student's at 95% over the seeds, paired by seed for differences; those of recall are at least as wide as
Wilson's of all texts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft_talan.demo.recall import CHANCE
from peft_talan.demo.recall_run import draw_recall
from peft_talan.sft.intervals import Interval

from ..measure import read_lines
from ..quality.mixtures import MIXTURE_RESULTS
from ..quality.mixtures_report import compared
from ..quality.paired import summarise, symbol
from ..quality.report import MEASURES, PAIRS, cells_of, pair_up, show
from ..quality.study import RESULTS as QUALITY_RESULTS
from ..quality.study import finished
from . import real_model
from .generation import RESULTS as GENERATION_RESULTS
from .one_run import ARMS
from .study import DEVELOPMENT_SEED, RESULTS

REFERENCE, MATCHED, RECOMMENDED = "LoRA", "LoRA, as many parameters", "TALAN, all blocks"
COMPARED = 10
"""The distance at which arms are compared, the longest that is trained on."""

Row = dict[str, Any]


def of_arm(rows: Sequence[Row], task: str, arm: str, base: str = "window") -> dict[int, Row]:
    """The runs of one arm on fresh seeds, by seed."""
    wanted = {"task": task, "arm": arm, "base": base}
    return {
        row["settings"]["seed"]: row
        for row in rows
        if row["settings"]["seed"] != DEVELOPMENT_SEED and wanted.items() <= row["settings"].items()
    }


def recalls(runs: dict[int, Row], windows: int, measure: str = "recall") -> list[float]:
    return [row[measure][str(windows)] for row in runs.values() if str(windows) in row[measure]]


def curve(runs: dict[int, Row], measure: str = "recall") -> dict[int, Interval]:
    """Recall by distance; the interval is at least as wide as Wilson's of all texts, for seeds that are all alike."""
    found = {}
    for windows in sorted({int(windows) for row in runs.values() for windows in row[measure]}):
        shares = recalls(runs, windows, measure)
        rows = next(iter(runs.values()))["settings"]["rows"]
        seeds, texts = Interval.of_mean(shares), Interval.of_share(round(rows * sum(shares)), rows * len(shares))
        low, high = min(seeds.low, texts.low), max(seeds.high, texts.high)
        found[windows] = Interval(seeds.mean, max(0.0, low), min(1.0, high))
    return found


def curves(rows: Sequence[Row], task: str, base: str = "window") -> dict[str, dict[int, Interval]]:
    """Recall by arm and distance, the base model first."""
    found = {arm: of_arm(rows, task, arm, base) for arm in ARMS}
    found = {arm: runs for arm, runs in found.items() if runs}
    if not found:
        return {}
    longest = max(found.values(), key=len)
    return {"base model": curve(longest, "base_recall")} | {arm: curve(runs) for arm, runs in found.items()}


def difference(mine: dict[int, Row], its: dict[int, Row]) -> Interval:
    """Recall of an arm minus that of another one with the same seeds."""
    pairs = [(mine[seed]["recall"], its[seed]["recall"]) for seed in sorted(mine.keys() & its.keys())]
    return Interval.of_mean([a[str(COMPARED)] - b[str(COMPARED)] for a, b in pairs])


def over_lora(arm: str, runs: dict[int, Row], its: dict[int, Row]) -> str:
    """The cell of an arm's difference from LoRA; empty for LoRA, and where there is nothing to compare."""
    if arm == REFERENCE or len(runs.keys() & its.keys()) < 2:
        return ""
    over = difference(runs, its)
    return f"{symbol(over)} {over.text(1, 100.0, sign='+')}"


def lengths(shown: Sequence[int]) -> str:
    """The heads of the columns of recall."""
    return " | ".join(f"{windows} window{'s' if windows > 1 else ''}" for windows in shown)


def recall_cells(shares: dict[int, Interval], shown: Sequence[int]) -> str:
    return " | ".join(shares[windows].text(1, 100.0) + "%" if windows in shares else "" for windows in shown)


def task_table(rows: Sequence[Row], task: str, base: str = "window", shown: Sequence[int] = (1, 4, 10, 32)) -> str:
    """Recall of every arm on one task at some distances, and what it has over LoRA."""
    lines = [
        f"| arm | trainable | learning rate | seeds | {lengths(shown)} | minus LoRA at {COMPARED} windows, points |",
        "|---|---|---|---|" + "---|" * len(shown) + "---|",
    ]
    for arm, shares in curves(rows, task, base).items():
        cells = recall_cells(shares, shown)
        if arm not in ARMS:
            lines.append(f"| {arm} | | | | {cells} | |")
            continue
        runs = of_arm(rows, task, arm, base)
        first = next(iter(runs.values()))
        against = over_lora(arm, runs, of_arm(rows, task, REFERENCE, base))
        lines.append(
            f"| {arm} | {first['trainable']:,} | {first['settings']['learning_rate']:g} | {len(runs)} "
            f"| {cells} | {against} |"
        )
    return "\n".join(lines)


def of_real_model(rows: Sequence[Row], arm: str) -> dict[int, Row]:
    """The runs of one arm with a real model's weights on fresh seeds, by seed."""
    found = (row for row in rows if row["settings"]["arm"] == arm)
    return {row["settings"]["seed"]: row for row in found if row["settings"]["seed"] != DEVELOPMENT_SEED}


def real_model_table(rows: Sequence[Row]) -> str:
    """Recall with a real model's weights by distance, and the perplexity of held-out text."""
    by_arm = {arm: of_real_model(rows, arm) for arm in (real_model.FULL, real_model.BASE, *ARMS)}
    by_arm = {arm: runs for arm, runs in by_arm.items() if runs}
    shown = sorted({int(windows) for runs in by_arm.values() for row in runs.values() for windows in row["recall"]})
    lines = [
        f"| arm | trainable | learning rate, side path's | seeds | {lengths(shown)} "
        f"| minus LoRA at {COMPARED} windows, points | text perplexity |",
        "|---|---|---|---|" + "---|" * len(shown) + "---|---|",
    ]
    for arm, runs in by_arm.items():
        first = next(iter(runs.values()))
        rate, scale = first["settings"]["learning_rate"], first["settings"]["side_path_lr_scale"]
        rates = f"{rate:g}" + (f", {rate * scale:g}" if arm.startswith("TALAN") else "")
        size = f"{first['trainable']:,} | {rates} | {len(runs)}" if arm in ARMS else " | | "
        perplexity = math.exp(sum(row["text_loss"] for row in runs.values()) / len(runs))
        against = over_lora(arm, runs, by_arm.get(REFERENCE, {})) if arm in ARMS else ""
        lines.append(f"| {arm} | {size} | {recall_cells(curve(runs), shown)} | {against} | {perplexity:.1f} |")
    return "\n".join(lines)


SHOWN_MEASURES = ("exact match, points", "plain text, nats lower")
NAMES = {"lora": "LoRA", "lora-matched": MATCHED, "dora": "DoRA", "rslora": "rsLoRA", "lora+talan": "TALAN"}


def findings_table(
    rows: Sequence[Row], of_a_real_model: Sequence[Row], mixtures: Sequence[Row], first_study: Sequence[Row]
) -> str:
    """One line a comparison: the recall, then the scores after mixtures and those of the first study."""
    lines = ["| compared | measure | | difference [95% interval] | pairs |", "|---|---|---|---|---|"]
    places = {f"`{task}` beyond the window": partial(of_arm, rows, task) for task in ("key", "pairs", "count")}
    places["SmolLM2 with a window, a colour beyond it"] = partial(of_real_model, of_a_real_model)
    for place, of in places.items():
        for arm in (REFERENCE, MATCHED):
            if (count := len(of(RECOMMENDED).keys() & of(arm).keys())) > 1:
                found = difference(of(RECOMMENDED), of(arm))
                lines.append(
                    f"| {RECOMMENDED}, against {arm} | {place}, points | {symbol(found)} "
                    f"| {found.text(1, 100.0, sign='+')} | {count} |"
                )
    for backbone, new, old, measure, found, seeds in compared(mixtures, SHOWN_MEASURES):
        if "TALAN" in new:
            over = f"{new} against {old}, mixture, {backbone}"
            lines.append(f"| {over} | {measure} | {symbol(found)} | {found.text(2, sign='+')} | {seeds} |")
    for new, old in PAIRS:
        by_place = [[row for row in first_study if row["settings"]["adapter"] == adapter] for adapter in (new, old)]
        for measure in SHOWN_MEASURES:
            if new.endswith("+talan") and (pairs := pair_up(*by_place)):
                summary = summarise(list(cells_of(pairs, MEASURES[measure]).values()))
                found = Interval(summary.mean, summary.low, summary.high)
                over = f"{NAMES.get(new, f'{NAMES[old]}+TALAN')}, one block, against {NAMES[old]}"
                lines.append(f"| {over} | {measure} | {symbol(found)} | {found.text(2, sign='+')} | {summary.pairs} |")
    return "\n".join(lines)


def generation_table(rows: Sequence[Row]) -> str:
    """Recall and the bytes of the cache by length of the text."""
    lines = [
        "| arm | trained on, windows x steps | tokens | texts | right [95% interval] "
        "| keys and values, bytes a text | memories, bytes a text |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share, size = Interval(*row["recall"]), row["bytes_a_row"]
        lines.append(
            f"| {row['arm']} | 1-{row['longest_trained']} x {row['settings']['steps']} | {row['tokens']:,} "
            f"| {row['settings']['rows']} | {share.text(0, 100.0)}% "
            f"| {size['keys_and_values']:,} | {size['memories']:,} |"
        )
    return "\n".join(lines)


def tables_of(results: Path, generation: Path, real_model_results: Path) -> dict[str, str]:
    """Every table of the page by its name, of what has been run."""
    rows, of_a_real_model = (list(finished(file).values()) for file in (results, real_model_results))
    tables = {f"memory {task}": task_table(rows, task) for task in ("key", "pairs", "count") if curves(rows, task)}
    if curves(rows, "key", "full"):
        tables["memory dropped keys"] = task_table(rows, "key", "full")
    tables["memory findings"] = findings_table(
        rows, of_a_real_model, *(list(finished(file).values()) for file in (MIXTURE_RESULTS, QUALITY_RESULTS))
    )
    tables["memory real model"] = real_model_table(of_a_real_model)
    tables["memory generation"] = generation_table(read_lines(generation))
    return tables


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--generation", type=Path, default=GENERATION_RESULTS)
    parser.add_argument("--real-model", type=Path, default=real_model.RESULTS)
    parser.add_argument("--page", type=Path, default=None, help="a page with marks like <!-- table memory key -->")
    options = parser.parse_args(arguments)
    tables = tables_of(options.results, options.generation, options.real_model)
    show(tables, options.page, f" (chance {100 * CHANCE:.2f}%)")
    if options.page is not None:
        shown = curves(list(finished(options.results).values()), "key")
        draw_recall(shown, options.page.parent / "images" / "memory_recall.png")


if __name__ == "__main__":
    main()
