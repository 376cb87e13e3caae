"""The table of docs/how-to/serve.md shows the stored results and nothing else."""

from __future__ import annotations

from benchmarks.serving.table import PAGE_WITH_TABLE, RESULTS, filled, table


def test_the_table_is_that_of_the_stored_results() -> None:
    page = PAGE_WITH_TABLE.read_text(encoding="utf-8")
    assert page == filled(page, table(RESULTS)), "python -m benchmarks.serving --table"
