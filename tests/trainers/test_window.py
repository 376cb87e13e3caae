"""A sliding window for models that have none, and the training in which it shrinks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    SmolLM3Config,
    Starcoder2Config,
    Trainer,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from peft_talan.sft.data import DataError, Rows
from peft_talan.sft.recall import ShrinkingWindow, last_answers
from peft_talan.sft.training import set_side_path_rate
from peft_talan.sft.window import SUPPORTED, with_sliding_window

from ..small_models import CONFIGS, WINDOW, make_base, make_config, make_tokens
from .test_trainer import make_trainer
from .test_trl import make_chat_tokenizer

NARROW = WINDOW - 3
SIZES = {
    name: value
    for name, value in CONFIGS["llama"].to_dict().items()
    if name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}
MORE = {
    "phi3": Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0),
    "starcoder2": Starcoder2Config(**SIZES, num_key_value_heads=2),
    "smollm3": SmolLM3Config(**SIZES, num_key_value_heads=2, pad_token_id=0),
}


def make_full(kind: str) -> PreTrainedModel:
    if kind not in MORE:
        return make_base(kind, torch.float32)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MORE[kind]).eval()


class SeenWindows(TrainerCallback):
    """Keeps how far back the model's answers reach while it trains, and in evaluations."""

    def __init__(self) -> None:
        self.trained: list[int] = []
        self.between: list[int] = []
        self.step: set[int] = set()

    def on_train_begin(self, *args: object, model: nn.Module, **kwargs: object) -> None:
        def see(attention: nn.Module, args: tuple[object, ...]) -> None:
            if attention.training:
                self.step.add(attention.config.sliding_window)

        # Of a checkpointed block, in the backward pass, too.
        model.get_base_model().model.layers[0].self_attn.register_forward_pre_hook(see)

    def on_pre_optimizer_step(self, *args: object, **kwargs: object) -> None:
        (window,) = self.step
        self.step.clear()
        self.trained.append(window)

    def on_evaluate(self, *args: object, model: nn.Module, **kwargs: object) -> None:
        self.between.append(model.get_base_model().config.sliding_window)

    def on_save(self, *args: object, model: nn.Module, **kwargs: object) -> None:
        self.between.append(model.get_base_model().config.sliding_window)


