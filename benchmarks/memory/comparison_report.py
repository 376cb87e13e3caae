"""Tables and the picture of the comparison.

    python -m benchmarks.memory.comparison_report                          # prints the tables
    python -m benchmarks.memory.comparison_report --page docs/evidence.md  # into the page, and the picture beside it

What was not measured is left empty. Adapters that were trained alike are seeds of one arm. A report is about one
model in one precision, with one window, and as many rows in every cell; all other cells are left out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peft_talan.demo.recall_run import MARKERS
from peft_talan.sft.display import make_figure
from peft_talan.sft.intervals import Interval

from ..pages import markdown, show
from ..runs import Row, by_seed, finished, matching
from .comparison import PLAIN_TEXT, RESULTS, TEXT_WINDOWS
from .recall_tasks import BABI, FACTS, ORDINARY, ORDINARY_LATER, RULER
from .report import share_of

DRAWN_TOKENS, DRAWN = 320, (ORDINARY, "1 fact", "4 facts", "8 facts")
MODEL, WINDOW, ROWS, DTYPE = "SmolLM2-135M-Instruct", 32, 32, "bfloat16"
MEGABYTE = 2**20
TRAINED = "*"
"""Marks the cells of the tasks that an adapter was trained on."""

Arms = dict[str, list[Row]]


def by_arm(rows: Iterable[Row]) -> Arms:
    """The cells of each arm, in the order in which they were measured; an adapter's name has its training."""
    found: Arms = {}
    for row in rows:
        settings = row["settings"]
        name = ", ".join(filter(None, (settings["arm"], settings["training"])))
        found.setdefault(name, []).append(row)
    return found


def comparable(
    rows: Iterable[Row], model: str = MODEL, window: int = WINDOW, rows_a_cell: int = ROWS, dtype: str = DTYPE
) -> list[Row]:
    """The cells that a report is about; plain text is read with several windows, and has no rows."""

    def belongs(settings: dict[str, Any]) -> bool:
        return settings["task"] == PLAIN_TEXT or (settings["window"], settings["rows"]) == (window, rows_a_cell)

    return [row for row in matching(rows, model=model, dtype=dtype) if belongs(row["settings"])]


def cells_of(rows: Iterable[Row], task: str, tokens: int) -> list[Row]:
    """The cells of an arm's seeds."""
    return list(by_seed(matching(rows, task=task, tokens=tokens)).values())


def right(cells: Sequence[Row]) -> Interval:
    """The share of right answers in some seeds' cells."""
    rows = cells[0]["settings"]["rows"]
    return share_of([cell["right"] / rows for cell in cells], rows)


def state(cells: Sequence[Row]) -> str:
    """Keys that a token sees, and the megabytes of the cache."""
    seen, size = cells[0]["keys_seen"], sum(cells[0]["bytes_a_row"].values())
    return f"{'all' if seen is None else seen} | {size / MEGABYTE:.2f}"


def recall_table(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Right answers by length, arm and task."""
    lines: list[list[Any]] = []
    lengths = sorted({row["settings"]["tokens"] for row in rows if row["settings"]["task"] in tasks})
    for tokens in lengths:
        for name, of_arm in by_arm(rows).items():
            found = {task: cells_of(of_arm, task, tokens) for task in tasks}
            measured = {task: cells for task, cells in found.items() if cells}
            if not measured:
                continue
            line = [f"{tokens:,}", name, state(next(iter(measured.values())))]
            for task in tasks:
                cells = measured.get(task)
                mark = TRAINED if cells and task in cells[0]["settings"]["trained_on"] else ""
                line.append(f"{right(cells).text(0, 100.0)}%{mark}" if cells else "")
            lines.append(line)
    return markdown(["tokens", "arm", "keys seen", "state, MiB", *tasks], lines)


def text_table(rows: Sequence[Row]) -> str:
    """The perplexity of plain text by window, and the megabytes of the cache."""
    lines = []
    texts = [row for row in rows if row["settings"]["task"] == PLAIN_TEXT]
    for name, of_arm in by_arm(texts).items():
        line: list[Any] = [name]
        for window in TEXT_WINDOWS:
            # Full attention has no window: what was measured once holds for all.
            cells = list(by_seed(row for row in of_arm if row["keys_seen"] in (None, window)).values())
            if cells:
                loss = sum(cell["text_loss"] for cell in cells) / len(cells)
                size = sum(cells[0]["bytes_a_row"].values()) / MEGABYTE
                line.append(f"{math.exp(loss):.1f}, {size:.2f} MiB")
            else:
                line.append("")
        lines.append(line)
    return markdown(["arm", *(f"window {window}" for window in TEXT_WINDOWS)], lines)


def tables_of(rows: Sequence[Row]) -> dict[str, str]:
    """Every table by its name on the page."""
    return {
        "memory comparison facts": recall_table(rows, [*FACTS, ORDINARY, ORDINARY_LATER]),
        "memory comparison tasks": recall_table(rows, [*RULER, *BABI]),
        "memory comparison text": text_table(rows),
    }


def draw_facts(rows: Sequence[Row], file: Path) -> None:
    """Draw right answers over the bytes of state, a panel for each number of facts."""
    figure = make_figure(9, 4)
    panels = figure.subplots(1, len(DRAWN), sharey=True, sharex=True)
    arms = by_arm(
        row for row in rows if row["settings"]["task"] in DRAWN and row["settings"]["tokens"] == DRAWN_TOKENS
    )
    for panel, task in zip(panels, DRAWN, strict=True):
        trained = False
        for number, (name, of_arm) in enumerate(arms.items()):
            cells = cells_of(of_arm, task, DRAWN_TOKENS)
            if not cells:
                continue
            trained = trained or task in cells[0]["settings"]["trained_on"]
            share, size = right(cells), sum(cells[0]["bytes_a_row"].values()) / MEGABYTE
            reach = [[100 * (share.mean - share.low)], [100 * (share.high - share.mean)]]
            marker, seen = MARKERS[number % len(MARKERS)], cells[0]["keys_seen"]
            label = f"{name}: {size:.2f} MiB" + (f", {seen} keys" if seen else "")
            panel.errorbar([size], [100 * share.mean], reach, fmt=marker, capsize=3, color=f"C{number}", label=label)
        panel.set_title(f"{task} (trained)" if trained else task)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("state of a text, MiB")
        panel.set_ylim(-4, 104)
        panel.xaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("right answers, %")
    labelled = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=None, help="a page with marks like <!-- table NAME -->")
    parser.add_argument("--model", default=MODEL, help="the model's name in the results")
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument("--rows", type=int, default=ROWS, help="held-out rows of each cell")
    parser.add_argument("--dtype", default=DTYPE)
    options = parser.parse_args(arguments)
    stored = finished(options.results).values()
    rows = comparable(stored, options.model, options.window, options.rows, options.dtype)
    show(tables_of(rows), options.page)
    if options.page is not None:
        draw_facts(rows, options.page.parent / "images" / "memory_comparison.png")


if __name__ == "__main__":
    main()
