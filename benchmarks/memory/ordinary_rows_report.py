"""The tables of the runs of `ordinary_rows`, in the pages that have places for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..pages import columns_table, show
from ..runs import Row

LOSS_STEPS = (10, 30, 60, 100, 150, 200)
"""Where the loss is shown; the command logs every tenth step the mean of the last ten."""


def start_of(settings: dict[str, Any]) -> str:
    """What the side paths started from, in words."""
    if settings["arm"] != "TALAN":
        return "none"
    older = "data" if settings.get("from_data") else "random"
    return {"memory": "a memory", "data": "the data", "random": "random"}[settings.get("start", older)]


def layers_of(row: Row) -> str:
    """The blocks with side paths."""
    settings = row["settings"]
    if settings["arm"] != "TALAN":
        return "none"
    # Of runs that didn't store them.
    former = "5 blocks" if "start" in settings else "all"
    axes = row.get("axes") or {"talan_layers": former, **(settings["axes"] or {})}
    layers = axes["talan_layers"]
    return layers if isinstance(layers, str) else f"{len(layers)} blocks"


def of_settings(name: str) -> Callable[[Row], Any]:
    """A column of a setting."""
    return lambda row: row["settings"][name]


def weight_of(row: Row) -> str:
    """The weight of the prompts' tokens in the loss."""
    return f"{row['settings'].get('prompt_loss_weight', 0):g}"


def scores() -> dict[str, Callable[[Row], Any]]:
    """The columns of what was measured after the training."""

    def right_at(windows: int) -> Callable[[Row], str]:
        """Empty where no rows of that length were scored, as conversations don't fit into a window of 32 tokens."""
        return lambda row: (
            f"{row['right'][str(windows)]} of {row['settings']['rows']}" if str(windows) in row["right"] else ""
        )

    return {
        **{f"{windows} window{'s' if windows > 1 else ''}": right_at(windows) for windows in (1, 2, 4, 10)},
        "plain text, nats a token": lambda row: f"{row['text_loss']:.1f}",
    }


def table(rows: Sequence[Row]) -> str:
    """All runs, with what differs between them, the right answers by length, and the loss on plain text."""
    return columns_table(
        {
            "facts": of_settings("facts"),
            "rows": of_settings("form"),
            "arm": of_settings("arm"),
            "side paths in": layers_of,
            "start": lambda row: start_of(row["settings"]),
            "weight of prompts": weight_of,
            "trained by": lambda row: "the command" if row["settings"]["by_command"] else "its parts",
            "steps": of_settings("steps"),
            "seed": of_settings("seed"),
            **scores(),
        },
        rows,
    )


def by_the_command(rows: Sequence[Row]) -> list[Row]:
    """The runs of 200 steps of the command with its axes on mixed facts, those with prompts in the loss first."""
    told = {"facts": "mixed", "arm": "TALAN", "start": "memory", "axes": None, "steps": 200, "bf16": True}
    told |= {"by_command": True}
    found = [row for row in rows if told.items() <= row["settings"].items()]
    return sorted(
        found, key=lambda row: (weight_of(row) == "0", row["settings"]["form"] == "messages", row["settings"]["seed"])
    )


def recall_table(rows: Sequence[Row]) -> str:
    """What a user gets by length."""
    settings = {"weight of prompts": weight_of, "rows": of_settings("form"), "seed": of_settings("seed")}
    minutes = {"minutes": lambda row: round(row["seconds"] / 60)}
    return columns_table({**settings, **scores(), **minutes}, by_the_command(rows))


def loss_table(rows: Sequence[Row]) -> str:
    """The loss by step, means of ten; of runs that stored it that of the answers alone, too."""

    def mean_at(step: int) -> Callable[[tuple[Row, str, list[float]]], str]:
        return lambda curve: f"{sum(curve[2][step - 10 : step]) / 10:.2f}"

    curves = []
    for row in by_the_command(rows):
        if weight_of(row) == "0":
            curves.append((row, "answers", row["losses"]))
            continue
        if row.get("completion_losses"):
            curves.append((row, "answers", row["completion_losses"]))
        curves.append((row, f"answers + {weight_of(row)} prompts", row["losses"]))
    return columns_table(
        {
            "weight of prompts": lambda curve: weight_of(curve[0]),
            "rows": lambda curve: curve[0]["settings"]["form"],
            "seed": lambda curve: curve[0]["settings"]["seed"],
            "loss of": lambda curve: curve[1],
            **{f"step {step}": mean_at(step) for step in LOSS_STEPS},
        },
        curves,
    )


def fill(page: Path, rows: Sequence[Row]) -> None:
    """Put the tables into a page that it has a place for."""
    tables = {
        "memory ordinary rows": table,
        "memory ordinary rows by the command": recall_table,
        "memory ordinary rows loss": loss_table,
    }
    text = page.read_text(encoding="utf-8")
    placed = {name: make(rows) for name, make in tables.items() if f"<!-- table {name} -->" in text}
    if not placed:
        raise ValueError(f"page={page}: it has no place for a table; give it <!-- table NAME --> of {list(tables)}")
    show(placed, page)