@torch.no_grad()
@pytest.mark.parametrize("kind", SUPPORTED)
def test_a_converted_model_computes_the_same_inside_its_window_and_keeps_no_more_keys(
    kind: str, tmp_path: Path
) -> None:
    full = make_full(kind)
    windowed = with_sliding_window(full, NARROW)
    tokens = make_tokens(tokens=3 * WINDOW)
    found, expected = (model(tokens, use_cache=False).logits for model in (windowed, full))
    assert torch.equal(found[:, :NARROW], expected[:, :NARROW])
    assert (found[:, NARROW:] != expected[:, NARROW:]).any(-1).all()
    # Every block has the window: no token depends on one that all of them together can't reach.
    reach = windowed.config.num_hidden_layers * (NARROW - 1)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 7
    differs = (windowed(changed, use_cache=False).logits != found).any(-1)
    assert differs[:, :NARROW].all()
    assert not differs[:, reach + 1 :].any()
    generated = windowed.generate(
        input_ids=tokens, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, eos_token_id=None
    )
    assert {layer.keys.shape[2] for layer in generated.past_key_values.layers} == {NARROW - 1}
    windowed.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sliding_window"] == NARROW
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert torch.equal(loaded(tokens, use_cache=False).logits, found)
    assert torch.equal(full(tokens, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    ("config", "window", "message"),
    [
        (CONFIGS["llama"], 1, "window=1"),
        (CONFIGS["llama"], True, "window=True"),
        (CONFIGS["gemma3"], 8, "model type 'gemma3_text'"),
        (GPT2Config(**{"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}), 8, "model type 'gpt2'"),
        (LlamaConfig(**SIZES, attention_bias=True), 8, "attention_bias=True"),
    ],
)
def test_a_model_that_would_compute_something_else_is_refused(config: Any, window: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_sliding_window(AutoModelForCausalLM.from_config(config), window)


def test_a_model_with_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="without an adapter"):
        with_sliding_window(get_peft_model(make_base("llama"), make_config()), 8)


def test_a_model_on_several_devices_is_refused() -> None:
    model = make_base("llama")
    model.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(ValueError, match="several devices"):
        with_sliding_window(model, 8)


@pytest.mark.parametrize("shape", ["linear", "exponential"])
def test_the_window_shrinks_to_its_end_within_the_share_and_the_jitter(shape: str) -> None:
    plain = ShrinkingWindow(start=200, end=20, share=0.5, jitter=(1.0, 1.0), shape=shape)
    windows = [plain.window_at(step, 100) for step in range(100)]
    assert windows[0] == 200
    assert windows == sorted(windows, reverse=True)
    assert windows[49] > 20
    assert set(windows[50:]) == {20}
    middle = 110 if shape == "linear" else round((200 * 20) ** 0.5)
    assert windows[25] == middle
    jittered = ShrinkingWindow(start=200, end=20, share=0.5, jitter=(0.6, 0.9), shape=shape, seed=3)
    drawn = [jittered.window_at(step, 100) for step in range(100)]
    assert all(max(20, int(0.6 * w)) <= d <= max(20, round(0.9 * w)) for d, w in zip(drawn, windows, strict=True))
    assert min(drawn) == 20
    # The step and the seed alone decide.
    again = ShrinkingWindow(start=200, end=20, share=0.5, jitter=(0.6, 0.9), shape=shape, seed=3)
    assert [again.window_at(step, 100) for step in reversed(range(100))] == drawn[::-1]
    other = ShrinkingWindow(start=200, end=20, share=0.5, jitter=(0.6, 0.9), shape=shape, seed=4)
    assert [other.window_at(step, 100) for step in range(100)] != drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1}, "start=1"),
        ({"start": 8, "end": 16}, "start=8"),
        ({"share": 0.0}, "share=0.0"),
        ({"jitter": (0.9, 0.5)}, r"jitter=\(0.9, 0.5\)"),
        ({"shape": "round"}, "shape='round'"),
    ],
)
def test_a_schedule_that_can_not_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShrinkingWindow(**options)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_with_the_schedule_s_windows_and_saves_with_the_last_one(
    tmp_path: Path, checkpointing: bool
) -> None:
    model = get_peft_model(with_sliding_window(make_base("qwen3", torch.float32), NARROW), make_config())
    seen, shrinking = SeenWindows(), ShrinkingWindow(share=0.75, seed=1)
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, model, max_steps=8, per_device_train_batch_size=2, **options)
    trainer.add_callback(shrinking)
    trainer.add_callback(seen)
    trainer.train()
    # 30: the longest of the rows.
    expected = ShrinkingWindow(start=30, end=NARROW, share=0.75, seed=1)
    assert seen.trained == [expected.window_at(step, 8) for step in range(8)]
    assert seen.trained[0] > NARROW
    assert seen.trained[-2:] == [NARROW, NARROW]
    assert seen.between == [NARROW] * 8
    logged = [entry["window"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == seen.trained
    assert model.get_base_model().config.sliding_window == NARROW


def test_the_window_of_a_step_is_the_one_that_attention_has(tmp_path: Path) -> None:
    """The gradients of a step under the callback are those of a model whose window is that of the step."""

    def trained(window: int, *callbacks: TrainerCallback) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(with_sliding_window(make_base("llama", torch.float32), window), make_config())
        trainer = make_trainer(tmp_path, model, max_steps=1)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}

    fixed, narrow = trained(12), trained(NARROW)
    shrinking = trained(NARROW, ShrinkingWindow(start=12, jitter=(1.0, 1.0)))
    assert all(torch.equal(shrinking[name], value) for name, value in fixed.items())
    assert any(not torch.equal(shrinking[name], value) for name, value in narrow.items())


class FailAt(TrainerCallback):
    """Ends the training in the middle of its first step: in the forward pass, the backward pass or after them."""

    def __init__(self, place: str, error: type[BaseException]) -> None:
        self.place, self.error = place, error

    def fail(self, *args: object) -> None:
        raise self.error

    def on_train_begin(self, *args: object, model: nn.Module, **kwargs: object) -> None:
        block = model.get_base_model().model.layers[-1]
        if self.place == "forward":
            self.hook = block.register_forward_hook(self.fail)
        elif self.place == "backward":
            self.hook = block.register_full_backward_hook(self.fail)

    def on_pre_optimizer_step(self, *args: object, **kwargs: object) -> None:
        self.fail()


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["forward", "backward", "optimizer"])
def test_a_model_whose_training_was_cut_off_in_a_step_has_its_own_window(
    tmp_path: Path, place: str, error: type[BaseException]
) -> None:
    model = get_peft_model(with_sliding_window(make_base("llama", torch.float32), NARROW), make_config())
    failing, trainer = FailAt(place, error), make_trainer(tmp_path, model, max_steps=2)
    for callback in (ShrinkingWindow(), failing):
        trainer.add_callback(callback)
    with torch.enable_grad(), pytest.raises(error):
        trainer.train()
    if place != "optimizer":
        failing.hook.remove()
    generated = model.generate(
        input_ids=make_tokens(tokens=3 * WINDOW), max_new_tokens=2, return_dict_in_generate=True, eos_token_id=None
    )
    assert {layer.keys.shape[2] for layer in generated.past_key_values.layers} == {NARROW - 1}
    model.get_base_model().save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["sliding_window"] == NARROW
    # Nothing of the callback is left, in the trainer or in a training without it.
    assert "training_step" not in vars(trainer)
    seen, again = SeenWindows(), make_trainer(tmp_path, model, max_steps=2)
    again.add_callback(seen)
    with torch.enable_grad():
        again.train()
    assert seen.trained == [NARROW, NARROW]


