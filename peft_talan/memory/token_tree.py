"""The memory of a row that is a tree: samples with a common beginning, which is in the row once.

TRL's AsyncGRPO packs the rollouts of a prompt so. To a token the samples that it is no part of are not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..axes import check_causal
from ..functional.parameters import SidePathOptions, SidePathParameters
from .interface import NoMemory
from .token_layout import Positions, TokenLayout, token_layout


class TokenTree(NamedTuple):
    """The segments of a row between two branches, and the way from the beginning of a sample to the end of each.

    Args:
        path_index: [path tokens], int: the places in the row of each segment's path, laid end to end; a path ends with
            the segment itself.
        segment_starts: [segments + 1], int: where each segment starts in the row, and the row's length.
        path_starts: [segments + 1], int: where each path starts in `path_index`, and its length.
    """

    path_index: torch.Tensor
    segment_starts: torch.Tensor
    path_starts: torch.Tensor

    @classmethod
    def of_call(cls, given: Mapping[str, Any]) -> TokenTree | None:
        """Read what TRL's tree attention takes.

        Args:
            given: The arguments of a call by their names.

        Returns:
            The tree; None where there is none.
        """
        path_index = given.get("tree_kv_index")
        if not isinstance(path_index, torch.Tensor):
            return None
        return cls(path_index, given["tree_cu_seqlens_q"], given["tree_cu_seqlens_k"])

    def layout_of_paths(self) -> TokenLayout:
        """Where each path starts, in hidden states that are laid out by `path_index`."""
        return token_layout(None, Positions(cu_seq_lens=self.path_starts, rule=None), 1, len(self.path_index))

    def ends_of_paths(self, tokens: int) -> torch.Tensor:
        """Find the row's tokens on the paths of their own segments.

        Args:
            tokens: The row's length.

        Returns:
            Each token's place in `path_index`, [tokens].
        """
        place = torch.arange(tokens, device=self.path_index.device)
        segment = torch.bucketize(place, self.segment_starts[1:-1], right=True)
        return self.path_starts[segment + 1] - self.segment_starts[segment + 1] + place


class TreeMemory:
    """Each path has a memory of its own, which starts empty; nothing is kept after the call.

    Args:
        tree: The row's tree.
    """

    def __init__(self, tree: TokenTree) -> None:
        self.tree = tree

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
        """Run a side path on every path of the tree; see `Memory`. The layout is that of `layout_of_paths`."""
        check_causal(options.scope)
        tree = TokenTree(*(part.to(hidden_states.device) for part in self.tree))
        paths = hidden_states.index_select(1, tree.path_index)
        written = NoMemory().append(paths, parameters, options, layout, alpha=alpha, training=training)
        return written.index_select(1, tree.ends_of_paths(hidden_states.shape[1]))
