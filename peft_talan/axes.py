"""The axes of the side path as a plain dataclass: names, types, defaults, help and bounds.

It uses the standard library alone: the command line offers these options without importing torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from os import PathLike, fspath
from types import MappingProxyType
from typing import Any, Literal, get_args

Position = Literal["output", "input"]
Mixer = Literal["attention", "linear", "mlp", "delta"]
Writeback = Literal["add", "gated", "capped", "orthogonal", "relative"]
Trainable = Literal["joint", "side_path", "writeback", "low_rank"]
MemoryScope = Literal["causal", "bidirectional"]

LARGEST_COUNT = 2**20
"""No residual stream is nearly as wide, and products of two such numbers are still exact."""

SMALLEST_SOFT_CAP, LARGEST_SOFT_CAP = 1.0, 10.0
"""Below, tokens weigh nearly alike; above, sums in float32 lose those with small weights, and may overflow."""

LARGEST_FACTOR = 1e6
"""Of a perturbation or its gradient: what is far larger ends in infinities."""

RECALL_DEPTHS: tuple[float, ...] = (0.55, 0.65, 0.75, 0.85, 0.95)
"""Where `talan_layers="recall"` puts side paths, as fractions of the depth; saved adapters depend on it.

A pretrained model's attention copies from far back there, and they are few enough to cost little.
"""

RECALL_AXES: Mapping[str, str | int] = MappingProxyType(
    {"talan_layers": "recall", "talan_mixer": "delta", "talan_slots": 16, "talan_writeback": "gated"}
)
"""The axes for recall of facts from beyond a window, started by `initialize_talan_recall`."""


@dataclass
class SidePathAxes:
    """The axes of the side path; `TalanConfig` documents each."""

    talan_layers: Any = field(
        default=None,
        metadata={
            "help": "Decoder blocks with a side path: indices, fractions of the depth, 'all', 'every_4', 'recall'."
        },
    )
    talan_position: Position = field(
        default="output", metadata={"help": "At which end of the block: output or input."}
    )
    talan_slots: int = field(default=8, metadata={"help": "Number of memory slots."})
    talan_dim: int = field(default=32, metadata={"help": "Latent width."})
    talan_mixer: Mixer = field(default="attention", metadata={"help": "attention, linear, mlp or delta."})
    talan_soft_cap: float = field(
        default=5.0, metadata={"help": "Tokens weigh between exp(-this) and exp(this) in a slot."}
    )
    talan_writeback: Writeback = field(default="add", metadata={"help": "add, gated, capped, orthogonal or relative."})
    talan_cap: float = field(default=0.1, metadata={"help": "Largest |change| / |hidden state| of 'capped'."})
    talan_alpha: float = field(default=1.0, metadata={"help": "Strength of the perturbation."})
    talan_dropout: float = field(default=0.0, metadata={"help": "Dropout of the read-out."})
    talan_trainable: Trainable = field(
        default="joint", metadata={"help": "What trains: joint, side_path, writeback or low_rank."}
    )
    talan_grad_scale: float = field(default=1.0, metadata={"help": "Scale of the side path's gradient."})
    talan_memory_scope: MemoryScope = field(default="causal", metadata={"help": "causal or bidirectional."})


def refusal(name: str, value: object, remedy: str) -> ValueError:
    """The error for a field that can't be used.

    Args:
        name: The field.
        value: Its value.
        remedy: What to give instead.

    Returns:
        The error, to be raised.
    """
    return ValueError(f"{name}={value!r}: {remedy}")


def check_causal(scope: str, adapter_name: str | None = None) -> None:
    """Refuse to generate with a memory that holds later tokens.

    Args:
        scope: An adapter's memory scope.
        adapter_name: The adapter's name, if it is known. Default None.

    Raises:
        ValueError: The scope is not causal.
    """
    if scope != "causal":
        owner = "" if adapter_name is None else f" of adapter {adapter_name!r}"
        raise ValueError(
            f"talan_memory_scope={scope!r}{owner} can't generate: later tokens would change the memory of earlier "
            "ones; train an adapter with 'causal', or pass use_cache=False for features"
        )


def plain_value(value: object) -> object:
    """Turn a number or a sequence of another library into what a JSON file can hold.

    Args:
        value: A field's value: a number, array or tensor of numpy or torch, a path, or a sequence or dictionary of
            such values.

    Returns:
        A number, a string, or a list or dictionary of them; every other value as it is.
    """
    if isinstance(value, Enum):
        return plain_value(value.value)
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return value
    if hasattr(value, "tolist"):  # numpy, torch, array.array
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain_value(one) for key, one in value.items()}
    return [plain_value(one) for one in value] if isinstance(value, Sequence) else value


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise `ValueError` if a field's value is not one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise refusal(name, value, f"choose one of {', '.join(repr(choice) for choice in choices)}")


def check_number(name: str, value: object, lowest: float, highest: float, remedy: str) -> None:
    """Raise `ValueError` if a field's value is not a finite number between two others."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise refusal(name, value, remedy)
    if not math.isfinite(value) or not lowest <= value <= highest:
        raise refusal(name, value, remedy)


