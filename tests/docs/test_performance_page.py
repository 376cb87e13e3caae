"""docs/performance.md shows the stored results and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_stored_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_gpu
    import report_overhead

    page = report_overhead.PAGE.read_text()
    tables = report_overhead.all_tables(ROOT / "benchmarks" / "results" / "overhead.jsonl")
    assert page == report_overhead.filled(page, tables), "python benchmarks/bench_overhead.py --report"
    assert page == report_overhead.filled(page, bench_gpu.page_tables()), "python benchmarks/bench_gpu.py --report"
