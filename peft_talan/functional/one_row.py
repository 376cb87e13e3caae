"""One decoded token of a single row: the side path in vectors, its memory updated in place.

This is `fused.side_path` for hidden states [1, 1, hidden_size], in as few operations as there are: their number is
what bounds decoding on an accelerator.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .fused import read_mean, write_back
from .parameters import (
    NORM_EPSILON,
    SMALLEST_DENOMINATOR,
    SOFT_CAP,
    SidePathOptions,
    SidePathParameters,
)


class RowMemory:
    """The memory of one row, and what reading it token by token needs, made once and not at every token.

    Args:
        state: N and D, [1, slots, width + 1], at least float32; it is updated in place.
        dtype: In which the memory is read.
    """

    def __init__(self, state: torch.Tensor, dtype: torch.dtype) -> None:
        slots, width = state.shape[1], state.shape[2] - 1
        self.state, self.dtype = state, dtype
        self.total, self.denominator = state[0, :, :width], state[0, :, width:]
        self.denominator_line = state[0, :, width]
        self.mean = state.new_empty((slots, width), dtype=dtype)
        self.mean_transposed = self.mean.T
        self.pieces = (width, width, slots)
        self.query_scale = 1 / math.sqrt(width)


class RowOutput(NamedTuple):
    """What one token gives.

    Args:
        hidden_states: h', [1, 1, hidden_size].
        weights: e, [slots].
        values: z, [width].
    """

    hidden_states: torch.Tensor
    weights: torch.Tensor
    values: torch.Tensor


def one_row(
    hidden_states: torch.Tensor,
    parameters: SidePathParameters,
    options: SidePathOptions,
    memory: RowMemory,
    *,
    alpha: float = 1.0,
    valid: torch.Tensor | None = None,
) -> RowOutput:
    """Run a side path for one token, where gradients are off; see `reference.side_path`.

    Args:
        hidden_states: h, [1, 1, hidden_size].
        parameters: The side path's tensors.
        options: The side path's axes; the scope must be causal.
        memory: The memory, which takes the token in.
        alpha: The strength of the perturbation. Default 1.
        valid: [1, 1], bool; None: the token is no padding.

    Returns:
        h' and what the token put into the memory.
    """
    dtype = memory.dtype
    read, write = parameters.read, parameters.write
    stream = hidden_states if hidden_states.dtype is dtype else hidden_states.to(dtype)
    row = stream.view(-1)
    # One kernel on accelerators, where `fused.read` would take five; of a single token it makes no copy that matters.
    normalised = F.rms_norm(row, row.shape, eps=NORM_EPSILON)
    projected = torch.mv(read if read.dtype is dtype else read.to(dtype), normalised)
    values, queries, logits = projected.split(memory.pieces)
    # exp(c tanh(a / c)) as a power of exp(c).
    weights = torch.pow(math.exp(SOFT_CAP), logits.div_(SOFT_CAP).tanh_())
    if valid is not None:
        weights.mul_(valid.view(1))
    memory.total.addr_(weights, values)
    memory.denominator_line.add_(weights)
    denominator = memory.denominator
    if valid is not None:
        # Else the token's own weight is in there.
        denominator = denominator.clamp_min(SMALLEST_DENOMINATOR)
    mean = torch.div(memory.total, denominator, out=memory.mean)

    if options.mixer == "attention":
        bias = parameters.mixer[0]
        scores = torch.addmv(bias if bias.dtype is dtype else bias.to(dtype), mean, queries, alpha=memory.query_scale)
        readout = torch.mv(memory.mean_transposed, scores.softmax(0))
    else:
        readout = read_mean(mean.unsqueeze(0), queries.view(1, 1, -1), options.mixer, parameters.mixer).view(-1)

    if options.writeback == "add":
        written = torch.addmv(row, write if write.dtype is dtype else write.to(dtype), readout, alpha=alpha)
        written = written.view(hidden_states.shape)
        if written.dtype is not hidden_states.dtype:
            written = written.to(hidden_states.dtype)
    else:
        written = write_back(
            hidden_states,
            readout.view(1, 1, -1),
            write,
            options.writeback,
            alpha=alpha,
            gate=parameters.gate,
            cap=options.cap,
        )
    return RowOutput(written, weights, values)
