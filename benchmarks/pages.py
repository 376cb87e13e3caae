"""The tables of the documentation's pages, between their marks."""

from __future__ import annotations

import re


def filled(page: str, tables: dict[str, str]) -> str:
    """The page with each table between `<!-- table NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: The page has no place, or several, for a table.
    """
    for name, table in tables.items():
        marked = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = marked.subn(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", page)
        if count != 1:
            raise ValueError(f"the page has {count} places for the table {name!r}; give it one: <!-- table {name} -->")
    return page
