"""The latent memory of one side path during generation: it runs the side path and takes its tokens in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..functional.fused import memory_after, side_path
from ..functional.one_token import TokenBuffers, one_token
from ..functional.parameters import SidePathOptions, SidePathParameters, working_dtype
from .refusal import refuse_unless

TOKENS_A_RECORD = 64
"""The number of decoded tokens that become one record: few objects, and little to add up again after a crop."""


class TokenRecord(NamedTuple):
    """What consecutive tokens put into a memory.

    Args:
        weights: e, [batch, tokens, slots]; zero for padding.
        values: z, [batch, tokens, width].
        segment_ids: [batch, tokens], int, where 0 is the segment of the token before the record; None: all 0.
    """

    weights: torch.Tensor
    values: torch.Tensor
    segment_ids: torch.Tensor | None

    def part(self, tokens: slice) -> TokenRecord:
        """The record of some of the tokens."""
        segment_ids = None if self.segment_ids is None else self.segment_ids[:, tokens]
        return TokenRecord(self.weights[:, tokens], self.values[:, tokens], segment_ids)

    def select_rows(self, rows: torch.Tensor) -> TokenRecord:
        """The record of other rows: row i continues row `rows[i]`."""
        segment_ids = None if self.segment_ids is None else self.segment_ids.index_select(0, rows)
        return TokenRecord(self.weights.index_select(0, rows), self.values.index_select(0, rows), segment_ids)


def _join(records: list[TokenRecord]) -> TokenRecord:
    """One record of all the tokens of consecutive records."""
    if len(records) == 1:
        return records[0]
    segment_ids = None
    if any(record.segment_ids is not None for record in records):
        parts: list[torch.Tensor] = []
        for record in records:
            ids = record.segment_ids
            if ids is None:
                ids = torch.zeros(record.weights.shape[:2], dtype=torch.long, device=record.weights.device)
            parts.append(ids if not parts else ids + parts[-1][:, -1:])
        segment_ids = torch.cat(parts, dim=1)
    return TokenRecord(
        torch.cat([record.weights for record in records], dim=1),
        torch.cat([record.values for record in records], dim=1),
        segment_ids,
    )


def _precise(state: torch.Tensor) -> torch.Tensor:
    """In float64 if the device has it: a sum of a million tokens would round each of them in float32."""
    try:
        return state.to(torch.float64)
    except (TypeError, RuntimeError):  # what devices without it raise
        return state


class LatentMemory:
    """The memory of one adapter's side path at one block, for one cache.

    `append` is the only way in: it runs the side path on the next tokens and adds them to the memory.

    Args:
        static: Whether the cache has a fixed size. The memory then keeps its storage, so that compiled graphs and
            CUDA graphs can update it in place, and can't be cropped.
        recorded: Whether what each token puts in is recorded, so that the memory can be cropped. A static memory
            keeps no records. Default True.
    """

    def __init__(self, static: bool, recorded: bool = True) -> None:
        self.static = static
        self.recorded = recorded and not static
        # N and D, [batch, slots, width + 1]; None while nothing has been added.
        self.state: torch.Tensor | None = None
        # The number of tokens in the memory, padding included. On the device if static, as the cache's own length.
        self.length: int | torch.Tensor = 0
        # Set when tokens passed the side path by; the memory then belongs to an earlier point of the sequence.
        self.stale = False
        # In batches of mixed adapters: the rows that the adapter has run for so far, [batch], bool; None: all.
        self.rows: torch.Tensor | None = None
        self._records: list[TokenRecord] = []
        # Views of `state` and space for tokens not yet in `_records`. It is derived: it may be dropped once drained.
        self._buffers: TokenBuffers | None = None

    def __getstate__(self) -> dict[str, Any]:
        self._record_pending()
        # A copied view would not be a view of the copied tensor.
        return {**self.__dict__, "_buffers": None}

    def append(
        self,
        hidden_states: torch.Tensor,
        parameters: SidePathParameters,
        options: SidePathOptions,
        *,
        alpha: float = 1.0,
        valid: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        training: bool = False,
    ) -> torch.Tensor:
        """Run a side path on the tokens that come next and add them to the memory.

        Args:
            hidden_states: h, [batch, tokens, hidden_size].
            parameters: The side path's tensors.
            options: The side path's axes.
            alpha: The strength of the perturbation. Default 1.
            valid: [batch, tokens], bool; False marks padding. None: no token is padding.
            segment_ids: [batch, tokens], int, not falling, where 0 continues the memory's last segment; None: all 0.
            training: Whether dropout is active. Default False.

        Returns:
            h', [batch, tokens, hidden_size].
        """
        one = hidden_states.shape[1] == 1 and segment_ids is None and not (training and options.dropout)
        buffers = self._buffers_for(hidden_states) if one and not torch.compiler.is_compiling() else None
        if buffers is not None:
            written = one_token(hidden_states, parameters, options, buffers, alpha=alpha, valid=valid)
            self._advance(1)
            if self.recorded and buffers.pending == buffers.capacity:
                self._record_pending()
            return written
        output = side_path(
            hidden_states,
            parameters,
            options,
            alpha=alpha,
            valid=valid,
            segment_ids=segment_ids,
            state=self.state,
            training=training,
        )
        self._keep(_precise(output.state))
        self._advance(hidden_states.shape[1])
        if self.recorded:
            self._record_pending()
            self._record(TokenRecord(output.weights, output.values, segment_ids))
        return output.hidden_states

    def _buffers_for(self, hidden_states: torch.Tensor) -> TokenBuffers | None:
        """Views and space to add one token to `state` in place; None if it can't be changed in place.

        In place means without autograd, and `state` must be a tensor that this call may write to: a tensor made in
        inference mode can't be written to outside of it. The views belong to one tensor object: whatever replaces
        `state` (a longer call, other rows, a crop) makes the buffers stale, and they are bound to the new one here.
        """
        state, buffers = self.state, self._buffers
        if state is None or torch.is_grad_enabled() or state.requires_grad:
            return None
        if not torch.is_inference_mode_enabled():
            if state.is_inference():
                self.state = state = state.clone()
            if buffers is not None and buffers.mean.is_inference():
                self._record_pending()
                buffers = None
        dtype = working_dtype(hidden_states.dtype)
        if buffers is None or buffers.dtype is not dtype or buffers.state.shape != state.shape:
            self._record_pending()
            self._buffers = buffers = TokenBuffers(state, dtype, TOKENS_A_RECORD if self.recorded else 1)
        elif buffers.state is not state:
            buffers.rebind(state)
        return buffers

    def _keep(self, state: torch.Tensor) -> None:
        """Make a new state the memory's; a static memory copies it into its own storage."""
        if not self.static:
            self.state = state
        elif self.state is not None:
            self.state.copy_(state)
        else:
            self.state = state.clone()
            if not torch.compiler.is_compiling():
                # As transformers marks the keys: CUDA graphs may then update it in place.
                torch._dynamo.mark_static_address(self.state)

    def _advance(self, tokens: int) -> None:
        if isinstance(self.length, torch.Tensor):
            self.length.add_(tokens)
        elif self.static and self.state is not None:
            self.length = torch.full((), self.length + tokens, device=self.state.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.length)
        else:
            self.length += tokens

    def _record_pending(self) -> None:
        if self.recorded and self._buffers is not None and self._buffers.pending:
            self._records.append(TokenRecord(*self._buffers.drain(), None))

    def _record(self, record: TokenRecord) -> None:
        if torch.compiler.is_compiling() and self._records:
            # One growing tensor, as the keys are: a growing list would be compiled anew at every token.
            self._records = [_join([*self._records, record])]
        else:
            self._records.append(record)

    def covers(self, rows: torch.Tensor | None) -> bool | torch.Tensor:
        """Whether the adapter has run for all tokens of some rows.

        Args:
            rows: [batch], bool; None: all.

        Returns:
            A bool, or a scalar bool tensor.
        """
        if self.rows is None:
            return True
        return (self.rows if rows is None else self.rows | ~rows).all()

    def restrict_to_rows(self, rows: torch.Tensor | None) -> None:
        """Note that the next tokens enter for some rows only, so that the others' memory ends here.

        Args:
            rows: [batch], bool; None: all.
        """
        if rows is not None:
            self.rows = rows if self.rows is None else self.rows & rows

    def forget_masked(self, attended: torch.Tensor) -> None:
        """Remove the tokens that a later mask takes away, such as the padding after a row that ended early.

        Args:
            attended: Which tokens the mask lets through, [batch, tokens so far], bool.

        Raises:
            ValueError: The mask lets padding through that the memory did not take in.
        """
        if self.state is None or not self.recorded:
            return
        self._record_pending()
        record = _join(self._records)
        # The weight of a real token is at least exp(-c).
        entered = record.weights[..., 0] > 0
        refuse_unless(
            entered | ~attended,
            "attention_mask: it unmasks earlier tokens that were padding when they were read, so the latent memory "
            "has not seen them; start from an empty cache",
        )
        removed = (entered & ~attended).unsqueeze(-1)
        gone = torch.where(removed, record.weights, 0.0)
        if record.segment_ids is not None:
            gone = gone * (record.segment_ids == record.segment_ids[:, -1:]).unsqueeze(-1)
        self.state = self.state - _precise(memory_after(record.values, gone, None, None))
        self._records = [record._replace(weights=record.weights.masked_fill(removed, 0.0))]

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
        rows = rows.to(self.state.device)
        if self.rows is not None:
            self.rows = self.rows.index_select(0, rows)
        self.state = self.state.index_select(0, rows)
        self._record_pending()
        if self._records:
            # Joined, or beam search would keep one record a token and select the rows of each.
            self._records = [_join(self._records).select_rows(rows)]

    def crop(self, tokens: int) -> None:
        """Forget the last tokens: they are subtracted, or those that stay are added up again, whichever are fewer.

        Args:
            tokens: The number of tokens to forget.

        Raises:
            ValueError: The memory holds fewer tokens, or has no record of them.
        """
        if tokens == 0 or self.state is None:
            return
        if not self.recorded or not isinstance(self.length, int) or tokens > self.length:
            held = "of a static cache" if self.static else f"of {self.length} tokens"
            raise ValueError(
                f"tokens={tokens}: this latent memory {held} can't be cropped by that number; start again from an "
                "empty cache"
            )
        self._record_pending()
        dropped = self._drop(tokens)
        self.length -= tokens
        if tokens < self.length and all(record.segment_ids is None for record in dropped):
            for record in dropped:
                self.state = self.state - _precise(memory_after(record.values, record.weights, None, None))
        else:
            self.state = self._add_up()

    def _drop(self, tokens: int) -> list[TokenRecord]:
        """Remove the last tokens from the records and return theirs."""
        dropped: list[TokenRecord] = []
        while tokens:
            record = self._records.pop()
            recorded = record.weights.shape[1]
            if recorded > tokens:
                self._records.append(record.part(slice(None, recorded - tokens)))
                record = record.part(slice(recorded - tokens, None))
            tokens -= record.weights.shape[1]
            dropped.append(record)
        return dropped

    def _add_up(self) -> torch.Tensor | None:
        """The state that the records make, from an empty one."""
        state: torch.Tensor | None = None
        for record in self._records:
            state = _precise(memory_after(record.values, record.weights, record.segment_ids, state))
        return state

    def reset(self) -> None:
        """Empty the memory; a static one keeps its storage."""
        self.stale = False
        self.rows = None
        self._records.clear()
        if self._buffers is not None:
            self._buffers.pending = 0
        if self.static and self.state is not None and isinstance(self.length, torch.Tensor):
            self.state.zero_()
            self.length.zero_()
        else:
            self.state, self.length = None, 0
