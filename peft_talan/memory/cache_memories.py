"""The latent memories that one cache carries: how many tokens they hold, and what is done to all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from .latent_memory import LatentMemory
from .recent_tokens import ASK_FOR_RECORDS, RECORDED_TOKENS
from .token_layout import TokenLayout, refuse_unless

SPARE_COLUMNS = 256
"""How many tokens a copy of the mask is made for in advance, so that few of them are made while tokens are decoded."""


class CacheMemories:
    """The latent memories that a cache carries, by block and adapter.

    Args:
        static_length: The number of tokens that a cache of a fixed size has space for; None: it grows.
        window: How many tokens the cache holds before it can't be cropped any more; None: it always can.
        records_all: Whether the cache records its past without a limit.
    """

    def __init__(self, static_length: int | None = None, window: int | None = None, records_all: bool = False) -> None:
        self.static_length = static_length
        self.window = window
        self.records_all = records_all
        # By the block's index and the name of its child that has the side paths, then by adapter.
        self.memories: dict[tuple[int, str], dict[str, LatentMemory]] = {}
        # Which tokens are in the memories, [batch, columns], not zero where one is; and before the current call.
        # Tokens behind the last column are, too, but for a static cache. None: all; before the call: not known.
        self.entered: torch.Tensor | None = None
        self.entered_before: torch.Tensor | None = None
        # False after a crop of packed samples, or where a block was called by itself: the next mask is believed.
        self.entered_is_known = True
        # Whether a new sample ever made the memories forget those before it.
        self.has_packed = False
        # What a cache without keys looked like after the last call; see `recurrent_version`.
        self.recurrent_version: tuple[Any, ...] | None = None
        self._is_following = False

    @property
    def static(self) -> bool:
        """Whether the cache has a fixed size."""
        return self.static_length is not None

    def __iter__(self) -> Iterator[LatentMemory]:
        for memories in self.memories.values():
            yield from memories.values()

    def max_recorded(self, length: int | torch.Tensor | None) -> int | None:
        """How many of the last tokens a memory records in a cache of `length` tokens: those that may be taken out."""
        if self.static:
            return 0
        if self.records_all:
            return None
        can_be_cropped = self.window is None or (isinstance(length, int) and length < self.window)
        return RECORDED_TOKENS if can_be_cropped else 0

    def goes_on_with(self, attention_mask: object, past: int | torch.Tensor | None) -> bool:
        """Whether a mask shows what the memories hold and one token more in every row, as those of `generate` do.

        One comparison then says all that there is to read from the mask. Only where the host does not wait for it.
        """
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2 or not isinstance(past, int):
            return False
        entered, columns = self.entered, attention_mask.shape[1]
        if entered is None or self.static or not self.entered_is_known or columns != past + 1:
            return False
        if torch.compiler.is_compiling() or not attention_mask.device.type == entered.device.type == "cpu":
            return False
        if entered.dtype is not attention_mask.dtype or entered.shape[1] < columns:
            known = entered[:, :past].to(attention_mask.dtype)
            spare = past - known.shape[1] + SPARE_COLUMNS
            self.entered = entered = F.pad(known, (0, spare), value=1)
        return torch.equal(attention_mask, entered.narrow(1, 0, columns))

    def count(self, past: int | torch.Tensor, batch: int, tokens: int, layout: TokenLayout) -> None:
        """Count the tokens of a call in, and refuse a mask that takes away earlier ones which can't be removed."""
        if layout.valid is None and layout.segment_ids is None:
            if self.entered is None:
                return
            if self.entered_is_known and not self.has_packed:
                self._check_unmasked(self.entered, past)
            if not self.static:
                return
        given = (layout.valid, layout.segment_ids, self.entered)
        device = next(part.device for part in given if part is not None)
        entering = layout.valid
        if entering is None:
            entering = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        goes_on = None
        if layout.segment_ids is not None:
            self.has_packed = True
            last = layout.segment_ids[:, -1:]
            entering, goes_on = entering & (layout.segment_ids == last), last == 0
        if self.static_length is not None:
            self._count_in_place(self.static_length, past, entering, goes_on, layout.attended)
            return
        before = self._entered_of(past, batch, device)
        self.entered_before = before if self.entered_is_known else None
        self.entered = torch.cat([before if goes_on is None else before & goes_on, entering], dim=1)
        if layout.attended is None:
            return
        removes = layout.attended_past is not None and self.max_recorded(past + tokens) != 0
        if self.entered_is_known and not removes:
            _refuse_other_mask(layout.attended, self.entered, f"; {ASK_FOR_RECORDS}")
        else:
            # A copy: a mask is its caller's, who may write to it.
            self.entered, self.entered_is_known = layout.attended.clone(), True

    def _count_in_place(
        self,
        columns: int,
        past: int | torch.Tensor,
        entering: torch.Tensor,
        goes_on: torch.Tensor | None,
        attended: torch.Tensor | None,
    ) -> None:
        """Count tokens into the storage that compiled graphs know; behind the last token it is False."""
        batch, tokens = entering.shape
        columns = columns if attended is None else max(columns, attended.shape[1])
        entered, device = self.entered, entering.device
        if entered is None:
            entered = (torch.arange(columns, device=device) < past).repeat(batch, 1)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(entered)
        elif entered.shape[1] < columns:
            entered = F.pad(entered, (0, columns - entered.shape[1]))
        self.entered = entered
        if goes_on is not None:
            entered.logical_and_(goes_on)
        # Where every block has a window, nothing tells how many tokens there will be; a longer mask makes the space.
        entered[:, (torch.arange(tokens, device=device) + past).clamp(max=entered.shape[1] - 1)] = entering
        if attended is not None:
            now = entered[:, : attended.shape[1]]
            if self.entered_is_known:
                _refuse_other_mask(attended, now, "")
            else:
                now.copy_(attended)
                self.entered_is_known = True

    def _check_unmasked(self, entered: torch.Tensor, past: int | torch.Tensor) -> None:
        """Refuse a call without a mask, in which attention sees all tokens, if the memories did not take all in."""
        complete = entered != 0
        if self.static:
            complete = complete | (torch.arange(entered.shape[1], device=entered.device) >= past)
        refuse_unless(
            complete,
            "attention_mask=None: this cache has tokens that were masked when they were read, so they are not in its "
            "latent memory, but attention sees them; pass the mask of all tokens, or start from an empty cache",
        )

    def _entered_of(self, past: Any, batch: int, device: torch.device) -> torch.Tensor:
        """Which of the first tokens are in the memories, [batch, past], bool."""
        if self.entered is None:
            return torch.ones(batch, past, dtype=torch.bool, device=device)
        known = self.entered[:, :past].to(device, torch.bool)
        return known if known.shape[1] == past else F.pad(known, (0, past - known.shape[1]), value=True)

    def _select_rows(self, rows: torch.Tensor) -> None:
        if self.entered is not None:
            self.entered = self.entered.index_select(0, rows.to(self.entered.device))
        for memory in self:
            memory.select_rows(rows)

    def reset(self) -> None:
        """Empty every memory."""
        self.entered_is_known, self.has_packed = True, False
        if self.static and self.entered is not None:
            self.entered.zero_()
        else:
            self.entered = None
        for memory in self:
            memory.reset()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget tokens that are not recorded; their number is negative, as in transformers."""
        for memory in self:
            if not memory.stale:
                memory.check_crop(abs(tokens_to_remove))

    def crop(self, tokens_to_remove: int) -> None:
        """Let every memory forget the last tokens; their number is negative, as in transformers."""
        for memory in self:
            if not memory.stale:
                memory.crop(abs(tokens_to_remove))
                if self.entered is not None and isinstance(memory.length, int):
                    self.entered = self.entered[:, : memory.length]
        # What a sample made the memories forget may be back, which is not noted.
        if tokens_to_remove and self.has_packed:
            self.entered_is_known = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let every memory's rows follow the beams."""
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        every_row = next((memory.every_row() for memory in self), torch.arange(0))
        self._select_rows(every_row.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows by index or by mask."""
        every_row = next((memory.every_row() for memory in self), torch.arange(0))
        self._select_rows(every_row[indices.to(every_row.device)])

    def activate_past_recording(self) -> None:
        """Record all tokens from now on."""
        self.records_all = True


def _refuse_other_mask(attended: torch.Tensor, entered: torch.Tensor, remedy: str) -> None:
    refuse_unless(
        attended == entered,
        "attention_mask: it masks earlier tokens that are in the latent memory of this cache, or unmasks "
        "some that are not; they can be removed in a call of several tokens with a dynamic cache that "
        f"records them only{remedy}; otherwise start from an empty cache",
    )
