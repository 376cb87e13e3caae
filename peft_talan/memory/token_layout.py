"""Which tokens are real and where samples start, from what a model or a block is given: masks, positions, lengths.

Everything is computed on the device: nothing here is read by the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .device_checks import refuse_unless

MASKED_BELOW = -50.0
"""An additive mask below this masks: attention multiplies such a token by exp(-50), less than any rounding error."""

PLAIN_MASKS = ("full_attention", "sliding_attention", "indexed_attention", "chunked_attention")
"""The kinds of 4-D masks that transformers puts into a dictionary by kind of block, those that see most first."""


class TokenLayout(NamedTuple):
    """Which tokens of a call enter the memory, and which share one.

    Args:
        valid: [batch, tokens], bool; False marks padding. None: every token is real.
        segment_ids: [batch, tokens], int, not falling, where 0 continues what came before the call; None: all 0.
        attended_past: [batch, past], bool: which earlier tokens this call's mask lets through. None: not known.
        attended: [batch, columns], bool: which tokens up to the call's last one its mask lets through; behind a past
            that is an int, past + tokens columns. None: not known.
        counts: [batch, tokens]: how many tokens each stands for in a memory. None: for one.
    """

    valid: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    attended_past: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    counts: torch.Tensor | None = None

    @property
    def entering(self) -> torch.Tensor | None:
        """How many times each token enters a memory, [batch, tokens]: `valid`, times `counts` where there are any."""
        if self.counts is None or self.valid is None:
            return self.valid if self.counts is None else self.counts
        return self.counts * self.valid

    def to(self, device: torch.device) -> TokenLayout:
        """The same layout on a device."""
        if all(part is None or part.device == device for part in self):
            return self
        return TokenLayout(*(None if part is None else part.to(device) for part in self))

    def copy(self) -> TokenLayout:
        """The same layout in memory of its own."""
        return TokenLayout(*(None if part is None else part.clone() for part in self))


class Positions(NamedTuple):
    """Where packed samples start by what is given beside the mask.

    Args:
        position_ids: [batch or 1, tokens]; anything of another rank (multimodal positions) is not read.
        cu_seq_lens: [samples + 1], int: where each sample starts among the tokens of all rows, and their number.
        seq_idx: [batch, tokens], int: the sample of each token.
        rule: Which positions start a sample. `"steps"`: those that are not the previous one plus 1, if there is no
            mask and no cache (transformers' rule for masks that it makes); with an empty cache, for which it
            separates nothing, those that do not rise. `"zeros"`: those of a single row that are
            0, if no token is masked (flash attention). `"real"`: those that are not the previous real token's plus
            1. None: none.
    """

    position_ids: torch.Tensor | None = None
    cu_seq_lens: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None
    rule: str | None = "real"


def token_layout(
    attention_mask: object,
    positions: Positions,
    batch: int,
    tokens: int,
    past: int | torch.Tensor = 0,
    *,
    has_cache: bool = False,
    chunked: bool = False,
) -> TokenLayout:
    """Work out which tokens are real and where packed samples start.

    Args:
        attention_mask: None, [batch, keys], [batch, tokens, keys], [batch, heads or 1, tokens or 1, keys], boolean or
            additive, or a dictionary of such masks by kind of block.
        positions: What else separates samples.
        batch: The number of rows.
        tokens: The number of tokens of this call.
        past: The number of tokens that a cache held before this call. Default 0.
        has_cache: Whether there is a cache, be it empty. Default False.
        chunked: Whether the mask may be that of one block with chunked attention, which also looks away at its
            chunks' borders, inside one sample. Default False.

    Returns:
        The layout of this call's tokens.

    Raises:
        TypeError: The attention mask is of a kind that does not show which tokens are padding.
        ValueError: A token sees earlier tokens, but not all of those between them and itself.
    """
    mask = _choose_mask(attention_mask)
    starts_here = isinstance(past, int) and past == 0
    starts = _starts_by_lengths(positions, batch, tokens)
    if mask is None:
        starts = _either(starts, _starts_by_positions(positions, None, has_cache, starts_here, batch, tokens))
        return TokenLayout(None, _segments(starts, None))
    if mask.dim() == 4 and not (tokens > 1 and mask.shape[2] == 1):
        layout = _layout_of_square(mask, batch, tokens, past, positions if chunked else None)
        if starts is None:
            return layout
        return layout._replace(segment_ids=_segments(starts, layout.valid), attended=None)
    flat = _attended(mask) if mask.dim() == 2 else _attended(mask).any(1)[:, 0]
    valid = _columns_of_call(flat, tokens, past)
    if valid.shape != (batch, tokens):
        valid = valid.expand(batch, tokens)
    starts = _either(starts, _starts_by_positions(positions, valid, has_cache, starts_here, batch, tokens))
    attended_past = None
    if isinstance(past, int) and past and flat.shape[1] == past + tokens and tokens > 1:
        attended_past = flat[:, :past].expand(batch, past)
    attended = _up_to_call(flat, batch, tokens, past) if starts is None else None
    return TokenLayout(valid, _segments(starts, valid), attended_past, attended)


def _choose_mask(attention_mask: object) -> torch.Tensor | None:
    """One tensor of 2 or 4 dimensions; of a dictionary, the mask that sees most."""
    if isinstance(attention_mask, dict):
        kinds = [kind for kind in PLAIN_MASKS if kind in attention_mask] or list(attention_mask)
        masks = [attention_mask[kind] for kind in kinds]
        attention_mask = next((mask for mask in masks if mask is not None), None)
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() not in (2, 3, 4):
        given = f"{attention_mask.dim()}-D tensor" if isinstance(attention_mask, torch.Tensor) else "object"
        raise TypeError(
            f"attention_mask={type(attention_mask).__name__} ({given}): the side path can't read from it which tokens "
            "are padding; give the model a mask [batch, keys] with 1 for real tokens and 0 for padding, or "
            "[batch, 1, tokens, keys]"
        )
    return attention_mask.unsqueeze(1) if attention_mask.dim() == 3 else attention_mask


def _attended(mask: torch.Tensor) -> torch.Tensor:
    """True where an attention mask, boolean, 0 and 1 or additive, lets a token through."""
    if mask.dtype == torch.bool:
        return mask
    # A mask [batch, keys] of floats holds 0 and 1.
    if mask.is_floating_point() and mask.dim() != 2:
        return mask > MASKED_BELOW
    return mask != 0


def _columns_of_call(mask: torch.Tensor, tokens: int, past: int | torch.Tensor) -> torch.Tensor:
    """Cut the mask's last axis down to the tokens of this call.

    A dynamic cache's keys end with this call's; a static one's go on after them, and a sliding window's begin late.
    In all of these the call's own keys begin at the smaller of the tokens seen before and the keys that were there.
    """
    most = mask.shape[-1] - tokens
    if isinstance(past, int):
        # Not by an index, for which a graph would be compiled again at each.
        return mask.narrow(-1, max(min(past, most), 0), min(tokens, mask.shape[-1]))
    if tokens == 1:
        return mask.index_select(-1, past.to(mask.device).clamp(max=most).view(1))
    return mask.index_select(-1, torch.arange(tokens, device=mask.device) + past.to(mask.device).clamp(max=most))


def _up_to_call(visible: torch.Tensor, batch: int, tokens: int, past: int | torch.Tensor) -> torch.Tensor | None:
    """What the last token of a call sees, [batch, columns], none after it; None where some are missing."""
    if not isinstance(past, int):
        visible = visible & (torch.arange(visible.shape[1], device=visible.device) < past.to(visible.device) + tokens)
    elif not past or visible.shape[1] != past + tokens:
        return None
    return visible if len(visible) == batch else visible.expand(batch, -1)


def _either(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first | second


def _segments(starts: torch.Tensor | None, valid: torch.Tensor | None) -> torch.Tensor | None:
    return None if starts is None else (starts if valid is None else starts & valid).cumsum(1)


def _starts_by_lengths(positions: Positions, batch: int, tokens: int) -> torch.Tensor | None:
    """Starts by sequence lengths or sample numbers, [batch, tokens]; the call's first tokens are none."""
    if tokens == 1:
        return None
    ids = positions.seq_idx
    if ids is None or ids.dim() != 2 or ids.shape[1] != tokens:
        lengths = positions.cu_seq_lens
        if lengths is None or lengths.dim() != 1:
            return None
        index = torch.arange(batch * tokens, device=lengths.device, dtype=lengths.dtype).view(batch, tokens)
        ids = torch.bucketize(index, lengths[1:-1], right=True)
    return torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0)).expand(batch, tokens)


