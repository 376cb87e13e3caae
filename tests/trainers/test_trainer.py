"""transformers' Trainer as it is: accumulation, precision, checkpointing, evaluation, the best model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from ..small_models import VOCABULARY, make_base, make_config, make_lora_config, make_model, make_tokens, rounding
from .test_trl import KeptGradients, assert_equal_weights, make_chat_tokenizer

ROWS = [
    {"input_ids": make_tokens(1, tokens, seed)[0].tolist()}
    for seed, tokens in enumerate((21, 9, 14, 30, 5, 17, 8, 26))
]
TRAINING = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in ROWS])
COMMON: dict[str, Any] = {
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "disable_tqdm": True,
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
}
TOGETHER = {"per_device_train_batch_size": len(ROWS)}
ALONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(ROWS)}


def make_trainer(folder: Path, model: nn.Module, **options: Any) -> Trainer:
    arguments = TrainingArguments(folder, **{**COMMON, **TOGETHER, **options})
    collator = DataCollatorForSeq2Seq(make_chat_tokenizer(), padding=True)
    return Trainer(model, arguments, train_dataset=TRAINING, eval_dataset=TRAINING, data_collator=collator)


def gradients(folder: Path, model: nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    trainer = make_trainer(folder, model, **options)
    kept = KeptGradients()
    trainer.add_callback(kept)
    trainer.train()
    assert any(".talan." in name for name in kept.gradients)
    return kept.gradients


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(found[name] / scale, gradient / scale, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("options", [{}, {"talan_position": "input", "talan_mixer": "mlp", "use_dora": True}])
def test_accumulated_batches_train_as_one(options: dict[str, Any], tmp_path: Path, subtests: pytest.Subtests) -> None:
    whole = gradients(tmp_path, make_model("qwen3", make_config(**options)))
    for reentrant in (None, False, True):
        checkpointing: dict[str, Any] = {}
        if reentrant is not None:
            checkpointing = {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
            }
        with subtests.test(reentrant=reentrant):
            parts = gradients(tmp_path, make_model("qwen3", make_config(**options)), **ALONE, **checkpointing)
            # transformers computes the loss in float32 at least; here it is float64.
            assert_same(parts, whole, rounding()["atol"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_precision_keeps_the_memory_in_single_precision(checkpointing: bool, tmp_path: Path) -> None:
    """Autocast rounds the base model's and LoRA's products; how far gradients stray is LoRA's own measure."""

    def strays(config: Any) -> dict[str, float]:
        exact = gradients_of_any(tmp_path, make_model("llama", config, torch.float32))
        rounded = gradients_of_any(
            tmp_path, make_model("llama", config, torch.float32), bf16=True, gradient_checkpointing=checkpointing
        )
        assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
        return {name: float((rounded[name] - exact[name]).norm() / exact[name].norm()) for name in exact}

    of_lora = strays(make_lora_config(init_lora_weights=False))
    of_talan = strays(make_config())
    assert max(value for name, value in of_talan.items() if ".talan." in name) < max(of_lora.values())


def gradients_of_any(folder: Path, model: nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    trainer = make_trainer(folder, model, **options)
    kept = KeptGradients()
    trainer.add_callback(kept)
    trainer.train()
    return kept.gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_best_model_comes_back_at_the_end(dtype: torch.dtype, tmp_path: Path) -> None:
    """Each evaluation is better than the one before until step 2, and worse after it."""
    kept: dict[int, dict[str, torch.Tensor]] = {}

    class Scored(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            step = self.state.global_step
            kept[step] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            metrics = {"eval_score": -abs(step - 2)}
            self.log(dict(metrics))
            return metrics

    arguments = TrainingArguments(
        tmp_path,
        **{**COMMON, **TOGETHER, "max_steps": 4, "save_strategy": "steps"},
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=1e-2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        save_total_limit=1,
    )
    model = make_model("qwen3", make_config(talan_writeback="gated", modules_to_save=["lm_head"]), dtype)
    collator = DataCollatorForSeq2Seq(make_chat_tokenizer(), padding=True)
    trainer = Scored(model, arguments, train_dataset=TRAINING, eval_dataset=TRAINING, data_collator=collator)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept[2][name]), name
        assert torch.equal(parameter, kept[4][name]) == ("lora_" not in name and "modules_to_save" not in name), name
    loaded = PeftModel.from_pretrained(make_base("qwen3", dtype), tmp_path / "checkpoint-2")
    assert_equal_weights(loaded, model)


def test_predictions_are_generated_while_training(tmp_path: Path) -> None:
    """Of a causal model: prompts of several lengths, padded on the left, go on with the cache."""
    model = make_model("qwen3", dtype=torch.float32)
    model.generation_config.pad_token_id = 0
    seen: list[tuple[int, np.ndarray]] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        with torch.no_grad():
            for row, predicted in zip(ROWS, prediction.predictions, strict=True):
                tokens = torch.tensor([row["input_ids"]])
                for _ in range(6):
                    likeliest = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                    tokens = torch.cat([tokens, likeliest], dim=1)
                # Prompts are padded with 0, batches of shorter prompts with -100.
                assert predicted[predicted > 0].tolist() == tokens[0][tokens[0] > 0].tolist()
        seen.append((trainer.state.global_step, prediction.predictions))
        return {"tokens": float(prediction.predictions.shape[1])}

    tokenizer = make_chat_tokenizer()
    tokenizer.padding_side = "left"
    arguments = Seq2SeqTrainingArguments(
        tmp_path,
        **{**COMMON, **TOGETHER, "max_steps": 2},
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        predict_with_generate=True,
        generation_config=None,
    )
    model.generation_config.max_new_tokens = 6
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=TRAINING,
        eval_dataset=TRAINING,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        compute_metrics=metrics,
    )
    trainer.train()
    assert [step for step, _ in seen] == [1, 2]
    assert not (seen[0][1] == seen[1][1]).all()


def test_encoder_decoder_predictions_are_generated_while_training(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 3}
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, **sizes, decoder_start_token_id=0, dropout_rate=0.0)
    )
    config = make_config(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"], talan_blocks="decoder.block")
    model = get_peft_model(base, config)
    shapes: list[tuple[int, ...]] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        with torch.no_grad():
            for row, found in zip(ROWS, prediction.predictions, strict=True):
                tokens = torch.tensor([[0]])
                for _ in range(5):
                    logits = model(
                        input_ids=torch.tensor([row["input_ids"]]), decoder_input_ids=tokens, use_cache=False
                    ).logits
                    tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
                assert (found[:6] == tokens[0].numpy()).all()
        return {}

    arguments = Seq2SeqTrainingArguments(
        tmp_path,
        **{**COMMON, **TOGETHER, "max_steps": 1},
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=1e-2,
        predict_with_generate=True,
        generation_max_length=6,
    )
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=TRAINING,
        eval_dataset=TRAINING,
        data_collator=DataCollatorForSeq2Seq(make_chat_tokenizer(), padding=True),
        compute_metrics=metrics,
    )
    trainer.train()
    assert len(shapes) == 1
