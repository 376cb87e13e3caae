"""Side paths that start as a memory of what answers depend on beyond the window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional as F

from peft_talan import initialize_talan_recall
from peft_talan.functional.initialization import copying_rows, telling_row
from peft_talan.sft.window import with_sliding_window

from ..small_models import logits, make_base, make_config, make_model, make_tokens, rounding
from ..trainers.test_window import make_full

WINDOW = 6
AXES = {"talan_mixer": "linear", "talan_writeback": "relative", "talan_layers": "all"}


def windowed(architecture: str = "llama", **axes: Any) -> PeftModel:
    """A fresh adapter on a model with a window."""
    config = make_config(**{"init_talan_weights": True, "init_lora_weights": True, **AXES, **axes})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(with_sliding_window(make_full(architecture).to(torch.float64), WINDOW), config)
    return model.to(torch.float64).eval()


def rows(number: int = 4, tokens: int = 24, answer: int = 3) -> dict[str, torch.Tensor]:
    """Rows that end with an answer, which is trained on."""
    ids = make_tokens(number, tokens)
    labels = ids.clone()
    labels[:, :-answer] = -100
    return {"input_ids": ids, "labels": labels}


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def answers_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """The loss of the answers' tokens but the last of each, with the model's window."""
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"]).logits[:, :-1]
    labels = batch["labels"][:, 1:].clone()
    labels[:, -1] = -100
    return float(F.cross_entropy(found.flatten(0, 1), labels.flatten()))


def test_a_telling_row_is_0_for_all_tokens_and_1_for_those_that_it_tells() -> None:
    torch.manual_seed(0)
    x = torch.randn(4_000, 10, dtype=torch.float64) + 3
    x[:100, 4] += 30
    mean, moment = x.mean(0), x.T @ x / len(x)
    row = telling_row(x[:100].mean(0), mean, moment, 1e-6)
    torch.testing.assert_close(row @ mean, torch.zeros((), dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(row @ x[:100].mean(0), torch.ones((), dtype=torch.float64))
    # Not one of the others is taken for them.
    assert (x[:100] @ row).min() > (x[100:] @ row).max()


def test_copying_rows_are_the_map_where_the_rank_allows_it() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(12, 3, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    x = torch.randn(500, 12, dtype=torch.float64)
    moment, mean = x.T @ x / len(x), torch.randn(12, dtype=torch.float64)
    read, write = copying_rows(left, right, mean, moment, 5, 0.1)
    assert read.shape == (5, 12) and write.shape == (12, 5)
    blind = torch.eye(12, dtype=torch.float64) - torch.outer(mean, mean) / (mean @ mean)
    torch.testing.assert_close(write @ read, left @ right @ blind)
    # Of a smaller rank: no map of that rank is nearer, for tokens of this moment. What is shared lies apart here.
    shared = torch.eye(12, dtype=torch.float64)[-1]
    right, moment = right * (1 - shared), moment.clone()
    moment[-1, :-1] = moment[:-1, -1] = 0
    read, write = copying_rows(left, right, shared, moment, 2, 1e-12)
    root = torch.linalg.cholesky(moment)
    left_over = torch.linalg.matrix_norm((write @ read - left @ right) @ root)
    torch.testing.assert_close(left_over, torch.linalg.svdvals(left @ right @ root)[2])


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "starcoder2"])
@pytest.mark.parametrize("position", ["input", "output"])
def test_the_answers_are_no_less_likely_and_the_model_is_left_as_it_was(architecture: str, position: str) -> None:
    model, batch = windowed(architecture, talan_position=position), rows()
    model.train()
    model.config._attn_implementation = "sdpa"
    before, loss = state(model), answers_loss(model.eval(), batch)
    model.train()
    initialize_talan_recall(model, [batch])
    assert model.training
    assert model.config._attn_implementation == "sdpa" and model.config.sliding_window == WINDOW
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert changed and all("lora_talan_" in name for name in changed)
    assert any("lora_talan_read" in name for name in changed)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert answers_loss(model.eval(), batch) <= loss * (1 + 1e-12)


def test_padding_changes_nothing() -> None:
    # Attention that tells its weights rounds them to float32.
    models, batch = [windowed() for _ in range(2)], rows()
    initialize_talan_recall(models[0], [batch])
    padded = {name: F.pad(part, (0, 5), value=-100 if name == "labels" else 0) for name, part in batch.items()}
    padded["attention_mask"] = F.pad(torch.ones_like(batch["input_ids"]), (0, 5))
    initialize_talan_recall(models[1], [padded])
    torch.testing.assert_close(state(models[0]), state(models[1]), **rounding(torch.float32))


def test_it_is_saved_as_it_started(tmp_path: Any) -> None:
    model = windowed()
    initialize_talan_recall(model, [rows()])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(with_sliding_window(make_base("llama"), WINDOW), tmp_path).to(torch.float64)
    assert torch.equal(logits(again.eval()), logits(model))


@pytest.mark.parametrize(
    ("axes", "options", "message"),
    [
        ({}, {"adapter_name": "other"}, "adapter_name='other'"),
        ({}, {"shrinkage": 0.0}, "shrinkage=0.0"),
        ({"talan_mixer": "attention"}, {}, "talan_mixer='attention'"),
        ({"init_talan_weights": False}, {}, "give an adapter that is fresh"),
        ({}, {"dataloader": [{"input_ids": make_tokens()}]}, "its batches need 'labels'"),
        ({}, {"dataloader": [rows(tokens=WINDOW)]}, "no answer has a token further back"),
        ({}, {"dataloader": []}, "no answer has a token further back"),
    ],
)
def test_what_cannot_be_done_is_refused(axes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    model = windowed(**axes)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        initialize_talan_recall(model, **{"dataloader": [rows()], **options})
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    assert model.config.sliding_window == WINDOW


def test_a_model_without_a_window_is_refused() -> None:
    model = make_model("llama", make_config(init_talan_weights=True, **AXES))
    with pytest.raises(ValueError, match="it must have one sliding window"):
        initialize_talan_recall(model, [rows()])
