"""What the studies train and score with: rows as tokens, one loop, and an adapter that is taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from peft_talan.sft.prompts import Encoded
from peft_talan.sft.scores import pad_batch


def make_batch(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Rows as one batch on the model's device."""
    return {name: tensor.to(model.device) for name, tensor in pad_batch(rows, tokenizer).items()}


@contextmanager
def adapted(base: Any, config: PeftConfig | None) -> Iterator[Any]:
    """The base model with a fresh adapter, which is taken off afterwards; without one if there is no configuration.

    Whoever calls this has set the seed: before `config` was made or after it, as the study's stored runs did, since
    matching a rank draws, too.
    """
    if config is None:
        yield base
        return
    model = get_peft_model(base, config)
    try:
        yield model
    finally:
        model.unload()


def warm_up_and_decay(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Raise the learning rate in the first tenth of the steps, then lower it linearly to zero."""
    warm_up = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )


def take_step(
    model: Any,
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    clip: float | None = 1.0,
) -> float:
    """Take one optimizer step with gradients whose norm is `clip` at most, and return the loss."""
    loss.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    if schedule is not None:
        schedule.step()
    optimizer.zero_grad()
    return float(loss.detach())


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    steps: int,
    loss_of: Callable[[int], torch.Tensor],
    description: str | None = None,
) -> list[float]:
    """Take `steps` optimizer steps with a short warm-up and a linear decay; `loss_of` computes the loss of each."""
    schedule = warm_up_and_decay(optimizer, steps)
    model.train()
    numbers = tqdm(range(steps), desc=description, disable=description is None)
    losses = [take_step(model, loss_of(step), optimizer, schedule) for step in numbers]
    model.eval()
    return losses