def check_count(name: str, value: object) -> None:
    """Raise `ValueError` if a field's value is not a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_COUNT:
        raise refusal(name, value, f"give a whole number of at least 1 and at most {LARGEST_COUNT}")


def spacing_of(layers: object) -> int | None:
    """The n of a `talan_layers` that is `"every_n"`, such as `"every_4"`.

    Args:
        layers: The field's value.

    Returns:
        The number of blocks from one side path to the next, at least 2; None: the value is something else.
    """
    found = re.fullmatch(r"every_([2-9]|[1-9][0-9]{1,4})", layers) if isinstance(layers, str) else None
    return None if found is None else int(found[1])


def is_layers_name(layers: object) -> bool:
    """Whether a `talan_layers` is one of its names: `"all"`, `"recall"` or `"every_4"`.

    Args:
        layers: The field's value.

    Returns:
        Whether it is.
    """
    return isinstance(layers, str) and (layers in ("all", "recall") or spacing_of(layers) is not None)


def _check_layers(layers: object) -> None:
    remedy = (
        "give block indices like [10, -1], fractions of the depth like [0.33, 0.66], 'all', 'every_4' (the 4th block, "
        "the 8th ...), 'recall' (five blocks in the upper half), or None for the default"
    )
    if layers is None or is_layers_name(layers):
        return
    if not isinstance(layers, list) or not layers:
        raise refusal("talan_layers", layers, remedy)
    if all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        return
    if all(isinstance(layer, float) and 0.0 <= layer <= 1.0 for layer in layers):
        return
    raise refusal("talan_layers", layers, remedy)


def check_axes(axes: SidePathAxes) -> None:
    """Check each axis by itself, whatever the model.

    Args:
        axes: The axes.

    Raises:
        ValueError: One can't be used; the message names field, value and remedy.
    """
    _check_layers(axes.talan_layers)
    check_choice("talan_position", axes.talan_position, get_args(Position))
    check_choice("talan_mixer", axes.talan_mixer, get_args(Mixer))
    check_choice("talan_writeback", axes.talan_writeback, get_args(Writeback))
    check_choice("talan_trainable", axes.talan_trainable, get_args(Trainable))
    check_choice("talan_memory_scope", axes.talan_memory_scope, get_args(MemoryScope))
    lowest, highest = SMALLEST_SOFT_CAP, LARGEST_SOFT_CAP
    remedy = f"give a number from {lowest:g} to {highest:g}, such as 5.0"
    check_number("talan_soft_cap", axes.talan_soft_cap, lowest, highest, remedy)
    if axes.talan_mixer == "delta" and axes.talan_soft_cap != SidePathAxes.talan_soft_cap:
        raise refusal(
            "talan_soft_cap",
            axes.talan_soft_cap,
            "talan_mixer='delta' has gates and no weights that a cap bounds; leave it out, or use another mixer",
        )
    if axes.talan_mixer == "delta" and axes.talan_memory_scope != "causal":
        raise refusal(
            "talan_memory_scope",
            axes.talan_memory_scope,
            "talan_mixer='delta' goes through the tokens in order, so no token sees later ones; use 'causal', or "
            "another mixer",
        )
    check_count("talan_slots", axes.talan_slots)
    check_count("talan_dim", axes.talan_dim)
    smallest = math.ulp(0.0)
    check_number("talan_cap", axes.talan_cap, smallest, math.inf, "give a positive number such as 0.1")
    factor = f"give a number of at least 0 and at most {LARGEST_FACTOR:g}, such as 1.0"
    check_number("talan_alpha", axes.talan_alpha, 0.0, LARGEST_FACTOR, factor)
    check_number("talan_dropout", axes.talan_dropout, 0.0, math.nextafter(1.0, 0.0), "give a number in [0, 1)")
    check_number("talan_grad_scale", axes.talan_grad_scale, 0.0, LARGEST_FACTOR, factor)
