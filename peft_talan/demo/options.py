"""What the demo can be told, checked before anything is loaded."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from ..config import TalanConfig
from ..functional.parameters import MIXERS, WRITEBACKS
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


def _layers(text: str) -> str | list[int] | list[float]:
    """Read `all`, `10,-1` or `0.33,0.66`."""
    if text == "all":
        return text
    parts = [part.strip() for part in text.split(",")]
    try:
        return [float(part) for part in parts] if any("." in part for part in parts) else [int(part) for part in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give 'all', block indices like 10,-1 or fractions of the depth like 0.33,0.66"
        ) from None


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options.

    Args:
        parser: The parser of the command.
    """
    parser.add_argument("--model", help="hub id or folder of a causal LM; without it SmolLM2-135M-Instruct")
    parser.add_argument("--task", default="chain_sum", help="reasoning-gym task, where no --data is given")
    parser.add_argument("--data", help="JSONL file of prompt/completion or messages")
    parser.add_argument("--steps", type=int, default=75, help="optimizer steps an adapter")
    parser.add_argument("--batch-size", type=int, default=8, help="examples a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--rank", type=int, default=16, help="rank of the low-rank half")
    parser.add_argument("--held-out", type=int, default=100, help="held-out items")
    parser.add_argument("--seed", type=int, default=0, help="of data, initialisation and order")
    parser.add_argument("--ask", default="What is 27 + 48?", help="question for the reloaded adapter")
    parser.add_argument("--output", default="outputs/demo", help="folder for adapters, table and plot")
    axes = parser.add_argument_group("axes of the side path")
    axes.add_argument("--talan-layers", type=_layers, help="'all', indices like 10,-1 or fractions like 0.33,0.66")
    axes.add_argument("--talan-position", choices=("output", "input"))
    axes.add_argument("--talan-slots", type=int)
    axes.add_argument("--talan-dim", type=int)
    axes.add_argument("--talan-mixer", choices=MIXERS)
    axes.add_argument("--talan-writeback", choices=WRITEBACKS)
    axes.add_argument("--talan-cap", type=float)
    axes.add_argument("--talan-alpha", type=float)
    axes.add_argument("--talan-dropout", type=float)
    axes.add_argument("--talan-grad-scale", type=float)
    axes.add_argument("--talan-trainable", choices=("joint", "side_path", "writeback", "low_rank"))


def demo_options(namespace: argparse.Namespace) -> DemoOptions:
    """Check the options and read the data file.

    Args:
        namespace: The parsed options.

    Returns:
        The options.

    Raises:
        DemoError: A value or the data file can't be used.
    """
    values = vars(namespace)
    for name in ("steps", "batch_size", "rank", "held_out"):
        if values[name] < 1:
            raise DemoError(f"--{name.replace('_', '-')} {values[name]}: give a whole number of at least 1")
    if not values["learning_rate"] > 0:
        raise DemoError(f"--learning-rate {values['learning_rate']}: give a positive number such as 1e-3")
    axes = {name: value for name, value in values.items() if name.startswith("talan_") and value is not None}
    try:
        TalanConfig(**axes)
        examples = None if values["data"] is None else tuple(read_examples(values["data"]))
    except (DataError, ValueError) as error:
        raise DemoError(str(error)) from None
    return DemoOptions(
        model=values["model"],
        task=values["task"],
        examples=examples,
        steps=values["steps"],
        batch_size=values["batch_size"],
        learning_rate=values["learning_rate"],
        rank=values["rank"],
        held_out=values["held_out"],
        seed=values["seed"],
        ask=values["ask"],
        output=values["output"],
        axes=axes,
    )
