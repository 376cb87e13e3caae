"""The stored lines of bench_overhead.py: found by their keys, and as the cells of tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from conditions import NAMES
from measure import interval_text
from runs import Row

NOT_MEASURED = "Not measured."
Cell = Callable[[Row], str]


def latest(lines: Iterable[Row]) -> list[Row]:
    """The last line of each measurement, in the order of their keys."""
    by_key = {json.dumps(line["key"], sort_keys=True): line for line in lines}
    order = list(NAMES)

    def place(line: Row) -> tuple[Any, ...]:
        key = line["key"]
        sizes = (key.get("batch", 0), key.get("context", 0), key.get("tokens", 0))
        return (order.index(key["model"]), key["dtype"] != "float32", key.get("group", ""), *sizes)

    return sorted(by_key.values(), key=place)


def ratio_text(line: Row, name: str) -> str:
    """A ratio with its interval."""
    ratio = line["ratios"].get(name)
    return interval_text(ratio, 3) if ratio else "-"


def milliseconds_text(line: Row, name: str) -> str:
    value = line["milliseconds"].get(name)
    return f"{value:.1f}" if value is not None else "-"


def where(line: Row) -> str:
    """Model and dtype."""
    cut = f", first {line['key']['blocks']} blocks" if "blocks" in line["key"] else ""
    adapters = f", adapters in {line['key']['adapters']}" if "adapters" in line["key"] else ""
    return f"{NAMES[line['key']['model']]}{cut}, {line['key']['dtype']}{adapters}"


def size(line: Row) -> list[str]:
    """The columns that say how large the call was."""
    key = line["key"]
    return [str(key["batch"]), str(key["context"])] if "batch" in key else [str(key["tokens"])]


def call_of(line: Row) -> str:
    return f"{line['key']['measure']} {' / '.join(size(line))}"


def matching(lines: Iterable[Row], **key: Any) -> list[Row]:
    """The lines whose keys have these values."""
    return [line for line in lines if key.items() <= line["key"].items()]
