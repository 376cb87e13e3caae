"""Records of the last tokens of a memory, by which a crop or a later mask takes them out again."""

from __future__ import annotations

import torch

from ..functional.records import TokenRecord, crop_records, join_records
from .device_checks import refuse_unless

RECORDED_TOKENS = 512
"""How many of the last tokens are recorded by default."""

ASK_FOR_RECORDS = "call cache.activate_past_recording() on the empty cache to record all tokens"


class RecentTokens:
    """The records of a memory's last tokens, and its state before them.

    A record is what a mixer needs to compute the state after some tokens from that before them; neither is looked
    into here, so this holds for every mixer.

    Args:
        limit: How many of the last tokens are recorded; 0: none; None: all.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.records: list[TokenRecord] = []
        # [batch, ...], as the mixer has it; None: empty.
        self.state_before: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """The number of recorded tokens, padding included."""
        return sum(record.tokens for record in self.records)

    def set_limit(self, limit: int | None, state: torch.Tensor | None) -> None:
        """Record more or fewer tokens from now on; `state` is that after the last token."""
        if self.limit == 0:
            # A copy: decoded tokens are added to the memory's state in place.
            self.state_before = None if state is None else state.clone()
        self.limit = limit
        self._forget(state)

    def append(self, record: TokenRecord, state: torch.Tensor) -> None:
        """Record the next tokens, after which the memory's state is `state`."""
        if torch.compiler.is_compiling() and self.records:
            # One growing tensor, as the keys are: a growing list would be compiled again at every token.
            record = join_records([*self.records, record])
            self.records.clear()
        self.records.append(record)
        self._forget(state)
        if self.records:
            self.records[-1] = self.records[-1].compact()

    def _forget(self, state: torch.Tensor | None) -> None:
        """Let the state before the records take in the oldest ones, until no more than the limit are left."""
        if self.limit == 0:
            self.clear()
        if self.limit is None or state is None:
            return
        excess = self.count - self.limit
        while excess > 0:
            oldest = self.records.pop(0)
            taken = min(excess, oldest.tokens)
            self.state_before = oldest.part(slice(0, taken)).state_after(self._state_before_like(state))
            if taken < oldest.tokens:
                self.records.insert(0, oldest.part(slice(taken, oldest.tokens)).compact())
            excess -= taken

    def _state_before_like(self, state: torch.Tensor) -> torch.Tensor:
        """Zeros and not None where it is empty, so that what is computed from it has the precision of `state`."""
        return torch.zeros_like(state) if self.state_before is None else self.state_before

    def select_rows(self, rows: torch.Tensor) -> None:
        """Let row i continue row `rows[i]`."""
        if self.state_before is not None:
            self.state_before = self.state_before.index_select(0, rows)
        if self.records:
            # Joined, or beam search would keep one record per token and select the rows of each.
            self.records = [join_records(self.records).select_rows(rows)]

    def check_crop(self, tokens: int) -> None:
        """Refuse to forget more tokens than are recorded."""
        if tokens > self.count:
            raise ValueError(
                f"tokens={tokens}: the latent memory can forget the last {self.count} tokens; start again from an "
                f"empty cache; where it is a dynamic one, {ASK_FOR_RECORDS}"
            )

    def crop(self, tokens: int, state: torch.Tensor) -> torch.Tensor | None:
        """Forget the last tokens, which `check_crop` has found.

        Args:
            tokens: The number of tokens to forget, at least 1.
            state: The memory's state after the last token.

        Returns:
            The state without the tokens.
        """
        self.records, left = crop_records(self.records, tokens, state, self.state_before)
        # A copy: decoded tokens are added to the memory's state in place.
        return left.clone() if left is not None and left is self.state_before else left

    def mask(self, attended: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Remove the tokens that a later mask takes away, such as the padding after a row that ended early.

        Args:
            attended: Which tokens the mask lets through, [batch, tokens so far], bool; `CacheMemories` has checked
                those that are not recorded.
            state: The memory's state after the last token.

        Returns:
            The state without the tokens.

        Raises:
            ValueError: The mask lets padding through that the memory did not take in.
        """
        if not self.records:
            return state
        record = join_records(self.records)
        recent = attended[:, attended.shape[1] - record.tokens :]
        # Where a block is called by itself, nothing else has checked it.
        refuse_unless(
            record.valid | ~recent,
            "attention_mask: it unmasks earlier tokens that were padding when they were read, so the latent memory "
            "has not seen them; start from an empty cache",
        )
        self.records = [record.without(record.valid & ~recent)]
        return self.records[0].state_after(self._state_before_like(state))

    def clear(self) -> None:
        """Forget all records; the next tokens follow an empty memory."""
        self.records, self.state_before = [], None
