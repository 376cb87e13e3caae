"""One token of every row, in place, against the reference; and how exact a long stream stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from peft_talan.functional import fused, reference
from peft_talan.functional.one_token import TokenBuffers, make_buffers, one_token
from peft_talan.functional.parameters import MIXERS, WRITEBACKS, SidePathOptions

from .inputs import HIDDEN_SIZE, SLOTS, WIDTH, assert_equal_up_to_rounding, memory, side_path_tensors


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("padding", [None, 0, 3])
@pytest.mark.parametrize("writeback", WRITEBACKS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_tokens_one_by_one_equal_the_reference(mixer: Any, writeback: Any, padding: int | None, batch: int) -> None:
    options = SidePathOptions(mixer, writeback, cap=0.3, soft_cap=7.0)
    parameters = side_path_tensors(mixer, writeback)
    hidden = torch.randn(batch, 9, HIDDEN_SIZE, dtype=torch.float64)
    state, valid = memory(batch, mixer), None
    if padding is not None:
        state = torch.zeros_like(state)
        # Of three rows, the first is all padding.
        valid = torch.arange(9) >= padding * torch.arange(batch, 0, -1).unsqueeze(1)
    expected = reference.side_path(hidden, parameters, options, alpha=0.7, valid=valid, state=state.clone())
    tokens = make_buffers(mixer, state, torch.float64, capacity=9)
    for index in range(9):
        now = None if valid is None else valid[:, index : index + 1]
        written = one_token(hidden[:, index : index + 1], parameters, options, tokens, alpha=0.7, valid=now)
        assert_equal_up_to_rounding(written, expected.hidden_states[:, index : index + 1])
    weights, values, _ = tokens.drain()
    assert_equal_up_to_rounding(weights, expected.record.weights)
    assert_equal_up_to_rounding(values, expected.record.values)
    assert expected.state is not None
    assert_equal_up_to_rounding(state, expected.state)


def as_an_optimizer(tensors: Sequence[torch.Tensor]) -> None:
    """Fused kernels count no version of what they write to."""
    trained = [nn.Parameter(tensor) for tensor in tensors]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(trained, lr=0.5, fused=True).step()


def into_other_memory(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.data = tensor * 0.5


WRITES: dict[str, Callable[[Sequence[torch.Tensor]], object]] = {
    "nothing": lambda tensors: None,
    "in place": lambda tensors: [tensor.mul_(0.5) for tensor in tensors],
    "through .data": lambda tensors: [tensor.data.copy_(tensor * 0.5) for tensor in tensors],
    "an optimizer": as_an_optimizer,
    "into other memory": into_other_memory,
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_tensors_may_change_between_tokens(mixer: Any, write: str, dtype: torch.dtype) -> None:
    """In whatever way they are written to, in the dtype that is computed in or in half precision; and as others."""
    options, parameters = SidePathOptions(mixer), side_path_tensors(mixer, "add", dtype)
    hidden, state = torch.randn(2, 4, HIDDEN_SIZE, dtype=torch.float64), memory(mixer=mixer)
    tokens, expected_state = make_buffers(mixer, state, torch.float64), state.clone()
    for index, token in enumerate(hidden.split(1, dim=1)):
        if index == 3:
            parameters = side_path_tensors(mixer, "add", dtype)
        elif index:
            WRITES[write]([parameters.read, *parameters.mixer, parameters.write])
        expected = reference.side_path(token, parameters, options, state=expected_state)
        assert expected.state is not None
        expected_state = expected.state
        assert_equal_up_to_rounding(one_token(token, parameters, options, tokens), expected.hidden_states)


@torch.no_grad()
def test_autocast_rounds_nothing() -> None:
    options, exact = SidePathOptions(), side_path_tensors("attention", "add")
    parameters = exact._replace(read=exact.read.float(), write=exact.write.float())
    token, state, written = torch.randn(2, 1, HIDDEN_SIZE), memory(), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            written.append(one_token(token, parameters, options, TokenBuffers(state.clone(), torch.float32)))
    assert torch.equal(*written)


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_a_token_counts_after_a_hundred_million_others(in_place: bool) -> None:
    """In a float32 sum of that size, a token would be rounded away."""
    options, exact = SidePathOptions(), side_path_tensors("attention", "add")
    single = exact._replace(
        read=exact.read.float(), write=exact.write.float(), mixer=tuple(tensor.float() for tensor in exact.mixer)
    )
    full = 1e8 * torch.rand(1, SLOTS, WIDTH + 1, dtype=torch.float64) + 1e8
    hidden = torch.randn(1, 300, HIDDEN_SIZE)
    expected = fused.side_path(hidden.double(), exact, options, state=full)
    state = full.clone()
    tokens = TokenBuffers(state, torch.float32)
    for token in hidden.split(1, dim=1):
        if in_place:
            one_token(token, single, options, tokens)
        else:
            state = fused.side_path(token, single, options, state=state).state
    assert state is not None and expected.state is not None
    added = expected.state - full
    # The tokens themselves are computed in float32.
    tolerance = 512 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(state - full, added, rtol=tolerance, atol=tolerance * float(added.abs().max()))
