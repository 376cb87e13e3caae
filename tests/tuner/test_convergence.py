"""A small model trained with the fused operators and with the readable ones: the same losses and the same weights."""

from __future__ import annotations

import pytest
import torch

from peft_talan.functional import fused, reference

from ..small_models import make_config, make_model

STEPS = 20


def train(monkeypatch: pytest.MonkeyPatch, readable: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train on packed and padded batches, all mixers and write-backs among the blocks' adapters."""
    with monkeypatch.context() as patch:
        if readable:
            patch.setattr(fused, "side_path", reference.side_path)
        model = make_model("llama", make_config(talan_layers=[0], talan_writeback="gated", talan_grad_scale=0.5))
        for name, options in {"linear": {"talan_writeback": "capped"}, "mlp": {"talan_position": "input"}}.items():
            torch.manual_seed(4)
            model.add_adapter(name, make_config(talan_layers=[-1], talan_mixer=name, **options))
        model.to(torch.float64).base_model.set_adapter(["default", "linear", "mlp"])
        model.train()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
        positions = torch.cat([torch.arange(17), torch.arange(24)]).expand(2, -1)
        mask = torch.ones(2, 41, dtype=torch.long)
        mask[1, :9] = 0
        losses = []
        for step in range(STEPS):
            tokens = 2 + (3 * torch.arange(41) + torch.tensor([[step], [5]])) % 11
            batch = {"position_ids": positions} if step % 2 else {"attention_mask": mask}
            loss = model(tokens, labels=tokens, use_cache=False, **batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_training_takes_the_same_path_as_with_the_readable_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, weights = train(monkeypatch, readable=False)
    expected_losses, expected_weights = train(monkeypatch, readable=True)
    assert losses[-1] < losses[0] - 0.2  # It does train.
    assert len({name.split(".")[-2] for name in weights}) == 3
    # float64: rounding errors of the steps, which Adam's division by small second moments enlarges.
    torch.testing.assert_close(losses, expected_losses, rtol=1e-9, atol=0)
    for name, expected in expected_weights.items():
        torch.testing.assert_close(
            weights[name], expected, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )
