"""The fused operators against the reference: outputs, memories and every gradient."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch

from peft_talan.functional import fused, reference
from peft_talan.functional.parameters import MIXERS, WRITEBACKS, SidePathOptions

from .inputs import (
    BATCH,
    HIDDEN_SIZE,
    MIXERS_AND_SCOPES,
    SLOTS,
    WIDTH,
    assert_equal_up_to_rounding,
    layout,
    side_path_tensors,
)

LENGTHS = (1, 2, 63, 64, 65, 200)
"""One token, two, and both sides of a chunk's and a tile's end; the last makes several of them."""


def outputs_and_gradients(
    module: ModuleType, hidden: torch.Tensor, parameters: Any, options: SidePathOptions, given: dict[str, Any]
) -> list[torch.Tensor]:
    """h', the memory, and the gradients of both by the hidden states, all parameters and the initial memory."""
    hidden = hidden.clone().requires_grad_()
    read, write = parameters.read.clone().requires_grad_(), parameters.write.clone().requires_grad_()
    mixer = tuple(tensor.clone().requires_grad_() for tensor in parameters.mixer)
    gate = None if parameters.gate is None else parameters.gate.clone().requires_grad_()
    leaves = [hidden, read, write, *mixer] + ([] if gate is None else [gate])
    if "state" in given:
        given = {**given, "state": given["state"].clone().requires_grad_()}
        leaves.append(given["state"])
    output = module.side_path(
        hidden, parameters._replace(read=read, write=write, mixer=mixer, gate=gate), options, alpha=0.7, **given
    )
    directions = torch.Generator().manual_seed(1)
    scalar = sum(
        (tensor * torch.randn(tensor.shape, dtype=tensor.dtype, generator=directions)).sum()
        for tensor in (output.hidden_states, output.state)
    )
    gradients = torch.autograd.grad(scalar, leaves, materialize_grads=True)
    return [output.hidden_states, output.state, output.record.weights, output.record.values, *gradients]


def test_twins_take_the_same_arguments() -> None:
    both = {name for name, value in vars(fused).items() if inspect.isfunction(value)} & set(vars(reference))
    twins = {name for name in both if getattr(fused, name) is not getattr(reference, name)}
    assert {"read", "remix", "write_back", "side_path"} <= twins
    for name in twins:
        ours, theirs = (inspect.signature(getattr(module, name)).parameters.values() for module in (fused, reference))
        assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs], name


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(("mixer", "scope"), MIXERS_AND_SCOPES)
def test_outputs_memories_and_gradients_equal_the_reference(mixer: Any, scope: Any, tokens: int) -> None:
    for writeback in WRITEBACKS:
        for kind in ("plain", "padded", "segments", "state", "all"):
            hidden = torch.randn(BATCH, tokens, HIDDEN_SIZE, dtype=torch.float64)
            parameters, given = side_path_tensors(mixer, writeback), layout(kind, BATCH, tokens, mixer)
            options = SidePathOptions(mixer, writeback, scope, cap=0.3, grad_scale=0.5, soft_cap=7.0)
            found = outputs_and_gradients(fused, hidden, parameters, options, given)
            expected = outputs_and_gradients(reference, hidden, parameters, options, given)
            for a, b in zip(found, expected, strict=True):
                assert torch.isfinite(b).all()
                assert_equal_up_to_rounding(a, b)


