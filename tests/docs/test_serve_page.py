"""The table of docs/how-to/serve.md shows the stored results and nothing else."""

from __future__ import annotations

from benchmarks.pages import filled
from benchmarks.serving.table import NAME, PAGE_WITH_TABLE, RESULTS, table


def test_the_table_is_that_of_the_stored_results() -> None:
    page = PAGE_WITH_TABLE.read_text(encoding="utf-8")
    assert page == filled(page, {NAME: table(RESULTS)}), "python -m benchmarks.serving --table"
