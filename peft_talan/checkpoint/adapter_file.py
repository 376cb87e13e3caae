"""What an adapter's files say, read without torch: the low-rank options, and the tensors' shapes and dtypes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from os import PathLike
from typing import NamedTuple

from safetensors import safe_open

LOW_RANK_FIELDS: tuple[str, ...] = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_dora",
    "use_rslora",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "modules_to_save",
)
"""The fields of an adapter's configuration that are shown of its LoRA weights."""


class TensorHead(NamedTuple):
    """A tensor of a file, without its values.

    Args:
        shape: Its shape.
        dtype: Its dtype by the name that safetensors has for it, such as `"BF16"`.
    """

    shape: tuple[int, ...]
    dtype: str

    def is_floating_point(self) -> bool:
        """Whether its elements are floating-point numbers, as torch's tensors answer."""
        return self.dtype.startswith(("F", "BF"))

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of its bytes."""
        bits = int(re.sub(r"\D", "", self.dtype.partition("_")[0]) or 8)
        return self.numel * bits // 8


def read_heads(file: str | PathLike[str]) -> dict[str, TensorHead]:
    """Read the head of a safetensors file."""
    with safe_open(file, framework="numpy") as opened:
        return heads_of(opened, opened.keys())


def heads_of(opened: safe_open, names: Iterable[str]) -> dict[str, TensorHead]:
    """Read the heads of some tensors of an open file."""
    slices = ((name, opened.get_slice(name)) for name in names)
    return {name: TensorHead(tuple(part.get_shape()), part.get_dtype()) for name, part in slices}
