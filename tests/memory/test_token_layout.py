"""Tables of what masks, positions and lengths say about which tokens are real and where samples start."""

from __future__ import annotations

import pytest
import torch

from peft_talan.memory.token_layout import Positions, token_layout


def square(samples: list[int], value: float | bool = False) -> torch.Tensor:
    """A mask [1, 1, tokens, tokens]: each token sees those of its sample up to itself; -1 is padding."""
    ids = torch.tensor(samples)
    visible = ((ids.unsqueeze(0) == ids.unsqueeze(1)) & (ids >= 0)).tril()[None, None]
    return visible if isinstance(value, bool) else torch.zeros(visible.shape).masked_fill(~visible, value)


def spread(layout: torch.Tensor | None, tokens: int) -> list[int]:
    """Numbers from 0 on, as a table shows them."""
    ids = torch.zeros(1, tokens, dtype=torch.long) if layout is None else layout.long()
    return (ids - ids[:, :1]).flatten().tolist()


@pytest.mark.parametrize("value", [False, -50.1, -1e4, -1e9, float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dimensions", [3, 4])
def test_whatever_attention_rounds_to_nothing_is_masked(value: float | bool, dimensions: int) -> None:
    mask = square([-1, 0, 0, 0, 1, 1, -1, 1], value)
    layout = token_layout(mask if dimensions == 4 else mask[:, 0], Positions(), 1, 8)
    assert layout.valid.tolist() == [[False, True, True, True, True, True, False, True]]
    assert spread(layout.segment_ids[:, layout.valid[0]], 6) == [0, 0, 0, 1, 1, 1]


FLAT = {
    "holes": ([1, 1, 1, 0, 0, 1, 1], [0, 1, 2, 0, 0, 3, 4], "real", [0, 0, 0, 0, 0, 0, 0]),
    "right padding": ([1, 1, 1, 0, 0], [0, 1, 2, 0, 0], "real", [0, 0, 0, 0, 0]),
    "left padding": ([0, 0, 1, 1, 1], [0, 0, 0, 1, 2], "real", [0, 0, 0, 0, 0]),
    "samples with padding between": ([1, 1, 0, 1, 1], [0, 1, 0, 0, 1], "real", [0, 0, 0, 1, 1]),
    "a mask ends transformers' rule": ([1, 1, 1, 1], [0, 1, 0, 1], "steps", [0, 0, 0, 0]),
    "falling": (None, [0, 1, 2, 0, 1], "steps", [0, 0, 0, 1, 1]),
    "jumping": (None, [0, 1, 2, 7, 8, 9], "steps", [0, 0, 0, 1, 1, 1]),
    "standing": (None, [0, 0, 0], "steps", [0, 1, 2]),
    "flash attention": (None, [0, 1, 5, 0, 1], "zeros", [0, 0, 0, 1, 1]),
    "flash attention, all real": ([1, 1, 1, 1], [0, 1, 0, 1], "zeros", [0, 0, 1, 1]),
    "flash attention, unpadded": ([1, 1, 0, 1], [0, 1, 0, 0], "zeros", [0, 0, 0, 0]),
    "by the mask alone": (None, [0, 1, 0, 1], None, [0, 0, 0, 0]),
}


@pytest.mark.parametrize(("mask", "positions", "rule", "expected"), FLAT.values(), ids=FLAT)
def test_positions_start_samples(
    mask: list[int] | None, positions: list[int], rule: str | None, expected: list[int]
) -> None:
    flat = None if mask is None else torch.tensor([mask])
    layout = token_layout(flat, Positions(torch.tensor([positions]), rule=rule), 1, len(positions))
    assert spread(layout.segment_ids, len(positions)) == expected
    assert (layout.valid is None) == (mask is None)
    if mask is not None:
        assert layout.valid.long().tolist() == [mask]


def test_lengths_and_sample_numbers_start_samples() -> None:
    lengths, numbers = torch.tensor([0, 2, 5, 6], dtype=torch.int32), torch.tensor([[4, 4, 1, 1, 1, 7]])
    for positions in (Positions(cu_seq_lens=lengths), Positions(seq_idx=numbers)):
        assert token_layout(None, positions, 1, 6).segment_ids.tolist() == [[0, 0, 1, 1, 1, 2]]
    both_rows = token_layout(None, Positions(cu_seq_lens=lengths), 2, 3).segment_ids
    assert both_rows.tolist() == [[0, 0, 1], [0, 0, 1]]


def test_with_a_cache_only_positions_that_fall_separate() -> None:
    """Attention separates nothing there, but two samples are never one sequence."""
    positions = Positions(torch.tensor([[0, 1, 5, 0, 1]]), rule="steps")
    assert token_layout(None, positions, 1, 5, has_cache=True).segment_ids.tolist() == [[0, 0, 0, 1, 1]]
    assert token_layout(None, positions, 1, 5, 3, has_cache=True).segment_ids is None


@pytest.mark.parametrize("past", [4, torch.tensor(4)])
def test_the_columns_of_a_call_behind_a_cache(past: int | torch.Tensor) -> None:
    flat = torch.tensor([[0, 1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1]])
    layout = token_layout(flat, Positions(), 2, 3, past)
    assert layout.valid.tolist() == [[True, False, True], [True, True, True]]
    assert layout.attended.sum(-1).tolist() == [5, 7]
    one = token_layout(flat[:, :5], Positions(), 2, 1, past)
    assert one.valid.tolist() == [[True], [True]]
    assert one.attended.sum(-1).tolist() == [4, 5]
    if isinstance(past, int):
        assert torch.equal(layout.attended_past, flat[:, :4].bool())
    # A static cache has columns after the call's, a sliding window begins late.
    longer = square([-1, 0, 0, 0, 0, -1, 0, -1, -1, -1])[:, :, 4:7]
    assert token_layout(longer, Positions(), 1, 3, past).valid.tolist() == [[True, False, True]]
    window = square([0, 0, 0, 0, 0])[:, :, 2:]
    assert token_layout(window, Positions(), 1, 3, past).segment_ids.unique().numel() == 1


@pytest.mark.parametrize("cut", [2, 5, 6])
def test_packed_samples_in_chunks(cut: int) -> None:
    mask = square([0, 0, 0, 0, 0, 1, 1, 1])
    layout = token_layout(mask[:, :, cut:], Positions(), 1, 8 - cut, cut)
    starts = [1 if index == 5 else 0 for index in range(cut, 8)]
    assert layout.segment_ids.tolist() == [torch.tensor(starts).cumsum(0).tolist()]


def test_a_window_and_a_chunk_are_inside_one_sample() -> None:
    window = square([0] * 8) & ~torch.ones(8, 8, dtype=torch.bool).tril(-3)
    assert token_layout(window, Positions(), 1, 8).segment_ids.unique().numel() == 1
    chunks = Positions(torch.arange(8).unsqueeze(0), rule=None)
    assert token_layout(square([0, 0, 0, 0, 1, 1, 1, 1]), chunks, 1, 8, chunked=True).segment_ids.unique().numel() == 1


def test_masks_of_several_blocks_and_of_keys_alone() -> None:
    full, padding = square([-1, 0, 0, 0]), torch.tensor([False, True, True, True])
    for mask in (
        {"sliding_attention": square([0, 1, 2, 3]), "full_attention": full},
        {"linear_attention": None, "full_attention": full},
        padding.view(1, 1, 1, 4),
        torch.zeros(1, 2, 1, 4).masked_fill(~padding, -1e9),
    ):
        assert token_layout(mask, Positions(), 1, 4).valid.tolist() == [padding.tolist()]


@pytest.mark.parametrize(
    "mask",
    [
        # Two branches that share a prefix; a token that leaves one out; one that sees more than the token before it.
        torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]),
        torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]),
        torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 1]]),
    ],
)
def test_what_is_no_sequence_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"attention_mask.*row of its own"):
        token_layout(mask[None, None].bool(), Positions(), 1, mask.shape[0])


def test_masks_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask.*no token sees itself"):
        token_layout(~square([0, 0, 0]), Positions(), 1, 3)
    for mask in (torch.ones(3), object()):
        with pytest.raises(TypeError, match=r"attention_mask.*\[batch, keys\]"):
            token_layout(mask, Positions(), 1, 3)