def _starts_by_positions(
    positions: Positions, valid: torch.Tensor | None, has_cache: bool, starts_here: bool, batch: int, tokens: int
) -> torch.Tensor | None:
    """Starts by position ids, [batch, tokens]; the call's first real tokens are none."""
    ids, rule = positions.position_ids, positions.rule
    if rule is None or tokens == 1 or ids is None or ids.dim() != 2 or ids.shape[1] != tokens:
        return None
    if rule == "zeros":
        if batch > 1:
            return None
        starts = torch.nn.functional.pad(ids[:, 1:] == 0, (1, 0))
        return starts if valid is None else starts & valid.all()
    if rule == "steps" and (valid is not None or not starts_here):
        return None
    if rule == "steps" and has_cache:
        return torch.nn.functional.pad(ids[:, 1:] <= ids[:, :-1], (1, 0)).expand(batch, tokens)
    if valid is None:
        return torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1] + 1, (1, 0)).expand(batch, tokens)
    before = _last_before(valid)
    ids = ids.expand(batch, tokens)
    return valid & (before >= 0) & (ids != ids.gather(1, before.clamp(min=0)) + 1)


def _last_before(real: torch.Tensor) -> torch.Tensor:
    """The index of the last True before each column, or -1, [batch, columns]."""
    index = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, index, -1).cummax(1).values
    return torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)


