"""What every memory of a side path can do: run the side path on the next tokens, and take them in."""

from __future__ import annotations

from typing import Protocol

import torch

from ..functional.fused import side_path
from ..functional.parameters import SidePathOptions, SidePathParameters
from .token_layout import TokenLayout


class Memory(Protocol):
    """The tokens before a call, as one side path remembers them.

    `NoMemory` has none, `LatentMemory` those of a cache, `PagedMemory` those of a server's requests. How a state
    follows from tokens is the mixer's: no memory assumes that it is a sum.
    """

    def append(
        self,
        hidden_states: torch.Tensor,
        parameters: SidePathParameters,
        options: SidePathOptions,
        layout: TokenLayout,
        *,
        alpha: float = 1.0,
        training: bool = False,
    ) -> torch.Tensor:
        """Run a side path on the tokens that come next and remember them.

        Args:
            hidden_states: h, [batch, tokens, hidden_size].
            parameters: The side path's tensors.
            options: The side path's axes.
            layout: Which tokens are real, and where packed samples start.
            alpha: The strength of the perturbation. Default 1.
            training: Whether dropout is active. Default False.

        Returns:
            h', [batch, tokens, hidden_size].
        """


class NoMemory:
    """The memory of a call without a cache: nothing came before, and nothing is kept."""

    def append(
        self,
        hidden_states: torch.Tensor,
        parameters: SidePathParameters,
        options: SidePathOptions,
        layout: TokenLayout,
        *,
        alpha: float = 1.0,
        training: bool = False,
    ) -> torch.Tensor:
        """Run a side path on tokens that nothing came before; see `Memory`."""
        return side_path(
            hidden_states,
            parameters,
            options,
            alpha=alpha,
            valid=layout.entering,
            segment_ids=layout.segment_ids,
            training=training,
        ).hidden_states
