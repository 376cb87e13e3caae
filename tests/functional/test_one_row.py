"""One token of one row, in place, against the reference; and how exact a long stream stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_talan.functional import fused, reference
from peft_talan.functional.one_row import RowMemory, one_row
from peft_talan.functional.parameters import MIXERS, WRITEBACKS, SidePathOptions

from .inputs import HIDDEN_SIZE, SLOTS, WIDTH, assert_equal_up_to_rounding, memory, side_path_tensors


@torch.no_grad()
@pytest.mark.parametrize("padding", [None, 0, 3])
@pytest.mark.parametrize("writeback", WRITEBACKS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_tokens_one_by_one_equal_the_reference(mixer: Any, writeback: Any, padding: int | None) -> None:
    options, parameters = SidePathOptions(mixer, writeback, cap=0.3), side_path_tensors(mixer, writeback)
    hidden = torch.randn(1, 9, HIDDEN_SIZE, dtype=torch.float64)
    valid = None if padding is None else (torch.arange(9) >= padding).unsqueeze(0)
    state = memory(batch=1) if padding is None else torch.zeros_like(memory(batch=1))
    expected = reference.side_path(hidden, parameters, options, alpha=0.7, valid=valid, state=state.clone())
    row = RowMemory(state, torch.float64)
    for index in range(9):
        now = None if valid is None else valid[:, index : index + 1]
        token = one_row(hidden[:, index : index + 1], parameters, options, row, alpha=0.7, valid=now)
        assert_equal_up_to_rounding(token.hidden_states, expected.hidden_states[:, index : index + 1])
        assert_equal_up_to_rounding(token.weights, expected.weights[0, index])
        assert_equal_up_to_rounding(token.values, expected.values[0, index])
    assert expected.state is not None
    assert_equal_up_to_rounding(state, expected.state)


@torch.no_grad()
@pytest.mark.parametrize("by_row", [False, True])
def test_a_token_counts_after_a_hundred_million_others(by_row: bool) -> None:
    """In a float32 sum of that size, a token would be rounded away."""
    options, exact = SidePathOptions(), side_path_tensors("attention", "add")
    single = exact._replace(
        read=exact.read.float(), write=exact.write.float(), mixer=tuple(tensor.float() for tensor in exact.mixer)
    )
    full = 1e8 * torch.rand(1, SLOTS, WIDTH + 1, dtype=torch.float64) + 1e8
    hidden = torch.randn(1, 300, HIDDEN_SIZE)
    expected = fused.side_path(hidden.double(), exact, options, state=full)
    state = full.clone()
    row = RowMemory(state, torch.float32)
    for token in hidden.split(1, dim=1):
        if by_row:
            one_row(token, single, options, row)
        else:
            state = fused.side_path(token, single, options, state=state).state
    assert state is not None and expected.state is not None
    added = expected.state - full
    # The tokens themselves are computed in float32.
    tolerance = 512 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(state - full, added, rtol=tolerance, atol=tolerance * float(added.abs().max()))