@pytest.mark.parametrize("new_adapter", [False, True])
def test_a_training_after_one_that_was_cut_off_in_a_step_ends_with_the_model_s_own_window(
    tmp_path: Path, new_adapter: bool
) -> None:
    model = get_peft_model(with_sliding_window(make_base("llama", torch.float32), NARROW), make_config())
    trainer = make_trainer(tmp_path, model, max_steps=2)
    for callback in (ShrinkingWindow(), FailAt("optimizer", KeyboardInterrupt)):
        trainer.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    if new_adapter:
        model = get_peft_model(model.unload(), make_config())
        trainer = make_trainer(tmp_path, model, max_steps=2)
        trainer.add_callback(ShrinkingWindow())
    else:
        trainer.pop_callback(FailAt)
    seen = SeenWindows()
    trainer.add_callback(seen)
    trainer.train()
    assert seen.trained[0] > NARROW
    assert seen.trained[-1] == NARROW
    assert model.get_base_model().config.sliding_window == NARROW
    assert "training_step" not in vars(trainer)


def test_a_callback_that_was_used_before_has_the_ends_of_its_new_training(tmp_path: Path) -> None:
    shrinking = ShrinkingWindow(share=0.5, jitter=(1.0, 1.0))
    for own, rows in ((NARROW, 8), (3, 2)):
        seen = SeenWindows()
        model = get_peft_model(with_sliding_window(make_base("llama", torch.float32), own), make_config())
        trainer = make_trainer(tmp_path, model, max_steps=2)
        trainer.train_dataset = trainer.train_dataset.select(range(rows))
        for callback in (shrinking, seen):
            trainer.add_callback(callback)
        trainer.train()
        assert seen.trained == [max(len(row) for row in trainer.train_dataset["input_ids"]), own]
        assert (shrinking.start, shrinking.end) == (None, None)


