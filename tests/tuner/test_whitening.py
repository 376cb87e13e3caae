"""What side paths read is whitened by data before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_talan import TalanLayer, initialize_talan_weights
from peft_talan.functional.initialization import whitened
from peft_talan.tuner.measured_pass import TokenSums, normalized

from ..small_models import logits, make_config, make_model, make_several, make_tokens, rounding

FRESH = make_config(init_talan_weights=True, talan_layers="all")


def reads(model: torch.nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """The reads of every side path of an adapter."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if f"lora_talan_read.{adapter_name}." in name
    }


def test_white_inputs_have_no_direction_that_outweighs_others() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5_000, 12, dtype=torch.float64) * torch.logspace(0, 2, 12, dtype=torch.float64) + 30
    weight = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    sums = TokenSums()
    sums.add(normalized(hidden))
    moment = sums.means()[1]
    found = whitened(weight, moment, 1e-9)
    # A full set of orthogonal rows reads white values: of mean square 1, and unrelated to each other.
    torch.testing.assert_close(found @ moment @ found.T, torch.eye(12, dtype=torch.float64), atol=1e-6, rtol=0)
    # With much shrinkage, nothing but the rows' lengths changes.
    scaled = whitened(weight, moment, 1e9)
    direction = scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    torch.testing.assert_close(direction, weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("axes", [{}, {"talan_mixer": "delta"}, {"talan_position": "input"}, {"talan_mixer": "mlp"}])
def test_the_output_stays_that_of_a_fresh_adapter(axes: dict[str, Any]) -> None:
    model = make_model("qwen3", make_config(init_talan_weights=True, talan_layers="all", **axes))
    model.train()
    before, expected = reads(model), logits(model.eval())
    model.train()
    initialize_talan_weights(model, [{"input_ids": make_tokens(4, 40), "labels": make_tokens(4, 40)}])
    assert model.training
    after = reads(model)
    assert before and all(not torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model.eval()), expected)


def test_padding_and_batches_change_nothing() -> None:
    rows = make_tokens(3, 30)
    padded = torch.cat([rows, torch.zeros_like(rows[:, :7])], 1)
    mask = torch.cat([torch.ones_like(rows), torch.zeros_like(rows[:, :7])], 1)
    models = [make_model("qwen3", FRESH) for _ in range(2)]
    initialize_talan_weights(models[0], [{"input_ids": row[None]} for row in rows])
    initialize_talan_weights(models[1], [{"input_ids": padded, "attention_mask": mask}])
    for first, second in zip(*(reads(model).values() for model in models), strict=True):
        torch.testing.assert_close(first, second, **rounding())


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_read_has_a_mean_square_of_1_over_all_tokens_but_the_first_of_each_sample(packed: bool) -> None:
    rows = make_tokens(3, 30)
    positions = {"position_ids": torch.arange(30).repeat(3)[None]} if packed else {}
    model, streams = make_model("qwen3", FRESH), {}
    layers = [layer for layer in model.modules() if isinstance(layer, TalanLayer)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, args: streams.update({layer: normalized(args[0])}))
    initialize_talan_weights(model, [{"input_ids": rows.reshape(1 if packed else 3, -1), **positions}])
    for layer in layers:
        x = streams[layer].reshape(3, 30, -1)[:, 1:].flatten(0, 1)
        read = x @ layer.parameters_of("default").read.to(x.dtype).T
        torch.testing.assert_close(read.square().mean(0), torch.ones(read.shape[1], dtype=x.dtype))


def test_logits_are_made_of_few_tokens() -> None:
    model, made = make_model("qwen3", FRESH), []
    model.get_base_model().lm_head.register_forward_hook(lambda *call: made.append(call[2].shape[1]))
    initialize_talan_weights(model, [{"input_ids": make_tokens(3, 30)}])
    assert made == [1]


def test_only_the_named_adapter_changes() -> None:
    model = make_several({"one": {}, "two": {"init_talan_weights": True}})
    before = reads(model, "one")
    initialize_talan_weights(model, [{"input_ids": make_tokens()}], adapter_name="two")
    assert all(torch.equal(tensor, before[name]) for name, tensor in reads(model, "one").items())


@pytest.mark.parametrize(
    ("trained", "options", "message"),
    [
        (False, {"adapter_name": "other"}, "adapter_name='other'"),
        (False, {"shrinkage": 0.0}, "shrinkage=0.0"),
        (False, {"dataloader": []}, "dataloader: it gave no token"),
        (True, {}, "give an adapter that is fresh"),
    ],
)
def test_what_cannot_be_done_is_refused(trained: bool, options: dict[str, Any], message: str) -> None:
    model: PeftModel = make_model("qwen3", make_config(init_talan_weights=not trained))
    before = reads(model)
    with pytest.raises(ValueError, match=message):
        initialize_talan_weights(model, **{"dataloader": [{"input_ids": make_tokens()}], **options})
    assert all(torch.equal(tensor, before[name]) for name, tensor in reads(model).items())
