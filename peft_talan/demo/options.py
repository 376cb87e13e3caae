"""What the demo can be told, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..config import TalanConfig
from .data import DataError, Example, read_examples


class DemoError(Exception):
    """The demo can't be run as it was asked for; the message is one line."""


@dataclass(frozen=True)
class DemoOptions:
    """One run of the demo.

    Args:
        model: A hub id or a folder; None: SmolLM2-135M-Instruct from its package.
        task: The reasoning-gym task, where no data file is given.
        examples: The data file's examples, or None.
        steps: Optimizer steps an adapter.
        batch_size: Examples a step.
        learning_rate: The highest learning rate.
        rank: The rank of the low-rank half.
        held_out: The number of held-out items.
        seed: Of data, initialisation and order.
        ask: The question that the reloaded adapter answers.
        output: The folder for adapters, table and plot.
        axes: The side path's axes, fields of `TalanConfig`.
    """

    model: str | None
    task: str
    examples: tuple[Example, ...] | None
    steps: int
    batch_size: int
    learning_rate: float
    rank: int
    held_out: int
    seed: int
    ask: str
    output: str
    axes: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The options as JSON can hold them."""
        return asdict(self)


def demo_options(data: str | None, axes: dict[str, Any], **values: Any) -> DemoOptions:
    """Check the options and read the data file.

    Args:
        data: The data file, or None for the task.
        axes: Fields of `TalanConfig`.
        **values: The other fields of `DemoOptions`.

    Returns:
        The options.

    Raises:
        DemoError: A value or the data file can't be used.
    """
    for name in ("steps", "batch_size", "rank", "held_out"):
        if values[name] < 1:
            raise DemoError(f"--{name.replace('_', '-')} {values[name]}: give a whole number of at least 1")
    if not values["learning_rate"] > 0:
        raise DemoError(f"--learning-rate {values['learning_rate']}: give a positive number such as 1e-3")
    try:
        TalanConfig(**axes)
        examples = None if data is None else tuple(read_examples(data))
    except (DataError, ValueError) as error:
        raise DemoError(str(error)) from None
    return DemoOptions(examples=examples, axes=axes, **values)
