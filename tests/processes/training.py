"""Trains by Trainer, in one process or in several: once whole, and once from a checkpoint in the middle."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig

from peft_talan import talan_param_groups
from peft_talan.sft.training import PromptLossTrainer
from tests.offline_hub import make_tokenizer
from tests.processes.sharded import load_parts
from tests.small_models import make_base, make_config, make_model, make_tokens

STEPS = 4
ROWS_A_STEP = 4
SIDE_PATH = {"talan_writeback": "gated", "talan_mixer": "mlp"}
# Not for tensor parallelism: PEFT copies a module that is saved whole, which torch can't where it is shared out.
HEAD: dict[str, object] = {"modules_to_save": ["lm_head"]}


def let_the_cpu_be_an_accelerator() -> None:
    """Accelerate offers FSDP and tensor parallelism where there is an accelerator, so the CPU stands for one here."""
    # As Trainer's arguments do it for each training.
    AcceleratorState._reset_state(reset_partial_state=True)
    state = PartialState(cpu=True)
    if state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_XPU


def build(dtype: torch.dtype = torch.float64, **options: object) -> PeftModel:
    return make_model("qwen3", make_config(**SIDE_PATH, **options), dtype=dtype)


def parts_of(model: nn.Module) -> list[object]:
    return [*model.modules(), *(parameter.data for parameter in model.parameters())]


def train(
    folder: Path,
    start_from: Path | None = None,
    parts: str | None = None,
    tensor_parallel: bool = False,
    dtype: str = "float64",
    **options: object,
) -> None:
    """Train in float64, so that what is left of the difference to one process is rounding.

    Args:
        folder: Where checkpoints, the adapter and the log go.
        start_from: The checkpoint to go on from.
        parts: Where `save_parts` wrote what is to be trained; without it, the model is built.
        tensor_parallel: Whether transformers shares the matrices out, and not the rows of a batch; needs `parts`.
        dtype: The weights' dtype, where it can't be float64.
        options: The adapter's options besides `SIDE_PATH`, where it is built.
    """
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    as_accelerator = tensor_parallel or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if as_accelerator:
        let_the_cpu_be_an_accelerator()
    # Before the model, which is loaded in parts where these arguments ask for DeepSpeed's stage 3.
    arguments = TrainingArguments(
        folder / "checkpoints",
        per_device_train_batch_size=ROWS_A_STEP // (1 if tensor_parallel else int(os.environ.get("WORLD_SIZE", "1"))),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        # Of a model that transformers shares out, Trainer keeps no optimizer state, whatever the adapter.
        save_only_model=tensor_parallel,
        logging_steps=1,
        lr_scheduler_type="linear",
        max_grad_norm=0.5,
        # Without it the arguments set accelerate's state anew, and the CPU is one again.
        accelerator_config={"use_configured_state": as_accelerator},
        # Accelerate offers DeepSpeed where the CPU was not asked for.
        use_cpu=not deepspeed,
        ddp_backend="gloo" if deepspeed else None,
        report_to="none",
    )
    if parts is None:
        model = build(getattr(torch, dtype), **options)
    else:
        model = load_parts(Path(parts), getattr(torch, dtype), **({"tp_plan": "auto"} if tensor_parallel else {}))
    groups = talan_param_groups(model, lr=0.05, side_path_lr_scale=2.0)
    tokens = make_tokens(ROWS_A_STEP * STEPS, tokens=13).tolist()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"params": groups, "momentum": 0.9}),
    )
    trainer.train(resume_from_checkpoint=start_from)
    trainer.save_model(folder / "adapter")
    if trainer.is_world_process_zero():
        log = {
            "classes": sorted({type(part).__name__ for part in parts_of(trainer.model_wrapped)}),
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }
        (folder / "log.json").write_text(json.dumps(log))
    trainer.accelerator.wait_for_everyone()


def train_with_prompts(folder: Path, parts: str, tensor_parallel: bool = False) -> None:
    """Log the losses of a few steps with a part for the prompts; arguments as those of `train`."""
    if tensor_parallel:
        let_the_cpu_be_an_accelerator()
    arguments = SFTConfig(
        folder / "checkpoints",
        per_device_train_batch_size=ROWS_A_STEP,
        max_steps=STEPS,
        save_strategy="no",
        logging_steps=1,
        learning_rate=0.05,
        completion_only_loss=True,
        accelerator_config={"use_configured_state": tensor_parallel},
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    tokens = make_tokens(ROWS_A_STEP * STEPS, tokens=13).tolist()
    rows = {"input_ids": tokens, "completion_mask": [[0] * 9 + [1] * 4] * len(tokens)}
    trainer = PromptLossTrainer(
        load_parts(Path(parts), **({"tp_plan": "auto"} if tensor_parallel else {})),
        arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=make_tokenizer(),
        prompt_loss_weight=0.5,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / "log.json").write_text(json.dumps({"losses": losses}))
    trainer.accelerator.wait_for_everyone()


def train_whole_and_resumed(folder: Path, **how: object) -> None:
    """Train twice: once whole, and once from the checkpoint in the middle.

    Args:
        folder: Gets the runs' folders, `whole` and `resumed`.
        how: The other arguments of `train`.
    """
    train(folder / "whole", **how)
    train(folder / "resumed", folder / "whole" / "checkpoints" / f"checkpoint-{STEPS // 2}", **how)


def train_a_frozen_half(folder: Path, scope: str) -> None:
    """Train a part alone, and resume: from another frozen half, as from a fresh script, and from the checkpoint's.

    Args:
        folder: Gets the runs' folders, `whole` and `resumed`.
        scope: What trains, as `talan_trainable`.
    """
    train(folder / "whole", talan_trainable=scope)
    checkpoint = folder / "whole" / "checkpoints" / f"checkpoint-{STEPS // 2}"
    with pytest.raises(ValueError, match=rf"resume_from_checkpoint: .*talan_trainable='{scope}'.*CHECKPOINT"):
        train(folder / "refused", checkpoint, talan_trainable=scope, init_lora_weights=True)
    if PartialState().is_main_process:
        shutil.rmtree(folder / "refused")
        make_base("qwen3").save_pretrained(folder.parent / f"parts {scope}" / "base")
        shutil.copytree(checkpoint, folder.parent / f"parts {scope}" / "adapter")
    PartialState().wait_for_everyone()
    train(folder / "resumed", checkpoint, parts=str(folder.parent / f"parts {scope}"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_whole_and_resumed(Path(sys.argv[1]), **json.loads(sys.argv[2]))
