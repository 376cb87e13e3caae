"""What the load test stores, as numbers and as a table of the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from ..pages import markdown
from ..runs import Row, read_lines

RESULTS = Path(__file__).parents[1] / "results" / "serving.jsonl"
PAGE_WITH_TABLE = Path(__file__).parents[2] / "docs" / "how-to" / "serve.md"
OF_ADAPTERS = ", adapters"
"""How the names of servers end that have adapters by request."""
ROWS = {
    "talan": "four TALAN adapters and four LoRA adapters",
    "lora": "eight LoRA adapters",
    "lora again": "eight LoRA adapters, once more (the control)",
}
"""What servers of adapters serve."""
FEWEST_TURNS = 3
"""Fewer say nothing about speed."""


def ratios(rows: Sequence[Row], name: str, field: str) -> dict[str, float]:
    """How a server compares with plain LoRA's, turn by turn: the median, and the two quartiles."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["served"], []).append(row[field])
    each = [a / b for a, b in zip(values[name], values["lora"], strict=True)]
    if field == "processor_seconds_per_token":
        each = [1 / value for value in each]
    low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def tables(out: Path) -> dict[str, str]:
    """The stored rows as the tables of the documentation, by their names on its page."""
    rows = read_lines(out)
    by_request = [row for row in rows if row["server"].endswith(OF_ADAPTERS)]
    return {"adapters": _adapters(by_request), "load": _merged([row for row in rows if row not in by_request])}


def _adapters(rows: Sequence[Row]) -> str:
    """What was measured of adapters by request."""

    def shown(row: Row, field: str) -> str:
        return "1" if row["served"] == "lora" else "{median:.3f} ({low:.3f} to {high:.3f})".format(**row[field])

    lines = []
    for name, what in ROWS.items():
        for row in [row for row in rows if row["served"] == name and "turns" in row]:
            equal = f"{row['requests'] - row['wrong']} of {row['requests']}"
            lines.append([what, equal, row["lost"], shown(row, "speed"), shown(row, "processor time")])
    return markdown(["adapters", "answers equal", "lost", "speed", "by processor time"], lines, "--:")


def _merged(rows: Sequence[Row]) -> str:
    """What was measured of merged folders."""

    def shown(row: Row, field: str) -> str:
        if row["turns"] < FEWEST_TURNS:
            return "not measured"
        return "{median:.3f} ({low:.3f} to {high:.3f})".format(**row[field])

    lines = []
    for row in rows:
        if row["served"] != "talan" or "speed" not in row:
            continue
        cell = {"server": row["server"], "clients": row["clients"]}
        plain, control = (
            next(other for other in rows if other.items() >= {**cell, "served": name}.items())
            for name in ("lora", "lora again")
        )
        of_both = row["tokens_per_second"] / statistics.mean(one["tokens_per_second"] for one in (plain, control))
        speed, time = ([shown(one, field) for one in (row, control)] for field in ("speed", "processor time"))
        equal = f"{row['requests'] - row['wrong']} of {row['requests']}"
        ratio = f"{of_both:.3f}" if row["turns"] >= FEWEST_TURNS else "not measured"
        lines.append([*cell.values(), equal, row["lost"], *speed, ratio, *time])
    heads = ("server", "clients", "answers equal", "lost", "speed", "control", "of both", "by processor time")
    return markdown([*heads, "control"], lines, "--:")
