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
from pathlib import Path
from typing import Any

from peft_talan import TalanConfig
from peft_talan.demo.recall import CHANCE
from peft_talan.demo.recall_run import draw_recall
from peft_talan.sft.intervals import Interval

from ..pages import columns_table, markdown, show
from ..quality import mixtures_report
from ..quality.mixtures import MIXTURE_RESULTS
from ..quality.paired import PAIRS, symbol
from ..quality.report import pairs_of, summary_of
from ..quality.study import RESULTS as QUALITY_RESULTS
from ..runs import Row, Rows, by_seed, finished, matching, read_lines
from . import binding, real_model
from .generation import RESULTS as GENERATION_RESULTS
from .one_run import ARMS
from .study import RESULTS

REFERENCE, MATCHED, RECOMMENDED = "LoRA", "LoRA, as many parameters", "TALAN, all blocks"
COMPARED = 10
"""The distance at which arms are compared, the longest that is trained on."""

ByDistance = dict[int, Interval]


def share_of(shares: Sequence[float], rows: int) -> Interval:
    """The mean of the seeds' shares; the interval is at least as wide as Wilson's of all texts, for seeds alike."""
    seeds, texts = Interval.of_mean(shares), Interval.of_share(round(rows * sum(shares)), rows * len(shares))
    return Interval(seeds.mean, max(0.0, min(seeds.low, texts.low)), min(1.0, max(seeds.high, texts.high)))


def curve(runs: Rows, measure: str = "recall") -> ByDistance:
    """Recall by distance."""
    found = {}
    for windows in sorted({int(windows) for row in runs.values() for windows in row[measure]}):
        shares = [row[measure][str(windows)] for row in runs.values() if str(windows) in row[measure]]
        found[windows] = share_of(shares, next(iter(runs.values()))["settings"]["rows"])
    return found


def arms_of(rows: Sequence[Row], arms: Sequence[str] = tuple(ARMS), **settings: Any) -> dict[str, Rows]:
    """The runs of all arms that have any on fresh seeds, by seed."""
    found = {arm: by_seed(matching(rows, arm=arm, **settings)) for arm in arms}
    return {arm: runs for arm, runs in found.items() if runs}


def curves(rows: Sequence[Row], task: str, base: str = "window") -> dict[str, ByDistance]:
    """Recall by arm and distance, the base model first."""
    found = arms_of(rows, task=task, base=base)
    if not found:
        return {}
    longest = max(found.values(), key=len)
    return {"base model": curve(longest, "base_recall")} | {arm: curve(runs) for arm, runs in found.items()}


def difference(mine: Rows, its: Rows) -> Interval | None:
    """Recall of an arm minus that of another one with the same seeds, where there are two at least."""
    pairs = [(mine[seed]["recall"], its[seed]["recall"]) for seed in sorted(mine.keys() & its.keys())]
    return Interval.of_mean([a[str(COMPARED)] - b[str(COMPARED)] for a, b in pairs]) if len(pairs) > 1 else None


def over_lora(arm: str, by_arm: dict[str, Rows]) -> str:
    """The cell of an arm's difference from LoRA; empty for LoRA, and where there is nothing to compare."""
    over = difference(by_arm[arm], by_arm.get(REFERENCE, {})) if arm != REFERENCE else None
    return "" if over is None else f"{symbol(over)} {over.text(1, 100.0, sign='+')}"


def recall_heads(shown: Sequence[int]) -> list[str]:
    """The heads of the columns of recall, and of the one that compares."""
    windows = [f"{windows} window{'s' if windows > 1 else ''}" for windows in shown]
    return [*windows, f"minus LoRA at {COMPARED} windows, points"]


def recall_cells(shares: ByDistance, shown: Sequence[int]) -> list[str]:
    return [shares[windows].text(1, 100.0) + "%" if windows in shares else "" for windows in shown]


def task_table(rows: Sequence[Row], task: str, base: str = "window", shown: Sequence[int] = (1, 4, 10, 32)) -> str:
    """Recall of every arm on one task at some distances, and what it has over LoRA."""
    by_arm, lines = arms_of(rows, task=task, base=base), []
    for arm, shares in curves(rows, task, base).items():
        about, over = [None] * 3, None
        if arm in by_arm:
            first, over = next(iter(by_arm[arm].values())), over_lora(arm, by_arm)
            about = [f"{first['trainable']:,}", f"{first['settings']['learning_rate']:g}", len(by_arm[arm])]
        lines.append([arm, *about, *recall_cells(shares, shown), over])
    return markdown(["arm", "trainable", "learning rate", "seeds", *recall_heads(shown)], lines)


def real_model_table(rows: Sequence[Row]) -> str:
    """Recall with a real model's weights by distance, and the perplexity of held-out text."""
    by_arm, lines = arms_of(rows, (real_model.FULL, real_model.BASE, *ARMS)), []
    shown = sorted({int(windows) for runs in by_arm.values() for row in runs.values() for windows in row["recall"]})
    for arm, runs in by_arm.items():
        about, over = ["", None, ""], ""
        if arm in ARMS:
            first, over = next(iter(runs.values())), over_lora(arm, by_arm)
            rate, scale = first["settings"]["learning_rate"], first["settings"]["side_path_lr_scale"]
            rates = f"{rate:g}" + (f", {rate * scale:g}" if arm.startswith("TALAN") else "")
            about = [f"{first['trainable']:,}", rates, len(runs)]
        perplexity = math.exp(sum(row["text_loss"] for row in runs.values()) / len(runs))
        lines.append([arm, *about, *recall_cells(curve(runs), shown), over, f"{perplexity:.1f}"])
    heads = ("arm", "trainable", "learning rate, side path's", "seeds")
    return markdown([*heads, *recall_heads(shown), "text perplexity"], lines)


