"""From what a block is given (attention mask, position ids) to which tokens are real and where samples start."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenLayout(NamedTuple):
    """Which tokens of a call enter the memory, and which share one.

    Args:
        valid: [batch, tokens], bool; False marks padding. None: every token is real.
        segment_ids: [batch, tokens], int, not falling and starting at 0; None: one sample a row.
    """

    valid: torch.Tensor | None
    segment_ids: torch.Tensor | None


def _columns_of_call(mask: torch.Tensor, tokens: int, past: int | torch.Tensor) -> torch.Tensor:
    """Cut the mask's last axis down to the tokens of this call.

    A dynamic cache's keys end with this call's; a static one's go on after them, and a sliding window's begin late.
    In all of these the call's own keys begin at the smaller of the tokens seen before and the keys that were there.
    """
    room = mask.shape[-1] - tokens
    if isinstance(past, int):
        start = min(past, room)
        return mask[..., start : start + tokens]
    columns = torch.arange(tokens, device=mask.device) + past.to(mask.device).clamp(max=room)
    return mask.index_select(-1, columns)


def _attended(mask: torch.Tensor) -> torch.Tensor:
    """True where an attention mask, boolean or additive, lets a token through."""
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point():
        return mask > torch.finfo(mask.dtype).min / 2
    return mask != 0


def _valid_token(mask: torch.Tensor, past: int | torch.Tensor) -> torch.Tensor:
    """Whether the one token of a call is real, [batch, 1]: two operations at most, since decoding asks every time."""
    if mask.dim() == 4 and mask.shape[1] > 1:
        mask = mask[:, :1]
    if isinstance(past, torch.Tensor):
        column = mask.index_select(-1, past.to(mask.device).view(1))
    else:
        # Not by an index, for which a compiled graph would be made anew at each.
        column = mask.narrow(-1, min(past, mask.shape[-1] - 1), 1)
    return _attended(column.view(-1, 1))


def _segments_from_positions(position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """A sample starts where the position does not rise; this is how flash attention is told of packing, too."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] < 2:
        return None
    falls = position_ids[:, 1:] <= position_ids[:, :-1]
    if not torch.compiler.is_compiling() and not bool(falls.any()):
        return None
    return torch.nn.functional.pad(falls.cumsum(1), (1, 0))


def _segments_from_mask(
    visible: torch.Tensor, valid: torch.Tensor, position_ids: torch.Tensor | None
) -> torch.Tensor | None:
    """A sample starts at a real token that neither sees the real token before it nor goes on with its positions.

    Both are asked for: a block with chunked attention also looks away at its chunks' borders, inside one sample.
    """
    batch, tokens = valid.shape
    index = torch.arange(tokens, device=valid.device)
    last_valid = torch.where(valid, index, -1).cummax(1).values
    before = torch.nn.functional.pad(last_valid[:, :-1], (1, 0), value=-1)
    column = before.clamp(min=0)
    sees_it = visible.gather(-1, column.unsqueeze(-1)).squeeze(-1)
    starts = valid & (before >= 0) & ~sees_it
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == tokens:
        positions = position_ids.expand(batch, tokens)
        starts = starts & (positions <= positions.gather(1, column))
    if not torch.compiler.is_compiling() and not bool(starts.any()):
        return None
    return starts.cumsum(1)


def token_layout(
    attention_mask: object,
    position_ids: torch.Tensor | None,
    batch: int,
    tokens: int,
    past: int | torch.Tensor = 0,
) -> TokenLayout:
    """Work out which tokens are real and where packed samples start.

    Args:
        attention_mask: What the block was given: None, [batch, keys] (flash attention) or [batch, heads or 1, tokens,
            keys], boolean or additive.
        position_ids: [batch or 1, tokens]; anything of another rank (multimodal positions) is not read.
        batch: The number of rows.
        tokens: The number of tokens of this call.
        past: How many tokens a cache held before this call.

    Returns:
        Validity and segments of this call's tokens.

    Raises:
        TypeError: The attention mask is of a kind that does not show which tokens are padding.
    """
    starts_here = isinstance(past, int) and past == 0
    if attention_mask is None:
        segment_ids = _segments_from_positions(position_ids) if starts_here and tokens > 1 else None
        return TokenLayout(None, None if segment_ids is None else segment_ids.expand(batch, tokens))
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() not in (2, 4):
        raise TypeError(
            f"attention_mask={type(attention_mask).__name__}: the side path reads masks of 2 or 4 dimensions; load "
            "the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2'"
        )
    if tokens == 1:
        valid = _valid_token(attention_mask, past)
        return TokenLayout(valid if valid.shape[0] == batch else valid.expand(batch, 1), None)
    if attention_mask.dim() == 2:
        valid = _attended(_columns_of_call(attention_mask, tokens, past)).expand(batch, tokens)
        segment_ids = _segments_from_positions(position_ids) if starts_here else None
        return TokenLayout(valid, None if segment_ids is None else segment_ids.expand(batch, tokens))
    visible = _attended(_columns_of_call(attention_mask[:, 0], tokens, past))
    # A token that is not padding always sees itself.
    valid = visible.diagonal(dim1=-2, dim2=-1).expand(batch, tokens)
    return TokenLayout(valid, _segments_from_mask(visible.expand(batch, tokens, tokens), valid, position_ids))
