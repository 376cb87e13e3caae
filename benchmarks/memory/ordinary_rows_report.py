"""The tables of the runs of `ordinary_rows`, in the pages that have places for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft_talan.axes import RECALL_AXES

from ..pages import columns_table, show
from ..runs import Row

LOSS_STEPS = (10, 30, 60, 100, 150, 200, 300, 400)
"""Where the loss is shown; the command logs every tenth step the mean of the last ten."""


def start_of(settings: dict[str, Any]) -> str:
    """What the side paths started from, in words."""
    if settings["arm"] != "TALAN":
        return "none"
    older = "data" if settings.get("from_data") else "random"
    return {"memory": "a memory", "data": "the data", "random": "random"}[settings.get("start", older)]


def axis_of(row: Row, name: str, former: str) -> Any:
    """An axis of the side paths; of runs that didn't store it, the former default."""
    settings = row["settings"]
    if settings["arm"] != "TALAN":
        return "none"
    return (row.get("axes") or {name: former, **(settings["axes"] or {})})[name]


def layers_of(row: Row) -> str:
    """The blocks with side paths."""
    layers = axis_of(row, "talan_layers", "5 blocks" if "start" in row["settings"] else "all")
    return layers if isinstance(layers, str) else f"{len(layers)} blocks"


def mixer_of(row: Row) -> str:
    """The mixer of the side paths."""
    return str(axis_of(row, "talan_mixer", "linear" if row["settings"].get("start") == "memory" else "attention"))


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
            "mixer": mixer_of,
            "start": lambda row: start_of(row["settings"]),
            "weight of prompts": weight_of,
            "trained by": lambda row: "the command" if row["settings"]["by_command"] else "its parts",
            "steps": of_settings("steps"),
            "seed": of_settings("seed"),
            **scores(),
        },
        rows,
    )


WHICH = {"facts": of_settings("facts"), "rows": of_settings("form"), "seed": of_settings("seed")}
"""The columns that tell apart the runs of the command."""


def by_the_command(rows: Sequence[Row]) -> list[Row]:
    """The runs of the command with the axes and the loss that it has, of one fact a row first."""
    told = {"arm": "TALAN", "start": "memory", "axes": dict(RECALL_AXES), "bf16": True, "by_command": True}
    told["prompt_loss_weight"] = 0.2
    found = [row for row in rows if told.items() <= row["settings"].items()]
    order = {name: [row["settings"][name] for row in found] for name in ("facts", "form")}
    return sorted(
        found,
        key=lambda row: (*(order[name].index(row["settings"][name]) for name in order), row["settings"]["seed"]),
    )


def recall_table(rows: Sequence[Row]) -> str:
    """What a user gets by length."""
    steps = {"steps": of_settings("steps")}
    minutes = {"minutes": lambda row: round(row["seconds"] / 60)}
    return columns_table({**WHICH, **steps, **scores(), **minutes}, by_the_command(rows))


def loss_table(rows: Sequence[Row]) -> str:
    """The loss of the answers by step, means of ten."""

    def mean_at(step: int) -> Callable[[Row], str]:
        def shown(row: Row) -> str:
            losses = row["completion_losses"]
            return f"{sum(losses[step - 10 : step]) / 10:.2f}" if step <= len(losses) else ""

        return shown

    return columns_table({**WHICH, **{f"step {step}": mean_at(step) for step in LOSS_STEPS}}, by_the_command(rows))


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
