"""One process of the demo: trains and evaluates one adapter, or asks a saved one; tells of itself in JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ..config import TalanConfig
from .base_model import load_base_model
from .data import Example
from .sft_loop import answer, evaluate, train

ARMS = ("LoRA", "LoRA+TALAN")
LONGEST_ANSWER = 32


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def _examples(rows: list[Any]) -> list[Example]:
    return [Example(tuple((role, content) for role, content in messages), text) for messages, text in rows]


def build_config(arm: str, rank: int, axes: dict[str, Any]) -> LoraConfig:
    """The configuration of one arm; both have the same low-rank half.

    Args:
        arm: One of `ARMS`.
        rank: The rank of the low-rank half.
        axes: The axes of the side path.

    Returns:
        The configuration.
    """
    low_rank: dict[str, Any] = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**low_rank) if arm == "LoRA" else TalanConfig(**low_rank, **axes)


def train_arm(job: dict[str, Any], arm: str) -> None:
    """Train, evaluate and save one adapter.

    Args:
        job: The run, as the main process wrote it.
        arm: `base` (evaluate only) or one of `ARMS`.
    """
    model: Any
    model, tokenizer = load_base_model(job["base"])
    losses: list[float] = []
    seconds = 0.0
    trainable = 0
    if arm != "base":
        torch.manual_seed(job["seed"])
        model = get_peft_model(model, build_config(arm, job["rank"], job["axes"]))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        losses, seconds = train(
            model,
            tokenizer,
            _examples(job["train"]),
            steps=job["steps"],
            batch_size=job["batch_size"],
            learning_rate=job["learning_rate"],
            seed=job["seed"],
            report=lambda step, loss: _say(step=step, loss=loss),
        )
        model.save_pretrained(Path(job["output"]) / arm)
    held_out = _examples(job["held_out"])
    result = evaluate(model, tokenizer, held_out, lambda done: _say(evaluated=done))
    _say(result={"losses": losses, "seconds": seconds, "trainable": trainable, **result._asdict()})


def ask(job: dict[str, Any]) -> None:
    """Load the saved LoRA+TALAN adapter and let it answer a question.

    Args:
        job: The run, as the main process wrote it.
    """
    base, tokenizer = load_base_model(job["base"])
    model = PeftModel.from_pretrained(base, Path(job["output"]) / ARMS[1])
    model.eval()
    question = Example((("user", job["ask"]),), "")
    _say(answer=answer(model, tokenizer, [question], LONGEST_ANSWER)[0])


def main() -> None:
    """Do what the command line says: the job's file, and `base`, an arm's name or `ask`."""
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if sys.argv[2] == "ask":
        ask(job)
    else:
        train_arm(job, sys.argv[2])


if __name__ == "__main__":
    main()
