"""What tokens added to a memory: an earlier state, made from it, is that of a pass over the tokens that stay."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from peft_talan.functional import fused, reference
from peft_talan.functional.parameters import SidePathOptions
from peft_talan.functional.records import TokenRecord, crop_records, join_records

from .inputs import BATCH, HIDDEN_SIZE, SLOTS, WIDTH, assert_equal_up_to_rounding, layout, padding, side_path_tensors

TOKENS = 70
KINDS = pytest.mark.parametrize("kind", ["plain", "padded", "segments", "state", "all"])
MIXERS = pytest.mark.parametrize("mixer", ["attention", "delta"])
SPLITS = ([0, TOKENS], [0, 1, 2, 33, TOKENS], [0, 32, 64, TOKENS])


def a_pass(kind: str, mixer: str = "attention") -> tuple[torch.Tensor, Any, dict[str, Any]]:
    """Hidden states, tensors, and the other arguments of a pass."""
    hidden = torch.randn(BATCH, TOKENS, HIDDEN_SIZE, dtype=torch.float64)
    return hidden, side_path_tensors(mixer, "add"), layout(kind, BATCH, TOKENS, mixer)


def parts(record: TokenRecord, bounds: list[int]) -> list[TokenRecord]:
    return [record.part(slice(start, end)) for start, end in pairwise(bounds)]


@KINDS
@MIXERS
def test_the_state_after_a_record_is_that_of_the_pass(kind: str, mixer: Any) -> None:
    hidden, parameters, given = a_pass(kind, mixer)
    output = fused.side_path(hidden, parameters, SidePathOptions(mixer), **given)
    for bounds in SPLITS:
        state = given.get("state")
        for part in parts(output.record, bounds):
            state = part.state_after(state)
        assert state is not None
        assert_equal_up_to_rounding(state, output.state)


@KINDS
def test_parts_joined_are_the_whole(kind: str) -> None:
    hidden, parameters, given = a_pass(kind)
    record = reference.side_path(hidden, parameters, SidePathOptions(), **given).record
    for bounds in SPLITS:
        pieces = parts(record, bounds)
        assert [piece.tokens for piece in pieces] == torch.tensor(bounds).diff().tolist()
        for joined, whole in zip(join_records(pieces), record, strict=True):
            assert (joined is None) == (whole is None)
            assert joined is None or torch.equal(joined, whole)


def test_records_with_and_without_segments_join() -> None:
    hidden, parameters, given = a_pass("segments")
    record = reference.side_path(hidden, parameters, SidePathOptions(), **given).record
    first, last = record.part(slice(0, 40)), record.part(slice(40, TOKENS))._replace(segment_ids=None)
    ids = join_records([first, last]).segment_ids
    assert ids is not None
    assert torch.equal(ids[:, :40], given["segment_ids"][:, :40])
    assert torch.equal(ids[:, 40:], given["segment_ids"][:, 39:40].expand(-1, TOKENS - 40))


@KINDS
@pytest.mark.parametrize("bounds", SPLITS)
@MIXERS
def test_cropped_is_a_pass_over_the_tokens_that_stay(kind: str, mixer: Any, bounds: list[int]) -> None:
    hidden, parameters, given = a_pass(kind, mixer)
    initial = given.pop("state", None)
    output = reference.side_path(hidden, parameters, SidePathOptions(mixer), state=initial, **given)
    records = parts(output.record, bounds)
    for tokens in (0, 1, 6, 37, 38, TOKENS - 1):
        stay = TOKENS - tokens
        first = {name: tensor[:, :stay] for name, tensor in given.items()}
        expected = reference.side_path(hidden[:, :stay], parameters, SidePathOptions(mixer), state=initial, **first)
        kept, state = crop_records(records, tokens, output.state, initial)
        assert state is not None
        assert_equal_up_to_rounding(state, expected.state)
        weights = join_records(kept).weights
        # A sigmoid rounds as the length of the tensor has it.
        assert mixer == "delta" or torch.equal(weights, expected.record.weights)
        assert_equal_up_to_rounding(weights, expected.record.weights)
        assert [record.tokens for record in records] == [record.tokens for record in parts(output.record, bounds)]
    assert crop_records(records, TOKENS, output.state, initial) == ([], initial)
    with pytest.raises(ValueError, match=rf"tokens={TOKENS + 1}.*{TOKENS}"):
        crop_records(records, TOKENS + 1, output.state, initial)


@KINDS
@MIXERS
def test_tokens_taken_away_are_padding(kind: str, mixer: Any) -> None:
    hidden, parameters, given = a_pass(kind, mixer)
    output = reference.side_path(hidden, parameters, SidePathOptions(mixer), **given)
    removed = torch.rand(BATCH, TOKENS) < 0.3
    kept = output.record.without(removed)
    valid = given.pop("valid", torch.ones(BATCH, TOKENS, dtype=torch.bool)) & ~removed
    expected = reference.side_path(hidden, parameters, SidePathOptions(mixer), valid=valid, **given)
    assert torch.equal(kept.weights, expected.record.weights)
    assert torch.equal(kept.valid, valid)
    assert_equal_up_to_rounding(kept.state_after(given.get("state")), expected.state)
    if mixer == "delta":
        with pytest.raises(NotImplementedError, match="state_after"):
            output.record.subtract_from(output.state)
    else:
        assert_equal_up_to_rounding(output.record.without(~removed).subtract_from(output.state), expected.state)


def test_rows_follow() -> None:
    hidden, parameters, given = a_pass("all")
    rows = torch.tensor([1, 1, 0])
    given["valid"] = padding(BATCH, TOKENS)
    record = reference.side_path(hidden, parameters, SidePathOptions(), **given).record
    given = {name: tensor[rows] for name, tensor in given.items()}
    expected = reference.side_path(hidden[rows], parameters, SidePathOptions(), **given)
    assert_equal_up_to_rounding(record.select_rows(rows).state_after(given["state"]), expected.state)
    assert record.select_rows(rows).segment_ids is not None


def test_a_compact_record_keeps_its_own_numbers_alive_and_no_others() -> None:
    hidden, parameters, _ = a_pass("plain")
    record = fused.side_path(hidden, parameters, SidePathOptions()).record
    compact = record.compact()
    sizes = [tensor.untyped_storage().nbytes() for tensor in (compact.weights, compact.values)]
    assert sizes == [BATCH * TOKENS * channels * hidden.element_size() for channels in (SLOTS, WIDTH)]
    for copied, original in zip(compact[:2], record[:2], strict=True):
        assert torch.equal(copied, original)


def test_sums_have_the_precision_of_the_state() -> None:
    hidden, parameters, given = a_pass("state")
    record = reference.side_path(hidden, parameters, SidePathOptions(), **given).record
    single = TokenRecord(record.weights.float(), record.values.float())
    state = single.state_after(given["state"])
    assert state.dtype == single.subtract_from(state).dtype == torch.float64
    for tokens in (1, TOKENS - 1):
        _, cropped = crop_records([single], tokens, state)
        assert cropped is not None and cropped.dtype == torch.float64
