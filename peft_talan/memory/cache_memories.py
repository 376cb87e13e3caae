"""The latent memories that one cache carries: which tokens they hold, and what is done to all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from .device_checks import refuse_unless
from .latent_memory import LatentMemory
from .recent_tokens import ASK_FOR_RECORDS, RECORDED_TOKENS
from .token_layout import TokenLayout

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
        # Which tokens are in the memories, [batch, columns], not zero where one is.
        # Tokens behind the last column are, too, but for a static cache. None: all.
        self.entered: torch.Tensor | None = None
        # Which tokens a later sample made the memories forget, [batch, columns], bool; None: none. Attention may see
        # them again: a call without a mask does not tell samples apart.
        self.forgotten: torch.Tensor | None = None
        # Whether any call had a mask: where none had, nothing can have been masked.
        self.has_masks = False
        # False after a crop into an earlier sample, or where a block was called by itself: the next mask is believed.
        self.entered_is_known = True
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

    def enter(self, past: int | torch.Tensor, batch: int, tokens: int, layout: TokenLayout) -> None:
        """Note which tokens of a call enter, and refuse a mask that takes away earlier ones which can't be removed.

        Nothing is noted before all is checked: a caller may catch the error and go on with another mask.
        """
        if layout.valid is None and layout.segment_ids is None:
            if self.entered is None:
                return
            if self.entered_is_known and self.has_masks:
                self._check_unmasked(self.entered, past)
            if not self.static:
                return
        self.has_masks = self.has_masks or layout.valid is not None
        given = (layout.valid, layout.segment_ids, self.entered)
        device = next(part.device for part in given if part is not None)
        entering = layout.valid
        if entering is None:
            entering = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        goes_on = dropped = None
        if layout.segment_ids is not None:
            last = layout.segment_ids[:, -1:]
            goes_on, in_last = last == 0, layout.segment_ids == last
            entering, dropped = entering & in_last, entering & ~in_last
        if self.static_length is not None:
            self._enter_in_place(self.static_length, past, entering, goes_on, dropped, layout.attended)
            return
        before, forgotten = _first_columns(self.entered, past, batch, device, beyond=True), self.forgotten
        if layout.attended_past is not None:
            if self.entered_is_known:
                self._check_removed(layout.attended_past, before)
            before = before & layout.attended_past
        if goes_on is not None and dropped is not None:
            earlier = _first_columns(forgotten, past, batch, device, beyond=False)
            forgotten = torch.cat([earlier | (before & ~goes_on), dropped], dim=1)
            before = before & goes_on
        entered = torch.cat([before, entering], dim=1)
        if layout.attended is not None:
            if self.entered_is_known:
                _refuse_other_mask(layout.attended == entered, f"; {ASK_FOR_RECORDS}")
            else:
                # A copy: a mask is its caller's, who may write to it.
                entered, forgotten, self.entered_is_known = layout.attended.clone(), None, True
        self.entered, self.forgotten = entered, forgotten

    def _enter_in_place(
        self,
        columns: int,
        past: int | torch.Tensor,
        entering: torch.Tensor,
        goes_on: torch.Tensor | None,
        dropped: torch.Tensor | None,
        attended: torch.Tensor | None,
    ) -> None:
        """Note tokens in the storage that compiled graphs know; behind the last token it is False."""
        batch, tokens = entering.shape
        columns = columns if attended is None else max(columns, attended.shape[1])
        entered, device = self.entered, entering.device
        if entered is None:
            entered = _static((torch.arange(columns, device=device) < past).repeat(batch, 1))
        elif entered.shape[1] < columns:
            entered = F.pad(entered, (0, columns - entered.shape[1]))
        self.entered = entered
        # Where every block has a window, nothing tells how many tokens there will be; a longer mask makes the space.
        own = (torch.arange(tokens, device=device) + past).clamp(max=entered.shape[1] - 1)
        now = (entered if goes_on is None else entered & goes_on).index_copy(1, own, entering)
        if attended is not None:
            seen = now[:, : attended.shape[1]]
            if self.entered_is_known:
                _refuse_other_mask(attended == seen, "")
            else:
                seen.copy_(attended)
                if self.forgotten is not None:
                    self.forgotten.zero_()
                self.entered_is_known = True
        if goes_on is not None and dropped is not None:
            if self.forgotten is None:
                self.forgotten = _static(torch.zeros_like(entered))
            elif self.forgotten.shape[1] < entered.shape[1]:
                self.forgotten = F.pad(self.forgotten, (0, entered.shape[1] - self.forgotten.shape[1]))
            self.forgotten.copy_((self.forgotten | (entered & ~goes_on)).index_copy(1, own, dropped))
        entered.copy_(now)

    def _check_unmasked(self, entered: torch.Tensor, past: int | torch.Tensor) -> None:
        """Refuse a call without a mask, in which attention sees all tokens, if some of them were masked before."""
        complete = entered != 0
        if self.static:
            complete = complete | (torch.arange(entered.shape[1], device=entered.device) >= past)
        if self.forgotten is not None:
            complete[:, : self.forgotten.shape[1]] |= self.forgotten
        refuse_unless(
            complete,
            "attention_mask=None: this cache has tokens that were masked when they were read, so they are not in its "
            "latent memory, but attention sees them; pass the mask of all tokens, or start from an empty cache",
        )

    def _check_removed(self, attended: torch.Tensor, before: torch.Tensor) -> None:
        """Refuse a mask of the earlier tokens that shows other ones, or hides some that a memory has not recorded."""
        # A list: `torch.compile` can't trace `min` of a generator. Stale memories are refused later.
        recorded = min([before.shape[1], *[memory.recorded() for memory in self if not memory.stale]])
        fixed = before.shape[1] - recorded
        may_differ = torch.arange(before.shape[1], device=before.device) >= fixed
        _refuse_other_mask((attended == before) | (before & may_differ), f"; {ASK_FOR_RECORDS}")

    def _every_row(self) -> torch.Tensor:
        """The indices of all rows, of which a memory that is empty knows nothing."""
        states = (memory.state for memory in self)
        state = next((state for state in states if state is not None), torch.zeros(0))
        return torch.arange(len(state), device=state.device)

    def _select_rows(self, rows: torch.Tensor) -> None:
        if self.entered is not None:
            self.entered = self.entered.index_select(0, rows.to(self.entered.device))
        if self.forgotten is not None:
            self.forgotten = self.forgotten.index_select(0, rows.to(self.forgotten.device))
        for memory in self:
            memory.select_rows(rows)

    def reset(self) -> None:
        """Empty every memory."""
        self.entered_is_known, self.has_masks = True, False
        if not self.static:
            self.entered = self.forgotten = None
        for noted in (self.entered, self.forgotten):
            if noted is not None:
                noted.zero_()
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
                if self.forgotten is not None and isinstance(memory.length, int):
                    self.forgotten = self.forgotten[:, : memory.length]
        if tokens_to_remove and self.entered is not None and self.forgotten is not None:
            # Where nothing of the last sample is left, that before it is back, and where it starts is not noted.
            back = self.forgotten.any(1) & ~self.entered.any(1)
            self.entered_is_known = self.entered_is_known and not bool(back.any())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let every memory's rows follow the beams."""
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._select_rows(self._every_row().repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows by index or by mask."""
        every_row = self._every_row()
        self._select_rows(every_row[indices.to(every_row.device)])

    def activate_past_recording(self) -> None:
        """Record all tokens from now on."""
        self.records_all = True


def _first_columns(
    noted: torch.Tensor | None, columns: Any, batch: int, device: torch.device, *, beyond: bool
) -> torch.Tensor:
    """What is noted of the first tokens, [batch, columns], bool; `beyond` of those behind the last noted one."""
    if noted is None:
        return torch.full((batch, columns), beyond, dtype=torch.bool, device=device)
    known = noted[:, :columns].to(device, torch.bool)
    return known if known.shape[1] == columns else F.pad(known, (0, columns - known.shape[1]), value=beyond)


def _static(storage: torch.Tensor) -> torch.Tensor:
    """A tensor that compiled graphs and CUDA graphs may write to, as transformers marks the keys."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(storage)
    return storage


def _refuse_other_mask(agrees: torch.Tensor, remedy: str) -> None:
    refuse_unless(
        agrees,
        "attention_mask: it masks earlier tokens that are in the latent memory of this cache, or unmasks "
        "some that are not; they can be removed in a call of several tokens with a dynamic cache that "
        f"records them only{remedy}; otherwise start from an empty cache",
    )
