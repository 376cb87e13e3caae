"""Side paths of several adapters, of equal axes and sizes, in one: each token is read and written by its adapter's.

All adapters' projections are one product, of which each token keeps its own part: they are narrow, so that is less
than to gather matrices per token. No token's numbers enter another's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from .fused import inverse_rms
from .parameters import read_sizes, slots_of_rows, state_shape
from .writeback import WRITEBACK_RULES


class StackedParameters(NamedTuple):
    """The tensors of several adapters' side paths; see `parameters.SidePathParameters`.

    Args:
        read: `W_read` of each, [adapters, channels, hidden_size].
        mixer: The mixer's own tensors, [adapters, ...].
        write: The transposes of `W_write`, [adapters, width, hidden_size].
        gate: `w_g` and `b_g`, [adapters, hidden_size + 1], for the `gated` rule only.
        alpha: The trained strengths, [adapters].
        cap: The rho of the `capped` rule, [adapters].
    """

    read: torch.Tensor
    mixer: tuple[torch.Tensor, ...]
    write: torch.Tensor
    gate: torch.Tensor | None
    alpha: torch.Tensor
    cap: torch.Tensor

    def slots(self, mixer: str) -> int:
        """M, the number of memory slots."""
        return slots_of_rows(mixer, self.read.shape[1], self.write.shape[1])

    def read_sizes(self, mixer: str) -> tuple[int, int, int]:
        """The channels of the three parts of each `W_read`."""
        return read_sizes(mixer, self.slots(mixer), self.write.shape[1])

    def state_shape(self, mixer: str) -> tuple[int, int]:
        """The shape of the state of one sequence."""
        return state_shape(mixer, self.slots(mixer), self.write.shape[1])


def _own(per_adapter: torch.Tensor, adapters: torch.Tensor) -> torch.Tensor:
    """Of [tokens, adapters, channels], the channels of each token's adapter."""
    index = adapters.view(-1, 1, 1).expand(-1, 1, per_adapter.shape[2])
    return per_adapter.gather(1, index).squeeze(1)


def read(
    stream: torch.Tensor, parameters: StackedParameters, sizes: tuple[int, int, int], adapters: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Project the normalised residual stream by each token's adapter; see `reference.read`.

    Args:
        stream: h, [tokens, hidden_size].
        parameters: The adapters' tensors.
        sizes: The channels of the three parts, as `read_sizes` returns them.
        adapters: Each token's adapter, [tokens], int64.

    Returns:
        z, q and a, [tokens, channels].
    """
    projected = F.linear(stream, parameters.read.flatten(0, 1)) * inverse_rms(stream)
    return _own(projected.unflatten(1, (-1, sum(sizes))), adapters).split(sizes, dim=-1)


def write_back(
    stream: torch.Tensor,
    readout: torch.Tensor,
    parameters: StackedParameters,
    adapters: torch.Tensor,
    writeback: str,
) -> torch.Tensor:
    """Change the residual stream by read-outs that have their strength in them; see `reference.write_back`.

    Args:
        stream: h, [tokens, hidden_size].
        readout: alpha r, [tokens, width].
        parameters: The adapters' tensors.
        adapters: Each token's adapter, [tokens], int64.
        writeback: How the stream is changed.

    Returns:
        h', [tokens, hidden_size].
    """
    count = parameters.write.shape[0]
    others = adapters.unsqueeze(1) != torch.arange(count, device=adapters.device)
    # A row per token with its read-out at its adapter's place, and zeros at the others'.
    rows = readout.unsqueeze(1).expand(-1, count, -1).masked_fill(others.unsqueeze(2), 0.0)
    delta = rows.flatten(1) @ parameters.write.flatten(0, 1)
    if writeback == "gated" and parameters.gate is not None:
        weight, bias = parameters.gate[:, :-1], parameters.gate[:, -1]
        openings = torch.addmm(bias, stream * inverse_rms(stream), weight.T)
        return stream + torch.sigmoid(_own(openings.unsqueeze(2), adapters)) * delta
    cap = parameters.cap.index_select(0, adapters).unsqueeze(1)
    rule = WRITEBACK_RULES[writeback]
    return stream + rule(stream, delta, None, cap)
