"""The worked example of docs/contributing.md: a rule added by the documented steps is a whole writeback rule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch
from peft import PeftModel

from peft_talan import TalanConfig, axes
from peft_talan.functional import writeback

from ..small_models import make_base, make_config, make_model, make_tokens, rounding

CAP = 0.2


def change_squashed(
    hidden_states: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor | None, cap: float
) -> torch.Tensor:
    """The page's rule: `h' - h = rho tanh(delta / rho)`."""
    return cap * torch.tanh(delta / cap)


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The rule's row in the table, for one test."""
    monkeypatch.setitem(writeback.WRITEBACK_RULES, "squashed", change_squashed)
    monkeypatch.setattr(axes, "Writeback", Literal[(*get_args(axes.Writeback), "squashed")])
    yield "squashed"


def test_a_rule_that_was_not_added_is_refused() -> None:
    with pytest.raises(ValueError, match="talan_writeback='squashed'"):
        TalanConfig(talan_writeback="squashed")


@torch.no_grad()
def test_an_added_rule_generates_saves_and_loads(rule: str, tmp_path: Path) -> None:
    model = make_model("qwen3", make_config(talan_writeback=rule, talan_cap=CAP))
    tokens = make_tokens()
    whole = model(tokens, use_cache=False).logits
    first = model(tokens[:, :8], use_cache=True)
    rest = model(tokens[:, 8:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole, **rounding())
    add = make_model("qwen3", make_config(talan_writeback="add"))
    assert not torch.equal(add(tokens).logits, whole)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base("qwen3"), tmp_path, autocast_adapter_dtype=False).eval()
    assert torch.equal(loaded(tokens, use_cache=False).logits, whole)


def test_an_added_rule_trains(rule: str) -> None:
    model = make_model("qwen3", make_config(talan_writeback=rule, talan_cap=CAP)).train()
    tokens = make_tokens()
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "lora_talan" in name], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(tokens, labels=tokens).loss
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