def test_a_stream_of_rows_is_not_read_to_find_its_longest(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, list[int]]]:
        while True:
            yield {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}

    model = get_peft_model(with_sliding_window(make_base("llama", torch.float32), 2), make_config())
    trainer = make_trainer(tmp_path, model, max_steps=1)
    trainer.train_dataset = IterableDataset.from_generator(rows)
    trainer.add_callback(ShrinkingWindow())
    with pytest.raises(ValueError, match=r"start=None: .*; give start"):
        trainer.train()
    trainer.pop_callback(ShrinkingWindow)
    trainer.add_callback(ShrinkingWindow(start=3))
    trainer.train()
    assert trainer.state.log_history[0]["window"] <= 3


def test_a_resumed_run_goes_on_with_the_windows_it_would_have_had(tmp_path: Path) -> None:
    def run(folder: Path, steps: int, resume: bool = False) -> tuple[list[int], Trainer]:
        torch.manual_seed(0)
        model = get_peft_model(with_sliding_window(make_base("llama", torch.float32), NARROW), make_config())
        seen = SeenWindows()
        trainer = make_trainer(
            folder, model, max_steps=6, per_device_train_batch_size=2, save_strategy="steps", save_steps=3
        )
        for callback in (ShrinkingWindow(seed=2), seen, StopAfter(steps)):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return seen.trained, trainer

    whole, uninterrupted = run(tmp_path / "whole", 6)
    first, _ = run(tmp_path / "parts", 3)
    second, resumed = run(tmp_path / "parts", 6, resume=True)
    assert (first, second) == (whole[:3], whole[3:])
    for (name, value), other in zip(uninterrupted.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), name


class StopAfter(TrainerCallback):
    """Ends the training early."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: object, state: Any, control: Any, **kwargs: object) -> None:
        control.should_training_stop = state.global_step >= self.steps


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_takes_the_callback_and_the_side_path_s_own_rate(tmp_path: Path, packing: bool) -> None:
    rows = [{"prompt": f"{n} + {n} = ", "completion": f"{2 * n}"} for n in range(8)]
    seen = SeenWindows()
    arguments = SFTConfig(
        tmp_path,
        max_steps=4,
        packing=packing,
        max_length=32,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    trainer = SFTTrainer(
        with_sliding_window(make_base("llama", torch.float32), 4),
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_chat_tokenizer(),
        peft_config=make_config(),
        callbacks=[ShrinkingWindow(share=0.75, jitter=(1.0, 1.0)), seen],
    )
    set_side_path_rate(trainer, 10.0)
    trainer.train()
    column = "seq_lengths" if packing else "input_ids"
    lengths = [length for row in trainer.train_dataset[column] for length in (row if packing else [len(row)])]
    assert seen.trained[0] == max(lengths)
    assert seen.trained[-1] == 4
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {1e-3, 1e-2}


def test_a_model_without_a_window_is_told_how_to_get_one(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, get_peft_model(make_base("llama", torch.float32), make_config()))
    trainer.add_callback(ShrinkingWindow())
    with pytest.raises(ValueError, match="with_sliding_window"):
        trainer.train()


def test_the_last_answer_of_a_conversation_is_its_completion() -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    system = {"role": "system", "content": "system"}
    rows = Rows("file", [{"messages": [system, *said * 2], "tools": []}], ["file:1"])
    found = last_answers(rows)
    assert found.form == "prompt-completion"
    assert found.rows == [{"prompt": [system, *said, said[0]], "completion": [said[1]], "tools": []}]
    assert (found.system, found.places) == ("system", ["file:1"])
    assert last_answers(found) is found
    with pytest.raises(DataError, match="file:1: 'messages' must end"):
        last_answers(Rows("file", [{"messages": said[:1]}], ["file:1"]))
