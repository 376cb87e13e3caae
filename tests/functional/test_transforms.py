"""What PyTorch does with functions beside running them: transforms, second derivatives, empty and meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from peft_talan.functional import fused, reference
from peft_talan.functional.one_token import make_buffers, one_token
from peft_talan.functional.parameters import MIXERS, WRITEBACKS, SidePathOptions, SidePathParameters

from .inputs import (
    HIDDEN_SIZE,
    MIXERS_AND_SCOPES,
    assert_equal_up_to_rounding,
    layout,
    memory,
    side_path_tensors,
)

TOKENS = 70


def _forward_mode(loss: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(hidden, hidden.cos()))).tangent


TRANSFORMS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "grad": lambda loss, hidden: torch.func.grad(loss)(hidden),
    "per-sample gradients": lambda loss, hidden: torch.func.vmap(torch.func.grad(lambda row: loss(row[None])))(hidden),
    "jvp": lambda loss, hidden: torch.func.jvp(loss, (hidden,), (hidden.cos(),))[1],
    "hessian-vector product": lambda loss, hidden: torch.func.jvp(torch.func.grad(loss), (hidden,), (hidden.cos(),))[
        1
    ],
    "forward mode": _forward_mode,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_transforms_give_what_they_give_of_the_reference(mixer: Any, transform: str) -> None:
    parameters, options = side_path_tensors(mixer, "gated"), SidePathOptions(mixer, "gated")
    hidden = torch.randn(2, TOKENS, HIDDEN_SIZE, dtype=torch.float64)
    found, expected = (
        TRANSFORMS[transform](
            lambda h, module=module: module.side_path(h, parameters, options).hidden_states.pow(3).mean(), hidden
        )
        for module in (fused, reference)
    )
    assert_equal_up_to_rounding(found, expected)


@pytest.mark.parametrize("mixer", MIXERS)
def test_second_derivatives_equal_the_reference(mixer: Any) -> None:
    for writeback in WRITEBACKS:
        for kind in ("plain", "segments", "state"):
            parameters, given = side_path_tensors(mixer, writeback), layout(kind, 2, TOKENS, mixer)
            options = SidePathOptions(mixer, writeback, grad_scale=0.5)
            leaves = (torch.randn(2, TOKENS, HIDDEN_SIZE, dtype=torch.float64), *parameters[:1], *parameters.mixer)
            leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
            both = []
            for module in (fused, reference):
                tensors = parameters._replace(read=leaves[1], mixer=leaves[2:])
                output = module.side_path(leaves[0], tensors, options, **given)
                loss = output.hidden_states.pow(3).mean() + output.state.pow(3).mean()
                first = torch.autograd.grad(loss, leaves, create_graph=True)
                penalty = sum(gradient.square().sum() for gradient in first)
                both.append(torch.autograd.grad(penalty, leaves))
            for found, expected in zip(*both, strict=True):
                assert_equal_up_to_rounding(found, expected)


@pytest.mark.parametrize("shape", [(0, 1), (0, 5), (0, TOKENS), (2, 0), (0, 0)])
@pytest.mark.parametrize(("mixer", "scope"), MIXERS_AND_SCOPES)
def test_no_rows_and_no_tokens_are_sequences_too(mixer: Any, scope: Any, shape: tuple[int, int]) -> None:
    for module in (fused, reference):
        for kind in ("plain", "all"):
            hidden = torch.randn(*shape, HIDDEN_SIZE, dtype=torch.float64, requires_grad=True)
            given: dict[str, Any] = {}
            if kind == "all":
                given = {
                    "valid": torch.ones(shape, dtype=torch.bool),
                    "segment_ids": torch.zeros(shape, dtype=torch.long),
                    "state": memory(shape[0], mixer),
                }
            parameters = side_path_tensors(mixer, "add")
            output = module.side_path(hidden, parameters, SidePathOptions(mixer, "add", scope), **given)
            assert output.hidden_states.shape == hidden.shape
            assert output.state.shape == (shape[0], *parameters.state_shape(mixer))
            if shape[1] == 0:
                assert torch.equal(output.state, given.get("state", torch.zeros_like(output.state)))
            (output.hidden_states.sum() + output.state.sum()).backward()


def on_meta(parameters: SidePathParameters) -> SidePathParameters:
    mixer = tuple(tensor.to("meta") for tensor in parameters.mixer)
    return SidePathParameters(parameters.read.to("meta"), mixer, parameters.write.to("meta"))


@pytest.mark.parametrize("module", [fused, reference])
@pytest.mark.parametrize("mixer", MIXERS)
def test_shapes_are_found_on_the_meta_device(mixer: Any, module: ModuleType) -> None:
    for tokens in (1, TOKENS):
        hidden = torch.empty(2, tokens, HIDDEN_SIZE, dtype=torch.float64, device="meta")
        parameters = on_meta(side_path_tensors(mixer, "add"))
        assert module.side_path(hidden, parameters, SidePathOptions(mixer)).hidden_states.shape == hidden.shape


@pytest.mark.parametrize(("rows", "device"), [(0, "cpu"), (2, "meta")])
@pytest.mark.parametrize("mixer", MIXERS)
def test_one_token_of_no_row_and_on_the_meta_device(mixer: Any, rows: int, device: str) -> None:
    parameters = side_path_tensors(mixer, "add")
    buffers = make_buffers(mixer, memory(rows, mixer).to(device), torch.float64)
    hidden = torch.randn(rows, 1, HIDDEN_SIZE, dtype=torch.float64).to(device)
    with torch.no_grad():
        given = on_meta(parameters) if device == "meta" else parameters
        assert one_token(hidden, given, SidePathOptions(mixer), buffers).shape == hidden.shape
