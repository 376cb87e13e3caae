"""The latent memory of one side path during generation: what it holds, and how it follows its rows and its length."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..functional.fused import memory_after
from ..functional.one_token import TokenMemory
from ..functional.parameters import SidePathOutput

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
        # Takes in tokens one by one, and keeps the last of them until they are recorded.
        self._tokens: TokenMemory | None = None

    def __getstate__(self) -> dict[str, Any]:
        self._record_tokens()
        # Views would be copied apart from what they are views of.
        return {**self.__dict__, "_tokens": None}

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
        self.state = _precise(output.state)
        self._record(TokenRecord(output.weights, output.values, segment_ids))

    def in_place(self, dtype: torch.dtype) -> TokenMemory | None:
        """The memory in a form that one token of every row updates in place; None where it can't be.

        Args:
            dtype: In which the memory is read.

        Returns:
            The memory; whoever updates it calls `took_in`.
        """
        state, tokens = self.state, self._tokens
        if state is None or torch.is_grad_enabled() or state.requires_grad:
            return None
        frozen = False
        if not torch.is_inference_mode_enabled():
            # What was made in inference mode can't be changed outside of it.
            frozen = tokens is not None and tokens.mean.is_inference()
            if state.is_inference():
                self.state = state = state.clone()
        if tokens is None or frozen or tokens.dtype is not dtype or tokens.state.shape != state.shape:
            self._record_tokens()
            self._tokens = tokens = TokenMemory(state, dtype, TOKENS_A_RECORD if self.recorded else 1)
        elif tokens.state is not state:
            tokens.go_on_from(state)
        return tokens

    def took_in(self) -> None:
        """Keep the token that was put in in place."""
        if self.static:
            return
        self.length += 1
        if self.recorded and self._tokens is not None:
            self._tokens.kept += 1
            if self._tokens.kept == self._tokens.room:
                self._record_tokens()

    def _record_tokens(self) -> None:
        if self._tokens is not None and self._tokens.kept:
            self._records.append(TokenRecord(*self._tokens.take_out(), None))

    def _record(self, record: TokenRecord) -> None:
        self.length += record.weights.shape[1]
        if not self.recorded:
            return
        self._record_tokens()
        last = self._records[-1] if self._records else None
        if torch.compiler.is_compiling() and isinstance(last, TokenRecord):
            # One growing tensor, as the keys are: a growing list would be compiled anew at every token.
            self._records[-1] = last.followed_by(record)
        else:
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
            self._record_tokens()
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
        self._record_tokens()
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
        if self._tokens is not None:
            self._tokens.kept = 0
        if self.static and self.state is not None:
            self.state.zero_()
        else:
            self.state = None
