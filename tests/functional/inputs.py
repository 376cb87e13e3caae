"""Random inputs of the operators, in float64 unless told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_talan.functional import reference
from peft_talan.functional.parameters import (
    DELTA_GATES,
    MEMORY_SCOPES,
    MIXERS,
    SidePathOptions,
    SidePathParameters,
    read_sizes,
)

BATCH, HIDDEN_SIZE, SLOTS, WIDTH, MIXER_HIDDEN = 2, 7, 3, 4, 5

MIXERS_AND_SCOPES = [
    (mixer, scope) for mixer in MIXERS for scope in MEMORY_SCOPES if (mixer, scope) != ("delta", "bidirectional")
]

ROUNDINGS = 4096
"""Sums of some thousand terms: so many rounding errors of the largest number in the tensor may add up."""


def assert_equal_up_to_rounding(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare to the rounding error of the largest number, since terms of that size may have cancelled."""
    scale = max(1.0, float(expected.detach().abs().max()))
    tolerance = ROUNDINGS * torch.finfo(expected.dtype).eps * scale
    torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance)


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                # An expanded view has many elements and little memory.
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def mixer_tensors(mixer: str, slots: int = SLOTS, width: int = WIDTH) -> tuple[torch.Tensor, ...]:
    shapes: dict[str, list[tuple[int, ...]]] = {
        "attention": [(slots,)],
        "linear": [(width, slots)],
        "mlp": [(slots,), (MIXER_HIDDEN, slots), (slots, MIXER_HIDDEN), (MIXER_HIDDEN, width), (width, MIXER_HIDDEN)],
        "delta": [(DELTA_GATES,)],
    }
    assert set(shapes) == set(MIXERS)
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes[mixer])


def remix_inputs(mixer: str, batch: int, tokens: int, slots: int = SLOTS, width: int = WIDTH) -> list[torch.Tensor]:
    """z, q, and what tokens of which some are padding enter by."""
    shapes = [(batch, tokens, channels) for channels in read_sizes(mixer, slots, width)]
    values, queries, logits = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [
        values,
        queries,
        reference.enter(logits, padding(batch, tokens), SidePathOptions(mixer), mixer_tensors(mixer)),
    ]


def side_path_tensors(mixer: str, writeback: str, dtype: torch.dtype = torch.float64) -> SidePathParameters:
    return SidePathParameters(
        read=torch.randn(sum(read_sizes(mixer, SLOTS, WIDTH)), HIDDEN_SIZE, dtype=dtype),
        mixer=tuple(tensor.to(dtype) for tensor in mixer_tensors(mixer)),
        write=torch.randn(HIDDEN_SIZE, WIDTH, dtype=dtype),
        gate=torch.randn(HIDDEN_SIZE + 1, dtype=dtype) if writeback == "gated" else None,
    )


def memory(batch: int = BATCH, mixer: str = "attention") -> torch.Tensor:
    """A memory that tokens could have left: positive denominators, which that of `delta` does not have."""
    if mixer == "delta":
        return torch.randn(batch, SLOTS, WIDTH, dtype=torch.float64)
    state = torch.randn(batch, SLOTS, WIDTH + 1, dtype=torch.float64)
    state[..., -1] = state[..., -1].abs() + 0.5
    return state


def segments(batch: int, tokens: int) -> torch.Tensor:
    """Segments of random lengths, the first token being of segment 0, some borders inside and some at chunks' ends."""
    borders = torch.rand(batch, tokens) < 0.06
    borders[:, 0] = False
    borders[0, 32::64] = True
    return borders.long().cumsum(1)


def padding(batch: int, tokens: int) -> torch.Tensor:
    """Leading padding of a different length in each sequence."""
    return torch.arange(tokens) >= (torch.arange(batch).unsqueeze(1) * tokens) // 3


def layout(kind: str, batch: int, tokens: int, mixer: str = "attention") -> dict[str, Any]:
    """The keyword arguments of `side_path` for one kind of batch."""
    return {
        "plain": {},
        "padded": {"valid": padding(batch, tokens)},
        "segments": {"segment_ids": segments(batch, tokens)},
        "state": {"state": memory(batch, mixer)},
        "all": {
            "valid": padding(batch, tokens),
            "segment_ids": segments(batch, tokens),
            "state": memory(batch, mixer),
        },
    }[kind]
