"""The tables of docs/how-to/serve.md show the stored results and nothing else."""

from __future__ import annotations

from benchmarks.pages import filled
from benchmarks.serving.table import PAGE_WITH_TABLE, RESULTS, tables


def test_the_tables_are_those_of_the_stored_results() -> None:
    page = PAGE_WITH_TABLE.read_text(encoding="utf-8")
    assert page == filled(page, tables(RESULTS)), "python -m benchmarks.serving --table"
