"""The latent memory of one side path during generation: what it holds, and how it follows its rows and its length."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .functional.fused import memory_after
from .functional.one_row import RowMemory
from .functional.parameters import SidePathOutput

TOKENS_A_RECORD = 64
"""So many decoded tokens are gathered into one record: few objects, and little to add up again after a crop."""


class TokenRecord(NamedTuple):
    """What the tokens of one or more calls in a row put into a memory.

    Args:
        weights: e, [batch, tokens, slots].
        values: z, [batch, tokens, width].
        segment_ids: [batch, tokens] or None.
    """

    weights: torch.Tensor
    values: torch.Tensor
    segment_ids: torch.Tensor | None

    def part(self, tokens: slice) -> TokenRecord:
        """The record of some of the tokens."""
        segment_ids = None if self.segment_ids is None else self.segment_ids[:, tokens]
        return TokenRecord(self.weights[:, tokens], self.values[:, tokens], segment_ids)

    def followed_by(self, other: TokenRecord) -> TokenRecord:
        """The record of these tokens and those of another, whose segments count from these tokens' last one."""
        weights = torch.cat([self.weights, other.weights], dim=1)
        values = torch.cat([self.values, other.values], dim=1)
        if self.segment_ids is None and other.segment_ids is None:
            return TokenRecord(weights, values, None)
        own, others = (
            record.weights.new_zeros(record.weights.shape[:2], dtype=torch.long)
            if record.segment_ids is None
            else record.segment_ids
            for record in (self, other)
        )
        return TokenRecord(weights, values, torch.cat([own, own[:, -1:] + others], dim=1))


def _precise(state: torch.Tensor) -> torch.Tensor:
    """In float64 where the device has it: a sum of a million tokens would round each of them in float32."""
    return state if state.device.type == "mps" else state.to(torch.float64)


def _add_up(entries: list[TokenRecord | torch.Tensor]) -> torch.Tensor | None:
    """The memory that some entries make, from an empty one."""
    state: torch.Tensor | None = None
    for entry in entries:
        if isinstance(entry, torch.Tensor):
            state = None if state is None else state.index_select(0, entry)
        else:
            state = _precise(memory_after(entry.values, entry.weights, entry.segment_ids, state))
    return state


class LatentMemory:
    """The memory of one adapter's side path at one block, for one cache.

    Args:
        static: Whether the cache has a fixed size: the memory then keeps its storage, and no record.
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
        # What tokens put in, in their order, and the rows by index wherever they changed.
        self._records: list[TokenRecord | torch.Tensor] = []
        # The last tokens that came one by one, not in the records yet: e and z; [slots] and [width] from a single row.
        self._singles: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._row: RowMemory | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Views would be copied apart from what they are views of.
        return {**self.__dict__, "_row": None}

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
                self.state = _precise(output.state).clone()
                if not torch.compiler.is_compiling():
                    # As transformers marks the keys: CUDA graphs may then update it in place.
                    torch._dynamo.mark_static_address(self.state)
            else:
                self.state.copy_(output.state)
            return
        self.state, self._row = _precise(output.state), None
        self._record(TokenRecord(output.weights, output.values, segment_ids))

    def row_in_place(self, dtype: torch.dtype) -> RowMemory | None:
        """The memory of a single row, to be updated in place by one token; None where it can't be.

        Args:
            dtype: In which the memory is read.

        Returns:
            The memory; whoever updates it calls `took_in` with what the token put in.
        """
        state = self.state
        if state is None or state.shape[0] != 1 or torch.is_grad_enabled() or state.requires_grad:
            return None
        row = self._row
        if row is not None and row.mean.is_inference() and not torch.is_inference_mode_enabled():
            row = None
        if row is None or row.state is not state or row.dtype is not dtype:
            if state.is_inference() and not torch.is_inference_mode_enabled():
                self.state = state = state.clone()
            self._row = row = RowMemory(state, dtype)
        return row

    def took_in(self, weights: torch.Tensor, values: torch.Tensor) -> None:
        """Record a token that was put in in place.

        Args:
            weights: e, [slots].
            values: z, [width].
        """
        if not self.static:
            self.length += 1
            self._record_single(weights, values)

    def _record_single(self, weights: torch.Tensor, values: torch.Tensor) -> None:
        if not self.recorded:
            return
        if self._singles and self._singles[0][0].dim() != weights.dim():
            self._gather_singles()
        self._singles.append((weights, values))
        if len(self._singles) == TOKENS_A_RECORD:
            self._gather_singles()

    def _gather_singles(self) -> None:
        if not self._singles:
            return
        of_one_row = self._singles[0][0].dim() == 1
        weights, values = (
            torch.stack(tensors).unsqueeze(0) if of_one_row else torch.cat(tensors, dim=1)
            for tensors in zip(*self._singles, strict=True)
        )
        self._records.append(TokenRecord(weights, values, None))
        self._singles.clear()

    def _record(self, record: TokenRecord) -> None:
        self.length += record.weights.shape[1]
        if not self.recorded:
            return
        if torch.compiler.is_compiling():
            # One growing tensor, as the keys are: a growing list would be compiled anew at every token.
            self._gather_singles()
            last = self._records[-1] if self._records else None
            if isinstance(last, TokenRecord):
                self._records[-1] = last.followed_by(record)
            else:
                self._records.append(record)
        elif record.weights.shape[1] == 1 and record.segment_ids is None:
            self._record_single(record.weights, record.values)
        else:
            self._gather_singles()
            self._records.append(record)

    def every_row(self) -> torch.Tensor:
        """The indices of all rows."""
        return torch.arange(0) if self.state is None else torch.arange(self.state.shape[0], device=self.state.device)

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
            self._gather_singles()
            self._records.append(rows)

    def crop(self, tokens: int) -> None:
        """Forget the last tokens: they are taken away, or those that stay are added up again, whichever are fewer.

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
        self._gather_singles()
        dropped = self._drop(tokens)
        self.length -= tokens
        segmented = any(isinstance(entry, TokenRecord) and entry.segment_ids is not None for entry in dropped)
        if tokens < self.length and not segmented:
            taken = _add_up(dropped)
            self.state = self.state if taken is None else self.state - taken
        else:
            self.state = _add_up(self._records)

    def _drop(self, tokens: int) -> list[TokenRecord | torch.Tensor]:
        """Take the last tokens out of the records, but leave there how the rows changed meanwhile."""
        dropped: list[TokenRecord | torch.Tensor] = []
        while tokens:
            entry = self._records.pop()
            if isinstance(entry, TokenRecord):
                recorded = entry.weights.shape[1]
                if recorded > tokens:
                    self._records.append(entry.part(slice(None, recorded - tokens)))
                    entry = entry.part(slice(recorded - tokens, None))
                tokens -= entry.weights.shape[1]
            dropped.insert(0, entry)
        self._records.extend(entry for entry in dropped if isinstance(entry, torch.Tensor))
        return dropped

    def is_kept_up_for(self, rows: torch.Tensor | None) -> bool:
        """Whether the memory saw every token of some rows; from now on it is kept up for them only.

        Args:
            rows: [batch], bool; None: all.

        Returns:
            False where a row's tokens passed it by.
        """
        if self.rows is None and rows is None:
            return True
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
        self._singles.clear()
        if self.static and self.state is not None:
            self.state.zero_()
        else:
            self.state = None
