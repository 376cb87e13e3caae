"""Trains by Trainer, in one process or in several: once whole, and once from a checkpoint in the middle."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from peft_talan import talan_param_groups
from tests.small_models import make_config, make_model, make_tokens

STEPS = 4
ROWS_A_STEP = 4
SIDE_PATH = {"talan_writeback": "gated", "talan_mixer": "mlp", "modules_to_save": ["lm_head"]}


def let_fsdp_take_the_cpu() -> None:
    """Accelerate offers FSDP where there is an accelerator, so the CPU stands for one here."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_XPU


def train(folder: Path, start_from: Path | None = None) -> None:
    """Train in float64, so that what is left of the difference to one process is rounding.

    Args:
        folder: Where checkpoints, the adapter and the log go.
        start_from: The checkpoint to go on from.
    """
    model = make_model("qwen3", make_config(**SIDE_PATH))
    groups = talan_param_groups(model, lr=0.05, side_path_lr_scale=2.0)
    tokens = make_tokens(ROWS_A_STEP * STEPS, tokens=13).tolist()
    arguments = TrainingArguments(
        folder / "checkpoints",
        per_device_train_batch_size=ROWS_A_STEP // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        logging_steps=1,
        lr_scheduler_type="linear",
        max_grad_norm=0.5,
        use_cpu=True,
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"params": groups, "momentum": 0.9}),
    )
    trainer.train(resume_from_checkpoint=start_from)
    trainer.save_model(folder / "adapter")
    if trainer.is_world_process_zero():
        (folder / "log.json").write_text(json.dumps([entry for entry in trainer.state.log_history if "loss" in entry]))
    trainer.accelerator.wait_for_everyone()


def train_whole_and_resumed(folder: Path) -> None:
    """Train twice.

    Args:
        folder: Gets the two runs' folders, `whole` and `resumed`.
    """
    train(folder / "whole")
    train(folder / "resumed", folder / "whole" / "checkpoints" / f"checkpoint-{STEPS // 2}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    let_fsdp_take_the_cpu()
    train_whole_and_resumed(Path(sys.argv[1]))
