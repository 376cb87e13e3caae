"""Per-token records of a memory that is a sum: what each token added, from which any earlier state can be had again.

To what holds a memory, state and record are opaque: a mixer whose state is updated by another rule brings a record of
its own with the same methods. All functions here are pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F


def memory_after(
    values: torch.Tensor, weights: torch.Tensor, segment_ids: torch.Tensor | None, state: torch.Tensor | None
) -> torch.Tensor:
    """Sum what some tokens add to a state, without reading it.

    Args:
        values: z, [batch, tokens, width].
        weights: e, [batch, tokens, slots]; zero for padding.
        segment_ids: [batch, tokens], int, not falling, where 0 is the state's segment; None: all 0.
        state: N and D before the tokens, [batch, slots, width + 1]; None: empty.

    Returns:
        N and D of the last token's segment, [batch, slots, width + 1].
    """
    if segment_ids is not None:
        last = segment_ids[:, -1:]
        weights = weights * (segment_ids == last).unsqueeze(-1)
        state = None if state is None else state * (last == 0).unsqueeze(-1)
    memory = torch.bmm(weights.mT, F.pad(values, (0, 1), value=1.0))
    return memory if state is None else memory + state


def relative_segments(segment_ids: torch.Tensor | None, tokens: slice) -> torch.Tensor | None:
    """The segments of some of the tokens, numbered from that of the token before them.

    Args:
        segment_ids: [batch, tokens], int, not falling; None: one segment.
        tokens: Which tokens; neither end is negative.

    Returns:
        [batch, tokens of the slice], int, or None.
    """
    if segment_ids is None or not tokens.start:
        return None if segment_ids is None else segment_ids[:, tokens]
    return segment_ids[:, tokens] - segment_ids[:, tokens.start - 1 : tokens.start]


class TokenRecord(NamedTuple):
    """What consecutive tokens added to a memory.

    Args:
        weights: e, [batch, tokens, slots]; zero for padding.
        values: z, [batch, tokens, width].
        segment_ids: [batch, tokens], int, where 0 is the segment of the token before the record; None: all 0.
    """

    weights: torch.Tensor
    values: torch.Tensor
    segment_ids: torch.Tensor | None = None

    @property
    def can_be_subtracted(self) -> bool:
        """Whether `subtract_from` works: of a sum, whatever came before and between."""
        return True

    @property
    def tokens(self) -> int:
        """The number of tokens, padding included."""
        return self.weights.shape[1]

    @property
    def valid(self) -> torch.Tensor:
        """Which tokens are in the memory, [batch, tokens], bool: no weight of a real token is zero."""
        return self.weights[..., 0] > 0

    def part(self, tokens: slice) -> TokenRecord:
        """The record of some of the tokens, as views; neither end of the slice is negative."""
        segment_ids = relative_segments(self.segment_ids, tokens)
        return self._replace(weights=self.weights[:, tokens], values=self.values[:, tokens], segment_ids=segment_ids)

    def select_rows(self, rows: torch.Tensor) -> TokenRecord:
        """The record of other rows: row i continues row `rows[i]`."""
        segment_ids = None if self.segment_ids is None else self.segment_ids.index_select(0, rows)
        weights, values = (part.index_select(0, rows) for part in self[:2])
        return self._replace(weights=weights, values=values, segment_ids=segment_ids)

    def compact(self) -> TokenRecord:
        """A copy to keep: the values of a pass are a view, which keeps the whole projection alive."""
        weights, values = (part.clone(memory_format=torch.contiguous_format) for part in self[:2])
        return self._replace(weights=weights, values=values)

    def without(self, removed: torch.Tensor) -> TokenRecord:
        """The record with some tokens, [batch, tokens] bool, turned into padding."""
        return self._replace(weights=self.weights.masked_fill(removed.unsqueeze(-1), 0.0))

    def state_after(self, state: torch.Tensor | None) -> torch.Tensor:
        """The state after the last token, from that before the first one; in float64 if one of the two is."""
        return memory_after(self.values, self.weights, self.segment_ids, state)

    def subtract_from(self, state: torch.Tensor) -> torch.Tensor:
        """A state of the last token's segment, less what the record's tokens of that segment added to it."""
        return state - memory_after(self.values, self.weights, self.segment_ids, None)


def join_records(records: Sequence[TokenRecord]) -> TokenRecord:
    """Make one record of the tokens of consecutive ones.

    Args:
        records: At least one; each counts its segments from that of the last token of the one before.

    Returns:
        The record; it is compact if it is of several.
    """
    if len(records) == 1:
        return records[0]
    segment_ids: list[torch.Tensor] = []
    if any(record.segment_ids is not None for record in records):
        for record in records:
            ids = record.segment_ids
            if ids is None:
                ids = record.weights.new_zeros(record.weights.shape[:2], dtype=torch.long)
            segment_ids.append(ids if not segment_ids else ids + segment_ids[-1][:, -1:])
    return records[0]._replace(
        weights=torch.cat([record.weights for record in records], dim=1),
        values=torch.cat([record.values for record in records], dim=1),
        segment_ids=torch.cat(segment_ids, dim=1) if segment_ids else None,
    )


def crop_records(
    records: Sequence[TokenRecord], tokens: int, state: torch.Tensor, initial_state: torch.Tensor | None = None
) -> tuple[list[TokenRecord], torch.Tensor | None]:
    """Forget the last tokens: they are subtracted, or those that stay are added up again, whichever are fewer.

    Args:
        records: Of consecutive tokens, at least as many as are forgotten.
        tokens: The number of tokens to forget.
        state: The state after the records.
        initial_state: The state before the records; None: empty. Default None.

    Returns:
        The records and the state of the tokens that stay; where none does, the initial state.

    Raises:
        ValueError: The records have fewer tokens.
    """
    kept, dropped, missing = list(records), list[TokenRecord](), tokens
    if missing > sum(record.tokens for record in kept):
        raise ValueError(f"tokens={tokens}: the records have {sum(record.tokens for record in kept)}; give no more")
    while missing:
        record = kept.pop()
        stays = max(record.tokens - missing, 0)
        if stays:
            kept.append(record.part(slice(0, stays)))
            record = record.part(slice(stays, record.tokens))
        missing -= record.tokens
        dropped.append(record)
    if not kept:
        return kept, initial_state
    # Where a segment may have begun, the state has forgotten what was there before.
    subtracts = all(record.can_be_subtracted and record.segment_ids is None for record in dropped)
    if subtracts and tokens < sum(record.tokens for record in kept):
        for record in dropped:
            state = record.subtract_from(state)
        return kept, state
    # Zeros and not None, so that the sum has the precision of the state.
    state = torch.zeros_like(state) if initial_state is None else initial_state
    for record in kept:
        state = record.state_after(state)
    return kept, state
