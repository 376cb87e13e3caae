"""What programs show with: consoles, tables, bars and figures."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make_console(stderr: bool = False) -> Console:
    """A console on stdout or stderr whose lines are not broken in a pipe or a file, which have no width."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 200
    return Console(stderr=stderr, highlight=False, width=width)


def make_table(title: str, *columns: str) -> Table:
    """A table whose first column is aligned to the left, and the others to the right."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def make_figure(width: float, height: float) -> Figure:
    """An empty figure of matplotlib, in inches; nothing global is set, and no window is opened."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def progress_bars(
    totals: Mapping[Hashable, tuple[str, int]], console: Console
) -> Iterator[Callable[[Any, str, int], None]]:
    """Show a bar for each part of a long run, of which the name and the number of steps are given.

    Yields what reports on a part: called with the part, what is being done, and how many steps were.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bars = {
            key: progress.add_task(name, total=total, note="waits", start=False)
            for key, (name, total) in totals.items()
        }

        def report(key: Hashable, note: str, steps: int) -> None:
            progress.start_task(bars[key])
            progress.update(bars[key], advance=steps, note=note)

        yield report