SHOWN_TASKS = ("key", "pairs", "count")
SHOWN_MEASURES = ("exact match, points", "plain text, nats lower")
NAMES = {"lora": "LoRA", "lora-matched": MATCHED, "dora": "DoRA", "rslora": "rsLoRA", "lora+talan": "TALAN"}


def findings_table(
    rows: Sequence[Row], of_a_real_model: Sequence[Row], mixtures: Sequence[Row], first_study: Sequence[Row]
) -> str:
    """A line per comparison: the recall, then the scores after mixtures and those of the first study."""
    lines: list[list[Any]] = []

    def add(over: str, measure: str, found: Interval, pairs: int, digits: int = 2, factor: float = 1.0) -> None:
        lines.append([over, measure, symbol(found), found.text(digits, factor, sign="+"), pairs])

    places = {f"`{task}` beyond the window": arms_of(rows, task=task, base="window") for task in SHOWN_TASKS}
    places["SmolLM2 with a window, a colour beyond it"] = arms_of(of_a_real_model)
    for place, by_arm in places.items():
        for arm in (REFERENCE, MATCHED):
            mine, its = by_arm.get(RECOMMENDED, {}), by_arm.get(arm, {})
            if (found := difference(mine, its)) is not None:
                count = len(mine.keys() & its.keys())
                add(f"{RECOMMENDED}, against {arm}", f"{place}, points", found, count, 1, 100.0)
    for backbone, new, old, measure, found, seeds in mixtures_report.compared(mixtures, SHOWN_MEASURES):
        if "TALAN" in new:
            add(f"{new} against {old}, mixture, {backbone}", measure, found, seeds)
    for new, old in PAIRS:
        for measure in SHOWN_MEASURES:
            if new.endswith("+talan") and (pairs := pairs_of(first_study, new, old)):
                summary = summary_of(pairs, measure)
                over = f"{NAMES.get(new, f'{NAMES[old]}+TALAN')}, one block, against {NAMES[old]}"
                add(over, measure, summary, summary.pairs)
    return markdown(["compared", "measure", None, "difference [95% interval]", "pairs"], lines)


def generation_table(rows: Sequence[Row]) -> str:
    """Recall and the bytes of the cache by length of the text."""
    return columns_table(
        {
            "arm": lambda row: row["arm"],
            "trained on, windows x steps": lambda row: f"1-{row['longest_trained']} x {row['settings']['steps']}",
            "simulated tokens": lambda row: f"{row['settings'].get('simulated') or 0:,}",
            "cap": lambda row: f"{row['settings'].get('soft_cap', TalanConfig.talan_soft_cap):g}",
            "seed": lambda row: row["settings"]["seed"],
            "tokens": lambda row: f"{row['tokens']:,}",
            "texts": lambda row: row["settings"]["rows"],
            "right [95% interval]": lambda row: f"{Interval(*row['recall']).text(0, 100.0)}%",
            "keys and values, bytes a text": lambda row: f"{row['bytes_a_row']['keys_and_values']:,}",
            "memories, bytes a text": lambda row: f"{row['bytes_a_row']['memories']:,}",
        },
        rows,
    )


def tables_of(
    results: Path, generation: Path, real_model_results: Path, binding_results: Path = binding.RESULTS
) -> dict[str, str]:
    """Every table of the page by its name, of what has been run."""
    rows, of_a_real_model = (list(finished(file).values()) for file in (results, real_model_results))
    tables = {f"memory {task}": task_table(rows, task) for task in SHOWN_TASKS if curves(rows, task)}
    if curves(rows, "key", "full"):
        tables["memory dropped keys"] = task_table(rows, "key", "full")
    tables["memory findings"] = findings_table(
        rows, of_a_real_model, *(list(finished(file).values()) for file in (MIXTURE_RESULTS, QUALITY_RESULTS))
    )
    tables["memory real model"] = real_model_table(of_a_real_model)
    tables["memory generation"] = generation_table(read_lines(generation))
    tables["memory binding"] = binding.table(read_lines(binding_results))
    return tables


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--generation", type=Path, default=GENERATION_RESULTS)
    parser.add_argument("--real-model", type=Path, default=real_model.RESULTS)
    parser.add_argument("--binding", type=Path, default=binding.RESULTS)
    parser.add_argument("--page", type=Path, default=None, help="a page with marks like <!-- table memory key -->")
    options = parser.parse_args(arguments)
    tables = tables_of(options.results, options.generation, options.real_model, options.binding)
    show(tables, options.page, f" (chance {100 * CHANCE:.2f}%)")
    if options.page is not None:
        shown = curves(list(finished(options.results).values()), "key")
        draw_recall(shown, options.page.parent / "images" / "memory_recall.png")


if __name__ == "__main__":
    main()
