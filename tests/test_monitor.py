"""What is logged of side paths while they train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from peft_talan.monitor import SidePathMonitor

from .small_models import make_config, make_model, make_tokens

OPTIONS = {
    "add": {},
    "gated": {"talan_writeback": "gated", "talan_position": "input"},
    "capped": {"talan_writeback": "capped", "talan_cap": 0.01, "talan_mixer": "mlp"},
    "linear": {"talan_mixer": "linear"},
}


def train(folder: Path, monitored: bool, **options: object) -> tuple[Trainer, nn.Module]:
    torch.manual_seed(0)
    model = make_model("qwen3", make_config(**options), torch.float32)
    rows = [{"input_ids": tokens, "labels": tokens} for tokens in make_tokens(batch=8).tolist()]
    arguments = TrainingArguments(
        folder, max_steps=4, logging_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none"
    )
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_list(rows))
    if monitored:
        trainer.add_callback(SidePathMonitor(trainer.log))
    trainer.train()
    return trainer, model


@pytest.mark.parametrize("kind", OPTIONS)
def test_each_logged_step_has_the_numbers_of_every_block(kind: str, tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, True, **OPTIONS[kind])
    logged = [entry for entry in trainer.state.log_history if any(key.startswith("talan/") for key in entry)]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4]
    for entry in logged:
        for block in (1, 3):
            name = f"talan/default/block_{block}"
            assert entry[f"{name}/relative_norm"] > 0
            assert 0 < entry[f"{name}/slot_entropy"] <= 1
            assert (f"{name}/gate" in entry) == (kind == "gated")
            if kind == "capped":
                assert entry[f"{name}/relative_norm"] == pytest.approx(0.01, rel=1e-5)


def test_watching_changes_nothing(tmp_path: Path) -> None:
    _, watched = train(tmp_path, True)
    _, alone = train(tmp_path, False)
    for one, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not any(module._forward_pre_hooks for name, module in watched.named_modules() if name.endswith(".talan"))


def test_relative_norm_is_that_of_the_residual_stream(tmp_path: Path) -> None:
    model = make_model("gpt2", make_config(talan_layers=[2]), torch.float64).train()
    tokens = make_tokens()
    logged: list[dict[str, float]] = []
    monitor = SidePathMonitor(logged.append)
    side_path = model.get_base_model().transformer.h[2].talan
    streams: dict[str, torch.Tensor] = {}
    side_path.register_forward_hook(lambda module, args, output: streams.update(before=args[0], after=output))
    arguments = TrainingArguments(tmp_path, use_cpu=True)
    state = TrainerState(logging_steps=1)
    monitor.on_step_begin(arguments, state, TrainerControl(), model=model)
    with torch.no_grad():
        model(tokens)
    monitor.on_step_end(arguments, state, TrainerControl())
    monitor.on_train_end(arguments, state, TrainerControl())
    change = (streams["after"] - streams["before"]).norm(dim=-1) / streams["before"].norm(dim=-1)
    assert logged[0]["talan/default/block_2/relative_norm"] == pytest.approx(float(change.mean()), rel=1e-9)
