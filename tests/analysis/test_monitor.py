"""What is logged of side paths while they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_talan import TalanLayer
from peft_talan.analysis import SidePathMonitor
from peft_talan.analysis.token_measures import side_path_statistics

from ..small_models import make_base, make_config, make_model, make_tokens
from ..trainers.test_trl import COMMON, DATA, LAYOUTS, make_chat_tokenizer

OPTIONS = {
    "add": {},
    "gated": {"talan_writeback": "gated", "talan_position": "input"},
    "capped": {"talan_writeback": "capped", "talan_cap": 0.01, "talan_mixer": "mlp"},
    "linear": {"talan_mixer": "linear"},
}


def train(
    folder: Path, monitored: bool, given: dict[str, Any] | None = None, **options: object
) -> tuple[Trainer, nn.Module]:
    torch.manual_seed(0)
    model = make_model("qwen3", make_config(**options), torch.float32)
    rows = [{"input_ids": tokens, "labels": tokens} for tokens in make_tokens(batch=8).tolist()]
    given = dict(given or {})
    callbacks = given.pop("callbacks", None)
    usual = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4, "report_to": "none"}
    arguments = TrainingArguments(folder, use_cpu=True, **{**usual, **given})
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_list(rows), callbacks=callbacks)
    if monitored:
        trainer.add_callback(SidePathMonitor(trainer.log))
    trainer.train()
    return trainer, model


@pytest.mark.parametrize("kind", OPTIONS)
def test_each_logged_step_has_the_numbers_of_every_block(kind: str, tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, True, **OPTIONS[kind])
    entries = logged(trainer)
    assert [entry["step"] for entry in entries] == [2, 4]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4]
    for entry in entries:
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


def logged(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if any(key.startswith("talan/") for key in entry)]


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3]),
        ({"logging_steps": 0.5}, [2, 4]),
        ({"logging_strategy": "epoch"}, [1, 3]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_it_follows_what_trainer_logs(given: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, True, given)
    assert [entry["step"] for entry in logged(trainer)] == steps


def test_accumulation_and_checkpointing_change_no_number(tmp_path: Path) -> None:
    """Rows of one length: the mean over four batches of one is that over a batch of four."""
    whole = logged(train(tmp_path, True)[0])
    accumulated = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    for reentrant in (False, True):
        kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        parts = logged(train(tmp_path, True, {**accumulated, **kwargs})[0])
        assert [entry["step"] for entry in parts] == [entry["step"] for entry in whole]
        for block in (1, 3):
            name = f"talan/default/block_{block}/relative_norm"
            assert parts[0][name] == pytest.approx(whole[0][name], rel=1e-5)


def test_loggers_receive_the_numbers(tmp_path: Path) -> None:
    received: list[tuple[int, set[str]]] = []

    class Logger(TrainerCallback):
        def on_log(self, args: object, state: TrainerState, *_: object, logs: dict[str, float], **kwargs: Any) -> None:
            received.append((state.global_step, {name for name in logs if name.startswith("talan/")}))

    train(tmp_path, True, {"callbacks": [Logger()]})
    names = {f"talan/default/block_{block}/{field}" for block in (1, 3) for field in ("relative_norm", "slot_entropy")}
    assert [(step, found) for step, found in received if found] == [(2, names), (4, names)]


@pytest.mark.parametrize("kind", ["packed", "padding_free"])
def test_it_works_in_trl(kind: str, tmp_path: Path) -> None:
    arguments = SFTConfig(tmp_path, **{**COMMON, **LAYOUTS[kind]}, max_steps=2)
    trainer = SFTTrainer(
        make_base("llama", torch.float32),
        arguments,
        train_dataset=Dataset.from_list(DATA["text"][0]),
        processing_class=make_chat_tokenizer(),
        peft_config=make_config(),
    )
    trainer.add_callback(SidePathMonitor(trainer.log))
    trainer.train()
    assert [entry["step"] for entry in logged(trainer)] == [1, 2]
    # TRL's own metrics go with Trainer's log of the loss.
    assert all("entropy" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_relative_norm_is_that_of_the_residual_stream(tmp_path: Path) -> None:
    model = make_model("gpt2", make_config(talan_layers=[2]), torch.float64).train()
    tokens = make_tokens()
    received: list[dict[str, float]] = []
    monitor = SidePathMonitor(received.append)
    side_path = model.get_base_model().transformer.h[2].talan
    streams: dict[str, torch.Tensor] = {}
    side_path.register_forward_hook(
        lambda module, args, output: streams.update(before=args[0], after=output) if output.requires_grad else None
    )
    arguments = TrainingArguments(tmp_path, use_cpu=True)
    state = TrainerState(logging_steps=1)
    monitor.on_step_begin(arguments, state, TrainerControl(), model=model)
    model(tokens)
    with torch.no_grad():
        model(tokens[:, :3])
    monitor.on_step_end(arguments, state, TrainerControl())
    monitor.on_train_end(arguments, state, TrainerControl())
    change = (streams["after"] - streams["before"]).norm(dim=-1) / streams["before"].norm(dim=-1)
    assert received[0]["talan/default/block_2/relative_norm"] == pytest.approx(float(change.mean()), rel=1e-9)


@pytest.mark.parametrize("mixer", ["attention", "linear", "mlp", "delta"])
def test_numbers_under_autocast_are_those_without(mixer: str) -> None:
    layer = next(
        module
        for module in make_model("qwen3", make_config(talan_mixer=mixer)).modules()
        if isinstance(module, TalanLayer)
    )
    layer.to(torch.float32)
    given = (torch.randn(2, 30, 32), layer.parameters_of("default"), layer.talan_options["default"])
    expected = side_path_statistics(*given, alpha=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert side_path_statistics(*given, alpha=1e-3) == expected
