"""The latent memories that one cache carries: how many tokens they hold, and what is done to all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .latent_memory import LatentMemory
from .recent_tokens import ASK_FOR_RECORDS, RECORDED_TOKENS
from .token_layout import TokenLayout, refuse_unless


class CacheMemories:
    """The latent memories that a cache carries, by block and adapter.

    Args:
        static: Whether the cache has a fixed size.
        window: How many tokens the cache holds before it can't be cropped any more; None: it always can.
        records_all: Whether the cache records its past without a limit.
    """

    def __init__(self, static: bool = False, window: int | None = None, records_all: bool = False) -> None:
        self.static = static
        self.window = window
        self.records_all = records_all
        # By the block's index and the name of its child that has the side paths, then by adapter.
        self.memories: dict[tuple[int, str], dict[str, LatentMemory]] = {}
        # The number of real tokens that the memories hold, [batch], and before the current call; None: all tokens.
        self.num_real: torch.Tensor | None = None
        self.num_real_before: torch.Tensor | int | None = None
        # False after a crop of packed samples: how many of the tokens that went were real is not known.
        self.num_real_is_exact = True
        # What a cache without keys looked like after the last call; see `recurrent_version`.
        self.recurrent_version: tuple[Any, ...] | None = None
        self._is_following = False

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

    def count(self, past: int | torch.Tensor, batch: int, tokens: int, layout: TokenLayout) -> None:
        """Count the tokens of a call in, and refuse a mask that takes away earlier ones which can't be removed."""
        after: int | torch.Tensor
        if self.num_real is None and layout.valid is None and layout.segment_ids is None and not self.static:
            return
        before = past if self.num_real is None else self.num_real
        self.num_real_before = before if self.num_real_is_exact and not self.static else None
        if layout.segment_ids is None:
            entering = tokens if layout.valid is None else layout.valid
            if isinstance(entering, torch.Tensor):
                entering = entering.squeeze(1) if tokens == 1 else entering.sum(-1)
            after = before + entering
        else:
            last = layout.segment_ids[:, -1:]
            inside = layout.segment_ids == last
            inside = inside if layout.valid is None else inside & layout.valid
            after = inside.sum(-1) + before * (last[:, 0] == 0)
        if layout.attended is not None:
            records = self.max_recorded(past + tokens) != 0
            if self.num_real_is_exact and (layout.attended_past is None or not records):
                remedy = "" if self.static else f"; {ASK_FOR_RECORDS}"
                refuse_unless(
                    layout.attended == after,
                    "attention_mask: it masks earlier tokens that are in the latent memory of this cache, or unmasks "
                    "some that are not; they can be removed in a call of several tokens with a dynamic cache that "
                    f"records them only{remedy}; otherwise start from an empty cache",
                )
            after, self.num_real_is_exact = layout.attended, True
        self._store_num_real(after, batch)

    def _store_num_real(self, num_real: int | torch.Tensor, batch: int) -> None:
        if self.static and self.num_real is not None:
            self.num_real.copy_(num_real) if isinstance(num_real, torch.Tensor) else self.num_real.fill_(num_real)
            return
        if isinstance(num_real, torch.Tensor) and num_real.shape == (batch,) and not self.static:
            self.num_real = num_real
            return
        device = num_real.device if isinstance(num_real, torch.Tensor) else None
        self.num_real = torch.zeros(batch, dtype=torch.long, device=device) + num_real
        if self.static and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.num_real)

    def _select_rows(self, rows: torch.Tensor) -> None:
        if self.num_real is not None:
            self.num_real = self.num_real.index_select(0, rows.to(self.num_real.device))
        for memory in self:
            memory.select_rows(rows)

    def reset(self) -> None:
        """Empty every memory."""
        self.num_real_is_exact = True
        if self.static and self.num_real is not None:
            self.num_real.zero_()
        else:
            self.num_real = None
        for memory in self:
            memory.reset()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget tokens that are not recorded; their number is negative, as in transformers."""
        for memory in self:
            if not memory.stale:
                memory.check_crop(abs(tokens_to_remove))

    def crop(self, tokens_to_remove: int) -> None:
        """Let every memory forget the last tokens; their number is negative, as in transformers."""
        num_real: torch.Tensor | None = None
        for memory in self:
            if not memory.stale:
                num_real = memory.crop(abs(tokens_to_remove))
        if self.num_real is not None and tokens_to_remove:
            if num_real is None:
                self.num_real_is_exact = False
            else:
                self.num_real = self.num_real - num_real.to(self.num_real.device)

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
