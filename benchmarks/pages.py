"""The tables of the documentation's pages: as Markdown, and between their marks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def markdown(header: Sequence[str | None], rows: Iterable[Sequence[Any]], rule: str = "---") -> str:
    """A table; of a cell that is None, only its border is written. `rule`: of all columns but the first."""

    def line(cells: Sequence[Any]) -> str:
        return "|" + "".join(" |" if cell is None else f" {cell} |" for cell in cells)

    return "\n".join([line(header), "|---|" + f"{rule}|" * (len(header) - 1), *map(line, rows)])


def columns_table(columns: dict[str, Callable[[Any], Any]], items: Iterable[Any]) -> str:
    """A table with a row for each item; each column is a head and the function that makes a cell of an item."""
    return markdown(list(columns), [[cell(item) for cell in columns.values()] for item in items])


def filled(page: str, tables: dict[str, str]) -> str:
    """The page with each table between `<!-- table NAME -->` and `<!-- end -->`; refused unless it has one place."""
    for name, table in tables.items():
        marked = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = marked.subn(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", page)
        if count != 1:
            raise ValueError(f"the page has {count} places for the table {name!r}; give it one: <!-- table {name} -->")
    return page


def show(tables: dict[str, str], page: Path | None = None, note: str = "") -> None:
    """Put the tables into a page, or print each under its name and the note."""
    if page is not None:
        page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
        return
    for name, table in tables.items():
        print(f"\n{name}{note}\n\n{table}")
