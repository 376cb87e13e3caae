"""The delta rule against the gated one of transformers, and what its gates promise."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from peft_talan.functional import delta, delta_reference

from .inputs import BATCH, SLOTS, WIDTH, assert_equal_up_to_rounding, memory, remix_inputs


@pytest.mark.parametrize("tokens", [1, 31, 70])
@pytest.mark.parametrize("rule", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
def test_erasing_what_is_written_is_the_gated_delta_rule(rule: object, tokens: int) -> None:
    values, queries, weights = remix_inputs("delta", BATCH, tokens)
    weights[..., 1] = weights[..., 0]
    state = memory(BATCH, "delta")
    found, final_state = delta.remix(values, queries, weights, None, state)
    _, erase, log_kept, keys = delta_reference.split_weights(weights)
    # Theirs is in float32, has heads, divides queries by the root of their length, and leaves the norm to a module.
    expected, expected_state = rule(
        delta_reference.normalised(queries).unsqueeze(2).float() * SLOTS**0.5,
        keys.unsqueeze(2).float(),
        values.unsqueeze(2).float(),
        g=log_kept.float(),
        beta=erase.float(),
        initial_state=state.unsqueeze(1).float(),
        output_final_state=True,
    )
    assert_equal_up_to_rounding(found.float(), delta_reference.scaled(expected.squeeze(2)))
    assert_equal_up_to_rounding(final_state.float(), expected_state.squeeze(1))


def weights_of(write: float, erase: float, kept: float, keys: torch.Tensor) -> torch.Tensor:
    gates = torch.tensor([write, erase, kept], dtype=torch.float64)
    gates[2] = gates[2].log()
    return torch.cat([gates.expand(*keys.shape[:2], 3), keys], dim=-1)


def test_without_erasing_it_counts_and_with_it_overwrites() -> None:
    keys = torch.zeros(1, 100, SLOTS, dtype=torch.float64)
    keys[..., 1] = 1.0
    values = torch.randn(1, 100, WIDTH, dtype=torch.float64)
    _, added = delta.remix(values, keys, weights_of(1.0, 0.0, 1.0, keys))
    assert_equal_up_to_rounding(added[0, 1], values[0].sum(0))
    _, replaced = delta.remix(values, keys, weights_of(1.0, 1.0, 1.0, keys))
    assert_equal_up_to_rounding(replaced[0, 1], values[0, -1])
    assert not replaced[0, 0].any() and not replaced[0, 2].any()


def test_a_token_that_forgets_everything_divides_by_nothing() -> None:
    values, queries, weights = remix_inputs("delta", 1, 70)
    weights[:, 40, 2] = -1e5
    leaves = [tensor.requires_grad_() for tensor in (values, queries, weights)]
    results = []
    for tensors in (leaves, [tensor[:, 40:] for tensor in leaves]):
        readouts, state = delta.remix(*tensors)
        gradients = torch.autograd.grad(readouts[:, -30:].sum() + state.sum(), leaves)
        results.append([readouts[:, -30:], state, *gradients])
    for found, expected in zip(*results, strict=True):
        assert_equal_up_to_rounding(found, expected)
