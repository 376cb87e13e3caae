"""What a merged model's `config.json` says of its side paths, and the names that their tensors have.

It uses the standard library and the axes alone: programs read it that import neither torch nor PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from ..axes import SidePathAxes

FIELD = "talan"
"""The field of a model's configuration; transformers saves and loads fields that it doesn't know."""

TRAINING_ALONE = frozenset({"talan_layers", "talan_trainable", "talan_dropout", "talan_grad_scale"})
"""The axes that a part of a base model doesn't have: its blocks have names, and what acts in training is over."""

TENSOR = re.compile(r"(?:.*\.)?(?P<block>\d+)\.merged_side_paths_\d+\.(?P<parameter>\w+)\.(?P<number>\d+)\.values")
"""Names like `model.layers.3.merged_side_paths_0.read.0.values`."""


def child_name(stage: int) -> str:
    """The name under which the side paths of one merge are a child of their block."""
    return f"merged_side_paths_{stage}"


@dataclass(frozen=True)
class MergedSidePath:
    """The side path of one merged adapter.

    Args:
        number: The number by which the names of its tensors end, unique in the model.
        stage: Which merge left it, counted from 0. Side paths of one merge add up; those of the next see their sum.
        adapter_name: The adapter's name before it was merged.
        blocks: The names of the blocks, in the model that the configuration belongs to.
        hidden_size: H, the width of the residual stream.
        talan_version: The version of this package that merged it.
        axes: The axes, by the names of `TalanConfig`'s fields.
    """

    number: int
    stage: int
    adapter_name: str
    blocks: tuple[str, ...]
    hidden_size: int
    talan_version: str
    axes: Mapping[str, Any]

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> MergedSidePath:
        """Read an entry of the field."""
        names = [part.name for part in fields(cls) if part.name != "axes"]
        missing = [name for name in names if name not in entry]
        if missing:
            raise ValueError(f"talan: the side path in config.json lacks {', '.join(missing)}; merge it again")
        known = {name: entry[name] for name in names}
        known["blocks"] = tuple(entry["blocks"])
        return cls(**known, axes={name: value for name, value in entry.items() if name not in known})

    def to_json(self) -> dict[str, Any]:
        """The entry of the field, as JSON can hold it."""
        parts = {**asdict(self), "blocks": list(self.blocks)}
        return parts | parts.pop("axes")


def axes_of_merged(axes: SidePathAxes) -> dict[str, Any]:
    """Choose the axes that a side path has as a part of a base model."""
    return {axis.name: getattr(axes, axis.name) for axis in fields(SidePathAxes) if axis.name not in TRAINING_ALONE}


def merged_side_paths(config: Mapping[str, Any]) -> list[MergedSidePath]:
    """Find the side paths that belong to a model."""
    found = [MergedSidePath.from_json(entry) for entry in config.get(FIELD) or ()]
    for part in config.values():
        if isinstance(part, Mapping):
            found += merged_side_paths(part)
    return sorted(found, key=lambda side_path: (side_path.stage, side_path.number))


def class_that_loads(config: Mapping[str, Any]) -> str:
    """The name of the class of transformers whose `from_pretrained` loads a merged model."""
    model_class = str((config.get("architectures") or ["AutoModel"])[0])
    return "AutoModelForCausalLM" if model_class.endswith("ForCausalLM") else model_class


def say_what_loads(argument: str, name: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """The refusal of a merged model that was given for an adapter; `options` may hold a subfolder and a revision."""
    place = "".join(f", {option}={options[option]!r}" for option in ("subfolder", "revision") if options.get(option))
    call = f"{class_that_loads(config)}.from_pretrained({name!r}{place})"
    return f"{argument}={name!r}: it is a merged model, not an adapter; load it, with its side path, by {call}"


class MergedTensor(NamedTuple):
    """Which tensor a name means.

    Args:
        number: The `number` of its side path.
        block_index: The index of its block.
        parameter: The name of the operators' parameter, such as `read`.
    """

    number: int
    block_index: int
    parameter: str


def merged_tensor(name: str) -> MergedTensor | None:
    """Read a tensor's name."""
    found = TENSOR.fullmatch(name)
    return None if found is None else MergedTensor(int(found["number"]), int(found["block"]), found["parameter"])
