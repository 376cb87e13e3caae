"""The latent memory of one side path during generation: what it holds, and how it follows its rows and its length."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .functional.fused import memory_after
from .functional.parameters import SidePathOutput

TOKENS_A_RECORD = 64
"""So many decoded tokens are gathered into one record: few objects, and little to add up again after a crop."""


class TokenRecord(NamedTuple):
    """What one or more calls in a row added to a memory, and the memory before them.

    Args:
        before: [batch, slots, width + 1], or None for an empty memory.
        weights: e, [batch, tokens, slots].
        values: z, [batch, tokens, width].
        segment_ids: [batch, tokens] or None.
    """

    before: torch.Tensor | None
    weights: torch.Tensor
    values: torch.Tensor
    segment_ids: torch.Tensor | None


class LatentMemory:
    """The memory of one adapter's side path at one block, for one cache.

    Args:
        static: Whether the cache has a fixed size: the memory is then updated in place and keeps no record.
        recorded: Whether tokens are recorded so that the memory can be cropped.
    """

    def __init__(self, static: bool, recorded: bool) -> None:
        self.state: torch.Tensor | None = None
        self.length = 0
        self.static = static
        self.recorded = recorded
        self.behind = False
        # In batches of mixed adapters: which rows this memory is kept up for, [batch], bool; None: all.
        self.rows: torch.Tensor | None = None
        self._records: list[TokenRecord | torch.Tensor] = []

    def append(self, output: SidePathOutput, segment_ids: torch.Tensor | None) -> None:
        """Take over the memory after a call, and the record of its tokens.

        Args:
            output: What the side path gave.
            segment_ids: [batch, tokens] or None.
        """
        if output.state is None:
            raise ValueError("output.state=None: a side path that runs with a cache must return its state")
        if self.static:
            if self.state is None:
                self.state = output.state.clone()
            else:
                self.state.copy_(output.state)
            return
        if self.recorded:
            self._records.append(TokenRecord(self.state, output.weights, output.values, segment_ids))
            self._gather_records()
        self.state = output.state
        self.length += output.weights.shape[1]

    def _gather_records(self) -> None:
        """Join the last records into one, once there are enough of single tokens."""
        recent = self._records[-TOKENS_A_RECORD:]
        if len(recent) < TOKENS_A_RECORD:
            return
        singles = [entry for entry in recent if isinstance(entry, TokenRecord) and entry.weights.shape[1] == 1]
        if len(singles) < TOKENS_A_RECORD:
            return
        joined = TokenRecord(
            singles[0].before,
            torch.cat([record.weights for record in singles], dim=1),
            torch.cat([record.values for record in singles], dim=1),
            None,
        )
        self._records[-TOKENS_A_RECORD:] = [joined]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Let the memory follow its batch rows (beams, repeats, selections).

        Args:
            rows: [new batch], int: which old row each new row continues.
        """
        if self.state is None:
            return
        if self.rows is not None:
            self.rows = self.rows.index_select(0, rows.to(self.rows.device))
        rows = rows.to(self.state.device)
        self.state = self.state.index_select(0, rows)
        if self.recorded:
            self._records.append(rows)

    def crop(self, tokens: int) -> None:
        """Forget the last tokens: the memory is built again from the record that holds the new end.

        Args:
            tokens: How many to forget.

        Raises:
            ValueError: The memory holds fewer tokens, or has no record of them.
        """
        if tokens == 0 or self.state is None:
            return
        if not self.recorded or tokens > self.length:
            raise ValueError(
                f"tokens={tokens}: this latent memory of {self.length} tokens can't be cropped by as much; "
                "start again from an empty cache"
            )
        self.length -= tokens
        rows: torch.Tensor | None = None
        while self._records:
            entry = self._records.pop()
            if isinstance(entry, torch.Tensor):
                rows = entry if rows is None else entry.index_select(0, rows)
                continue
            recorded = entry.weights.shape[1]
            if recorded <= tokens:
                tokens -= recorded
                self.state = entry.before
            else:
                kept = TokenRecord(
                    entry.before,
                    entry.weights[:, : recorded - tokens],
                    entry.values[:, : recorded - tokens],
                    None if entry.segment_ids is None else entry.segment_ids[:, : recorded - tokens],
                )
                self._records.append(kept)
                self.state = memory_after(kept.values, kept.weights, kept.segment_ids, kept.before)
                tokens = 0
            if tokens == 0:
                break
        if rows is not None and self.state is not None:
            self.select_rows(rows)

    def is_kept_up_for(self, rows: torch.Tensor | None) -> bool:
        """Whether the memory saw every token of some rows; from now on it is kept up for them only.

        Args:
            rows: [batch], bool; None: all.

        Returns:
            False where a row's tokens passed it by.
        """
        if self.rows is None or rows is None or self.rows.shape != rows.shape:
            kept_up = self.rows is None
            self.rows = rows if kept_up else self.rows
            return kept_up
        kept_up = not bool((rows & ~self.rows).any())
        self.rows = self.rows & rows
        return kept_up

    def reset(self) -> None:
        """Empty the memory; a static one keeps its storage."""
        self.length = 0
        self.behind = False
        self.rows = None
        self._records.clear()
        if self.static and self.state is not None:
            self.state.zero_()
        else:
            self.state = None
