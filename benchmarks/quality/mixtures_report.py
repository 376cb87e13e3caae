"""Tables of the study of mixtures, from its results; a part of a study makes a part of them.

    python -m benchmarks.quality.mixtures_report                                 # prints the tables
    python -m benchmarks.quality.mixtures_report --page docs/evidence-tables.md  # puts them into the page

Intervals are Student's at 95% over the fresh seeds, paired by seed for differences.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from peft_talan.sft.intervals import Interval

from ..pages import markdown, show
from ..runs import DEVELOPMENT_SEED, Row, by_seed, finished, matching
from . import inside
from .mixtures import GROUPS, MIXTURE_RESULTS, best
from .paired import MEASURES, PAIRS, symbol
from .tasks import TASKS

INSIDE_RESULTS = MIXTURE_RESULTS.with_name("mixtures_inside.jsonl")
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


def by_backbone(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs by backbone, and mixture if it is not the tasks as they are."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        settings = row["settings"]
        place = settings["backbone"] + ("" if settings["task"] == "mixture" else f", {settings['task']}")
        found.setdefault(place, []).append(row)
    return found


def compared(rows: Sequence[Row], measures: Sequence[str]) -> Iterator[tuple[str, str, str, str, Interval, int]]:
    """Backbone, both arms, measure, difference and its seeds, where there are two seeds at least."""
    for backbone, own in by_backbone(rows).items():
        for new, old in PAIRS:
            mine, its = (by_seed(matching(own, adapter=arm)) for arm in (new, old))
            for measure in measures:
                found = [MEASURES[measure](row, its[seed]) for seed, row in mine.items() if seed in its]
                if len(found) > 1:
                    yield backbone, NAMES[new], NAMES[old], measure, Interval.of_mean(found), len(found)


def differences_table(rows: Sequence[Row]) -> str:
    lines = [
        [backbone, f"{new} against {old}", measure, symbol(found), found.text(2, sign="+"), seeds]
        for backbone, new, old, measure, found, seeds in compared(rows, list(MEASURES))
    ]
    return markdown(["backbone", "compared", "measure", None, "difference [95% interval]", "seeds"], lines)


def scores_table(rows: Sequence[Row]) -> str:
    """Every arm's mean over its seeds by task, and what it kept."""
    lines = []
    for backbone, own in by_backbone(rows).items():
        for arm in ARMS:
            found = list(by_seed(matching(own, adapter=arm)).values())
            if not found:
                continue
            first = found[0]["settings"]
            means = [sum(row["tasks"][task]["exact_match"] for row in found) / len(found) for task in TASKS]
            means.append(sum(row["known_exact_match"] for row in found) / len(found))
            shares = [Interval.of_mean([row["exact_match"] for row in found]).text(1, 100.0) + "%"]
            shares += [f"{100 * share:.1f}%" for share in means]
            perplexity = math.exp(sum(row["text_loss"] for row in found) / len(found))
            rate = "" if arm == "base" else f"{first['learning_rate']:g}"
            chosen = [rate, first["variant"] if arm.endswith("+talan") else ""]
            size = f"{found[0].get('trainable', 0):,}"
            lines.append([backbone, NAMES[arm], len(found), *chosen, size, *shares, f"{perplexity:.1f}"])
    heads = ("backbone", "arm", "seeds", "learning rate", "side path", "trainable", "mean")
    return markdown([*heads, *TASKS, "known tasks", "text perplexity"], lines)


def tries_table(rows: Sequence[Row]) -> str:
    """Every try on the development seed, and which was taken."""
    lines = []
    for backbone, own in by_backbone(rows).items():
        base = matching(own, adapter="base")[0]
        for arm in ARMS:
            tries = matching(own, adapter=arm, seed=DEVELOPMENT_SEED)
            taken = best(tries, base)["key"] if tries else ""
            for row in tries:
                settings = row["settings"]
                name = settings["variant"] if arm.endswith("+talan") else ""
                scores = f"{row['loss']:.4f}", f"{100 * row['exact_match']:.1f}%"
                kept = f"{math.exp(row['text_loss'] - base['text_loss']):.3f}"
                is_best = "yes" if row["key"] == taken else ""
                lines.append([backbone, NAMES[arm], f"{settings['learning_rate']:g}", name, *scores, kept, is_best])
    heads = ("backbone", "arm", "learning rate", "side path", "loss", "exact match")
    return markdown([*heads, "text perplexity / backbone's", "best"], lines)


def tables_of(results: Path, inside_results: Path) -> dict[str, str]:
    rows, measured = list(finished(results).values()), list(finished(inside_results).values())
    insides = [f"{backbone}:\n\n{inside.table(found)}" for backbone, found in by_backbone(measured).items()]
    return {
        "mixtures differences": differences_table(rows),
        "mixtures scores": scores_table(rows),
        "mixtures tries": tries_table(rows),
        "mixtures inside": "\n\n".join(insides),
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