@pytest.mark.parametrize("given", ["plain", "all"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_splitting_anywhere_and_carrying_the_memory_equals_one_pass(mixer: Any, given: str) -> None:
    tokens, options, parameters = 70, SidePathOptions(mixer), side_path_tensors(mixer, "add")
    hidden = torch.randn(BATCH, tokens, HIDDEN_SIZE, dtype=torch.float64)
    rest = layout(given, BATCH, tokens, mixer)
    state = rest.pop("state", None)
    whole = fused.side_path(hidden, parameters, options, state=state, **rest)
    for split in range(1, tokens):
        first = fused.side_path(
            hidden[:, :split], parameters, options, state=state, **{k: v[:, :split] for k, v in rest.items()}
        )
        later = {name: tensor[:, split:] for name, tensor in rest.items()}
        if "segment_ids" in later:
            later["segment_ids"] = later["segment_ids"] - rest["segment_ids"][:, split - 1 : split]
        second = fused.side_path(hidden[:, split:], parameters, options, state=first.state, **later)
        found = torch.cat([first.hidden_states, second.hidden_states], dim=1)
        assert_equal_up_to_rounding(found, whole.hidden_states)
        assert_equal_up_to_rounding(second.state, whole.state)


@pytest.mark.parametrize("writeback", WRITEBACKS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_one_token_steps_equal_one_pass(mixer: Any, writeback: Any) -> None:
    options, parameters = SidePathOptions(mixer, writeback), side_path_tensors(mixer, writeback)
    hidden, rest = torch.randn(BATCH, 70, HIDDEN_SIZE, dtype=torch.float64), layout("padded", BATCH, 70)
    whole, state, steps = fused.side_path(hidden, parameters, options, **rest), None, []
    for t in range(70):
        step = fused.side_path(
            hidden[:, t : t + 1], parameters, options, state=state, valid=rest["valid"][:, t : t + 1]
        )
        state = step.state
        steps.append(step.hidden_states)
    assert_equal_up_to_rounding(torch.cat(steps, dim=1), whole.hidden_states)
    assert_equal_up_to_rounding(state, whole.state)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_token_does_not_see_later_ones(mixer: Any) -> None:
    options, parameters = SidePathOptions(mixer), side_path_tensors(mixer, "add")
    hidden = torch.randn(1, 130, HIDDEN_SIZE, dtype=torch.float64)
    before = fused.side_path(hidden, parameters, options).hidden_states
    for t in (1, 31, 32, 63, 64, 129):
        changed = torch.cat([hidden[:, :t], torch.randn_like(hidden[:, t:])], dim=1)
        after = fused.side_path(changed, parameters, options).hidden_states
        assert_equal_up_to_rounding(after[:, :t], before[:, :t])
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 0


@pytest.mark.parametrize(("mixer", "scope"), MIXERS_AND_SCOPES)
def test_padding_and_packing_equal_separate_runs(mixer: Any, scope: Any) -> None:
    options, parameters = SidePathOptions(mixer, scope=scope), side_path_tensors(mixer, "add")
    lengths = (3, 64, 1, 37)
    alone = [torch.randn(1, length, HIDDEN_SIZE, dtype=torch.float64) for length in lengths]
    expected = [fused.side_path(hidden, parameters, options).hidden_states for hidden in alone]

    packed = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).unsqueeze(0)
    found = fused.side_path(torch.cat(alone, dim=1), parameters, options, segment_ids=packed).hidden_states
    assert_equal_up_to_rounding(found, torch.cat(expected, dim=1))

    # Padding holds large numbers: were it read, the neighbours would not be equal.
    batch = torch.full((len(lengths), max(lengths), HIDDEN_SIZE), 1e3, dtype=torch.float64)
    valid = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for row, hidden in enumerate(alone):
        batch[row, max(lengths) - hidden.shape[1] :] = hidden
        valid[row, max(lengths) - hidden.shape[1] :] = True
    found = fused.side_path(batch, parameters, options, valid=valid).hidden_states
    assert_equal_up_to_rounding(found[valid], torch.cat(expected, dim=1)[0])


@pytest.mark.parametrize("module", [reference, fused], ids=["reference", "fused"])
@pytest.mark.parametrize("writeback", WRITEBACKS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_no_gradient_is_nan_where_there_is_nothing_to_divide_by(
    mixer: Any, writeback: Any, module: ModuleType
) -> None:
    for tokens in (1, 40):
        for zero_write in (False, True):
            hidden = torch.randn(BATCH, tokens, HIDDEN_SIZE, dtype=torch.float64)
            hidden[0] = 0
            parameters = side_path_tensors(mixer, writeback)
            if zero_write:
                parameters = parameters._replace(write=torch.zeros_like(parameters.write))
            valid = torch.ones(BATCH, tokens, dtype=torch.bool)
            valid[:, : tokens - tokens // 2] = False
            for tensor in outputs_and_gradients(
                module, hidden, parameters, SidePathOptions(mixer, writeback), {"valid": valid}
            ):
                assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_memory_stays_in_float32(mixer: Any, dtype: torch.dtype) -> None:
    parameters = side_path_tensors(mixer, "add")
    parameters = parameters._replace(
        read=parameters.read.float(), write=parameters.write.float(), mixer=tuple(t.float() for t in parameters.mixer)
    )
    hidden = torch.randn(BATCH, 70, HIDDEN_SIZE).to(dtype)
    for tokens in (1, 70):
        plain = fused.side_path(hidden[:, :tokens], parameters, SidePathOptions(mixer))
        with torch.autocast("cpu", torch.bfloat16):
            automatic = fused.side_path(hidden[:, :tokens], parameters, SidePathOptions(mixer))
        exact = fused.side_path(hidden[:, :tokens].float(), parameters, SidePathOptions(mixer))
        for output in (plain, automatic):
            assert output.hidden_states.dtype == dtype
            assert output.state is not None and output.state.dtype == torch.float32
            assert torch.equal(output.state, exact.state)
            torch.testing.assert_close(output.hidden_states.float(), exact.hidden_states, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("writeback", WRITEBACKS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_gradcheck_of_the_whole_side_path(mixer: Any, writeback: Any) -> None:
    tokens = 36
    parameters, given = side_path_tensors(mixer, writeback), layout("all", 1, tokens, mixer)
    hidden = torch.randn(1, tokens, HIDDEN_SIZE, dtype=torch.float64)

    def run(hidden: torch.Tensor, read: torch.Tensor, write: torch.Tensor, state: torch.Tensor, *mixer_: Any) -> Any:
        output = fused.side_path(
            hidden,
            parameters._replace(read=read, write=write, mixer=mixer_),
            SidePathOptions(mixer, writeback, cap=0.3),
            **{**given, "state": state},
        )
        return output.hidden_states, output.state

    leaves = (hidden, parameters.read, parameters.write, given["state"], *parameters.mixer)
    # fast_mode compares the Jacobians along random directions: the whole ones would take minutes.
    assert torch.autograd.gradcheck(run, tuple(leaf.requires_grad_() for leaf in leaves), fast_mode=True)


@pytest.mark.parametrize("given", ["plain", "all"])
@pytest.mark.parametrize(
    ("mixer", "scope"), [*((mixer, "causal") for mixer in MIXERS), ("attention", "bidirectional")]
)
def test_compiled_without_a_graph_break(mixer: Any, scope: Any, given: str) -> None:
    torch._dynamo.reset()
    parameters, options = side_path_tensors(mixer, "capped"), SidePathOptions(mixer, "capped", scope, cap=0.3)
    hidden, rest = torch.randn(BATCH, 70, HIDDEN_SIZE, dtype=torch.float64), layout(given, BATCH, 70, mixer)
    leaves = [hidden, parameters.read, parameters.write, *parameters.mixer]
    for leaf in leaves:
        leaf.requires_grad_()
    direction = torch.randn_like(hidden)
    results = []
    for side_path in (fused.side_path, torch.compile(fused.side_path, fullgraph=True, backend="aot_eager")):
        output = side_path(hidden, parameters, options, **rest)
        loss = (output.hidden_states * direction).sum() + output.state.square().sum()
        results.append([output.hidden_states, output.state, *torch.autograd.grad(loss, leaves)])
    for compiled, eager in zip(results[1], results[0], strict=True):
        assert_equal_up_to_rounding(compiled, eager)


def test_memory_after_is_the_memory_of_a_pass() -> None:
    for kind in ("plain", "padded", "segments", "state", "all"):
        given = layout(kind, BATCH, 70)
        hidden = torch.randn(BATCH, 70, HIDDEN_SIZE, dtype=torch.float64)
        output = reference.side_path(hidden, side_path_tensors("linear", "add"), SidePathOptions("linear"), **given)
        found = fused.memory_after(
            output.record.values, output.record.weights, given.get("segment_ids"), given.get("state")
        )
        assert found.shape == (BATCH, SLOTS, WIDTH + 1)
        assert_equal_up_to_rounding(found, output.state)
