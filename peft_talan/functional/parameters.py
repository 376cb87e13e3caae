"""What the operators of a side path take and return: its tensors, its options, the outputs."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch

from ..axes import LARGEST_SOFT_CAP, MemoryScope, Mixer, Writeback
from .records import TokenRecord

MIXERS: tuple[str, ...] = get_args(Mixer)
WRITEBACKS: tuple[str, ...] = get_args(Writeback)
MEMORY_SCOPES: tuple[str, ...] = get_args(MemoryScope)

SMALLEST_DENOMINATOR = 0.5 * math.exp(-LARGEST_SOFT_CAP)
"""Below every weight of a real token: dividing by at least this much changes no slot that holds anything."""

NORM_EPSILON = 1e-6
"""Added to the mean square in the RMSNorm of the read, as in most decoder blocks."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything inside the side path of a model in `dtype`: float32, or float64 where the model is."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def mean_of(state: torch.Tensor) -> torch.Tensor:
    """The mean that a state stands for: `mu = N / D`, zero where nothing has entered the slot.

    Args:
        state: N and, as the last channel, D, [..., slots, width + 1].

    Returns:
        mu, [..., slots, width].
    """
    return state[..., :-1] / state[..., -1:].clamp_min(SMALLEST_DENOMINATOR)


def full_precision(device_type: str) -> AbstractContextManager[None]:
    """No autocast inside: the memory is a long sum, and its products would be rounded to half precision.

    Args:
        device_type: That of the tensors inside.

    Returns:
        The context.
    """
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if autocast else nullcontext()


MIXER_PARAMETERS: dict[str, tuple[str, ...]] = {
    "attention": ("slot_bias",),
    "linear": ("slot_readout",),
    "mlp": ("slot_bias", "slot_in", "slot_out", "channel_in", "channel_out"),
    "delta": ("gate_bias",),
}
"""The names of each mixer's tensors, in the order in which its rules take them."""

DELTA_GATES = 3
"""How many gates a token of the `delta` mixer has: it writes, erases and forgets."""


def read_sizes(mixer: str, slots: int, width: int) -> tuple[int, int, int]:
    """What a token is projected to: the channels of its value, its query and the logits by which it enters."""
    return (width, slots, DELTA_GATES + slots) if mixer == "delta" else (width, width, slots)


def slots_of_rows(mixer: str, rows: int, width: int) -> int:
    """M, the number of memory slots, from the rows of `W_read` and the latent width; see `read_sizes`."""
    return (rows - width - DELTA_GATES) // 2 if mixer == "delta" else rows - 2 * width


def state_shape(mixer: str, slots: int, width: int) -> tuple[int, int]:
    """The shape of the state of one sequence: (slots, width + 1), N and D; of `delta` (slots, width)."""
    return slots, width if mixer == "delta" else width + 1


class SidePathParameters(NamedTuple):
    """The trainable tensors of one side path.

    Args:
        read: `W_read` of shape [2 * width + slots, hidden_size]; its rows are z, q and a, in this order. `delta`:
            [width + 2 * slots + 3, hidden_size]; v, q, the gates w, b and f, and k.
        mixer: The mixer's own tensors. `attention`: (slot bias [slots],). `linear`: (slot readout B [width, slots],).
            `mlp`: (slot bias [slots], slot in [hidden, slots], slot out [slots, hidden], channel in [hidden, width],
            channel out [width, hidden]). `delta`: (gate bias [3],).
        write: `W_write` of shape [hidden_size, width].
        gate: `w_g` and `b_g` in one row of shape [hidden_size + 1], for the `gated` rule only.
    """

    read: torch.Tensor
    mixer: tuple[torch.Tensor, ...]
    write: torch.Tensor
    gate: torch.Tensor | None = None

    def slots(self, mixer: str) -> int:
        """M, the number of memory slots."""
        return slots_of_rows(mixer, self.read.shape[0], self.write.shape[1])

    def read_sizes(self, mixer: str) -> tuple[int, int, int]:
        """The channels of the three parts of `W_read`; see the function."""
        return read_sizes(mixer, self.slots(mixer), self.write.shape[1])

    def state_shape(self, mixer: str) -> tuple[int, int]:
        """The shape of the state of one sequence; see the function."""
        return state_shape(mixer, self.slots(mixer), self.write.shape[1])

    def to(self, device: torch.device) -> SidePathParameters:
        """The same tensors on a device.

        Args:
            device: The device.

        Returns:
            The tensors; those that are there already are not copied.
        """
        gate = None if self.gate is None else self.gate.to(device)
        mixer = tuple(tensor.to(device) for tensor in self.mixer)
        return SidePathParameters(self.read.to(device), mixer, self.write.to(device), gate)


@dataclass(frozen=True)
class SidePathOptions:
    """The axes of one side path that its operators need to know.

    Args:
        mixer: How the memory becomes a token's read-out.
        writeback: How the read-out changes the residual stream.
        scope: `causal`: a token sees the memory of what came before and itself; `bidirectional`: of the whole segment.
        cap: The rho of the `capped` rule: the largest |change| / |hidden state|. Unitless.
        dropout: The probability of dropping a component of the read-out in training. Default 0.
        grad_scale: The gamma by which the gradient that enters the side path is multiplied. Default 1.
        soft_cap: The c of `e = exp(c tanh(a / c))`, which bounds the weights of tokens in a slot, so that sums need no
            running maximum. Not for `delta`. Default 5.
    """

    mixer: Mixer = "attention"
    writeback: Writeback = "add"
    scope: MemoryScope = "causal"
    cap: float = 0.1
    dropout: float = 0.0
    grad_scale: float = 1.0
    soft_cap: float = 5.0

    def __post_init__(self) -> None:
        if self.mixer == "delta" and self.scope != "causal":
            raise ValueError(f"scope={self.scope!r}: mixer='delta' goes through the tokens in order; use 'causal'")


class SidePathOutput(NamedTuple):
    """What one pass through a side path returns.

    Only the mixer knows what state and record hold: the state is passed to the next call as it is, and the record's
    methods make the state after some of its tokens.

    Args:
        hidden_states: h', [batch, tokens, hidden_size].
        state: The state after the last token, [batch, *state_shape]: N and, as the last channel, D; of `delta` S.
        record: What each token did to the state; views of the pass, see `TokenRecord.compact`.
    """

    hidden_states: torch.Tensor
    state: torch.Tensor
    record: TokenRecord


class RemixInputs(NamedTuple):
    """The arguments of `reference.remix`, without the scope, in one: what every fast rule takes."""

    values: torch.Tensor
    queries: torch.Tensor
    weights: torch.Tensor
    mixer: str
    parameters: tuple[torch.Tensor, ...]
    segment_ids: torch.Tensor | None
    state: torch.Tensor | None


class RaggedOutput(NamedTuple):
    """What one pass of many requests' tokens through a side path returns.

    Args:
        hidden_states: h', [tokens, hidden_size]; rows of padding hold arbitrary finite numbers.
        states: The states at the snapshots, [snapshots or requests, *state_shape], in the initial states' dtype.
    """

    hidden_states: torch.Tensor
    states: torch.Tensor