def _layout_of_square(
    mask: torch.Tensor, batch: int, tokens: int, past: int | torch.Tensor, chunks: Positions | None
) -> TokenLayout:
    """The layout by a mask of queries and keys, [batch or 1, heads or 1, tokens, keys].

    A token is real if it sees itself. A sample starts at a real token that does not see the real token before it. A
    window, which sees the last tokens only, starts nothing.
    """
    visible = _attended(mask)
    visible = visible[:, 0] if visible.shape[1] == 1 else visible.any(1)
    if tokens == 1:
        valid = _columns_of_call(visible, 1, past).view(-1, 1)
        return TokenLayout(valid.expand(batch, 1), None, None, _up_to_call(visible[:, 0], batch, 1, past))
    keys = visible.shape[-1]
    if keys < tokens:
        raise ValueError(
            f"attention_mask: expected a mask with a column for each of the {tokens} tokens, got shape "
            f"{tuple(mask.shape)}"
        )
    column = torch.arange(keys, device=visible.device)
    most = keys - tokens
    first = min(past, most) if isinstance(past, int) else past.to(visible.device).clamp(max=most)
    own = (column[:tokens] + first).expand(visible.shape[0], tokens)
    at_or_before = visible & (column <= own[:1].unsqueeze(-1))
    valid = visible.gather(-1, own.unsqueeze(-1)).squeeze(-1)
    refuse_unless(
        valid.any() | ~visible.any(),
        "attention_mask: no token sees itself in it, so it does not show which tokens are padding; in a boolean mask "
        "True lets a token through; give the model a mask [batch, keys] with 1 for real tokens",
    )
    real = at_or_before.any(1)
    up_to = real.cumsum(1)
    oldest = at_or_before.to(torch.uint8).argmax(-1)
    between = up_to.gather(1, own) - up_to.gather(1, oldest) + 1
    before = _last_before(real).gather(1, own)
    # The first token of all starts a sample, too, which drops a memory that is empty.
    starts = valid & (oldest == own)
    if chunks is not None and chunks.position_ids is not None and chunks.position_ids.dim() == 2:
        ids = chunks.position_ids.expand(visible.shape[0], tokens)
        previous = (before - first).clamp(min=0)
        starts = starts & (before >= 0) & (ids != ids.gather(1, previous) + 1)
    else:
        # The tokens that a token sees must be a run of real tokens inside its sample, up to itself.
        sample = torch.where(starts, own, 0).cummax(1).values
        run = (at_or_before.sum(-1) == between) & (oldest >= sample)
        refuse_unless(
            run | ~valid,
            "attention_mask: a token sees earlier tokens, but not all of those between them and itself (branches that "
            "share a prefix, a sparse pattern); the side path's memory is one sequence a row: give each branch a row "
            "of its own, with the prefix repeated",
        )
    whole = chunks is None
    return TokenLayout(
        valid.expand(batch, tokens),
        starts.cumsum(1).expand(batch, tokens),
        None,
        _up_to_call(at_or_before[:, -1], batch, tokens, past) if whole else None,
    )
