"""The latent memory of one side path during generation: its state after the last token, and how its tokens come in."""

from __future__ import annotations

from typing import Any

import torch

from ..functional.fused import side_path
from ..functional.one_token import TokenBuffers, make_buffers, one_token
from ..functional.parameters import SidePathOptions, SidePathParameters, working_dtype
from .recent_tokens import RECORDED_TOKENS, RecentTokens
from .token_layout import TokenLayout

TOKENS_PER_RECORD = 64
"""The number of decoded tokens that become one record: few objects, and little to join after a crop."""


def _precise(state: torch.Tensor) -> torch.Tensor:
    """In float64 if the device has it: a sum of a million tokens would round each of them in float32."""
    try:
        return state.to(torch.float64)
    except (TypeError, RuntimeError):  # what devices without it raise
        return state


class LatentMemory:
    """The memory of one adapter's side path at one block, for one cache.

    Its state is what the mixer makes of all tokens so far, [batch, ...]; it is not looked into here.

    Args:
        static: Whether the cache has a fixed size. The memory then keeps its storage, so that compiled graphs and
            CUDA graphs can update it in place, and records nothing.
        max_recorded: How many of the last tokens are recorded, so that they can be taken out again; 0: none; None:
            all. Default `RECORDED_TOKENS`.
    """

    def __init__(self, static: bool, max_recorded: int | None = RECORDED_TOKENS) -> None:
        self.static = static
        # None while nothing has been added.
        self.state: torch.Tensor | None = None
        # The number of tokens in the memory, padding included. On the device if static, as the cache's own length.
        self.length: int | torch.Tensor = 0
        # Set when tokens passed the side path by; the memory then belongs to an earlier point of the sequence.
        self.stale = False
        # In batches of mixed adapters: the rows that the adapter has run for so far, [batch], bool; None: all.
        self.rows: torch.Tensor | None = None
        self.recent = RecentTokens(0 if static else max_recorded)
        # Views of `state` and space for tokens that are not in `recent` yet; derived, so dropped once drained.
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
        layout: TokenLayout = TokenLayout(),  # noqa: B008 - a tuple
        *,
        alpha: float = 1.0,
        training: bool = False,
    ) -> torch.Tensor:
        """Run a side path on the tokens that come next and add them to the memory; see `interface.Memory`."""
        valid, segment_ids = layout.entering, layout.segment_ids
        one = hidden_states.shape[1] == 1 and segment_ids is None and not (training and options.dropout)
        in_place = one and not torch.compiler.is_compiling()
        buffers = self._buffers_for(hidden_states, options.mixer) if in_place else None
        if buffers is not None:
            written = one_token(hidden_states, parameters, options, buffers, alpha=alpha, valid=valid)
            self._advance(1)
            if buffers.pending == buffers.capacity:
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
        self._record_pending()
        self._advance_to(_precise(output.state), hidden_states.shape[1])
        if self.recent.limit != 0 and self.state is not None:
            self.recent.append(output.record, self.state)
        return output.hidden_states

    def limit_records(self, max_recorded: int | None) -> None:
        """Change how many of the last tokens are recorded, from now on."""
        if max_recorded != self.recent.limit:
            self._record_pending()
            self.recent.set_limit(max_recorded, self.state)

    def _buffers_for(self, hidden_states: torch.Tensor, mixer: str) -> TokenBuffers | None:
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
            if buffers is not None and buffers.readable.is_inference():
                self._record_pending()
                buffers = None
        dtype = working_dtype(hidden_states.dtype)
        capacity = 1 if self.recent.limit == 0 else TOKENS_PER_RECORD
        fits = buffers is not None and buffers.dtype is dtype and buffers.capacity == capacity
        if buffers is None or not fits or buffers.state.shape != state.shape:
            self._record_pending()
            self._buffers = buffers = make_buffers(mixer, state, dtype, capacity)
        elif buffers.state is not state:
            buffers.rebind(state)
        return buffers

    def _advance_to(self, state: torch.Tensor, tokens: int) -> None:
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
        self._advance(tokens)

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
        """Make a record of the tokens that the buffers hold."""
        if self.recent.limit != 0 and self.state is not None and self._buffers is not None and self._buffers.pending:
            self.recent.append(self._buffers.drain(), self.state)

    def has_run_for(self, rows: torch.Tensor | None) -> bool | torch.Tensor:
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
        """Note that the next tokens enter for some rows, [batch] bool, only: the others' memory ends here."""
        if rows is not None:
            self.rows = rows if self.rows is None else self.rows & rows

    def recorded(self) -> int:
        """How many of the last tokens are recorded, so that they can be taken out again."""
        self._record_pending()
        return self.recent.count

    def forget_masked(self, attended: torch.Tensor) -> None:
        """Remove the tokens that a later mask takes away; see `RecentTokens.mask`."""
        self._record_pending()
        if self.state is not None:
            self.state = self.recent.mask(attended, self.state)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Let the memory follow its batch rows (beams, repeats, selections)."""
        if self.state is None:
            return
        rows = rows.to(self.state.device)
        if self.rows is not None:
            self.rows = self.rows.index_select(0, rows)
        self._record_pending()
        self.state = self.state.index_select(0, rows)
        self.recent.select_rows(rows)

    def check_crop(self, tokens: int) -> None:
        """Refuse to forget more of the last tokens than are recorded; see `RecentTokens.check_crop`."""
        self._record_pending()
        if self.state is not None:
            self.recent.check_crop(tokens)

    def crop(self, tokens: int) -> None:
        """Forget the last tokens; `ValueError` where they are not recorded."""
        self.check_crop(tokens)
        if tokens and self.state is not None:
            self.state = self.recent.crop(tokens, self.state)
            self.length -= tokens

    def reset(self) -> None:
        """Empty the memory; a static one keeps its storage."""
        self.stale = False
        self.rows = None
        self.recent.clear()
        if self._buffers is not None:
            self._buffers.pending = 0
        if self.static and self.state is not None and isinstance(self.length, torch.Tensor):
            self.state.zero_()
            self.length.zero_()
            if self._buffers is not None:
                self._buffers.rebind(self.state)
        else:
            self.state, self.length = None, 0
