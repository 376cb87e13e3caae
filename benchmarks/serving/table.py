"""What the load test stores, as numbers and as a table of the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from ..measure import interval_text, ratio_of
from ..pages import markdown
from ..runs import Row, read_lines
from .clients import COUNTED, MEASURED

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
LORA = ("lora", "lora again")
QUARTILES = dict(zip(MEASURED, ("speed", "processor time"), strict=True))
"""Where runs that were stored without their turns have the ratios to plain LoRA's."""
FEWEST_TURNS = 3
"""Fewer say nothing about speed."""


def ratio_text(row: Row, plain: Row, field: str) -> str:
    """A server beside plain LoRA's, turn by turn: the median, and its 95% interval or older runs' quartiles."""
    if row["turns"] < FEWEST_TURNS:
        return "not measured"
    if "by turn" not in row:
        return "{median:.3f} ({low:.3f} to {high:.3f})".format(**row[QUARTILES[field]])
    own, other = (one["by turn"][field] for one in (row, plain))
    # Of tokens more are better, of time less is.
    pair = (own, other) if field == "tokens_per_second" else (other, own)
    return interval_text(ratio_of(*pair), 3)


def tables(out: Path) -> dict[str, str]:
    """The stored rows as the tables of the documentation, by their names on its page."""
    rows = read_lines(out)
    by_request = [row for row in rows if row["server"].endswith(OF_ADAPTERS)]
    return {"adapters": _adapters(by_request), "load": _merged([row for row in rows if row not in by_request])}


def _adapters(rows: Sequence[Row]) -> str:
    """What was measured of adapters by request, in all starts of the servers."""
    starts = {name: [row for row in rows if row["served"] == name and "by turn" in row] for name in ROWS}
    found: dict[str, Row] = {}
    for name, of_name in starts.items():
        sums = {field: sum(row[field] for row in of_name) for field in COUNTED}
        by_turn = {field: [value for row in of_name for value in row["by turn"][field]] for field in MEASURED}
        found[name] = {**sums, "turns": sum(row["turns"] for row in of_name), "by turn": by_turn}
    # Two equal servers together are a better measure than either.
    pairs = {field: zip(*(found[name]["by turn"][field] for name in LORA), strict=True) for field in MEASURED}
    both = {"by turn": {field: [statistics.mean(pair) for pair in of_field] for field, of_field in pairs.items()}}
    lines = []
    for name, row in found.items():
        beside = found["lora"] if name in LORA else both
        ratios = ["1" if row is beside else ratio_text(row, beside, field) for field in MEASURED]
        lines.append([ROWS[name], f"{row['requests'] - row['wrong']} of {row['requests']}", row["lost"], *ratios])
    return markdown(["adapters", "answers equal", "lost", "speed", "by processor time"], lines, "--:")


def _merged(rows: Sequence[Row]) -> str:
    """What was measured of merged folders."""
    lines = []
    for row in rows:
        if row["served"] != "talan" or "turns" not in row:
            continue
        cell = {"server": row["server"], "clients": row["clients"]}
        plain, control = (
            next(other for other in rows if other.items() >= {**cell, "served": name}.items())
            for name in ("lora", "lora again")
        )
        of_both = row["tokens_per_second"] / statistics.mean(one["tokens_per_second"] for one in (plain, control))
        speed, time = ([ratio_text(one, plain, field) for one in (row, control)] for field in MEASURED)
        equal = f"{row['requests'] - row['wrong']} of {row['requests']}"
        ratio = f"{of_both:.3f}" if row["turns"] >= FEWEST_TURNS else "not measured"
        lines.append([*cell.values(), equal, row["lost"], *speed, ratio, *time])
    heads = ("server", "clients", "answers equal", "lost", "speed", "control", "of both", "by processor time")
    return markdown([*heads, "control"], lines, "--:")
