"""Recall beyond the attention window: three tasks, a small window model that is trained here, and its fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from ..tuner.trainability import talan_param_groups

Task = Literal["key", "pairs", "count"]
TASKS: tuple[Task, ...] = get_args(Task)

WINDOW = 16
"""Keys that a token attends to, itself included; also the length in which the tasks measure their texts."""
BLOCKS = 4
REACH = BLOCKS * (WINDOW - 1)
"""How many tokens back the last block's output depends on, through all blocks."""
ANSWERS = 16
CHANCE = 1 / ANSWERS
NAMES = 3
BEGIN, MARK, ASK, FIRST_NAME, FIRST_ANSWER = 0, 1, 2, 3, 11
FIRST_FILLER = FIRST_ANSWER + ANSWERS
FIRST_PAIR = 64
"""The token of a name and an answer together; only the model of `pairs` has such tokens."""
LATEST_KEY = 4

TRAINED_WINDOWS = tuple(range(1, 11))
SCORED_WINDOWS = (1, 2, 4, 6, 8, 10, 16, 32)
SCORED_SEED = 1_000_003
"""Far from every training seed: no scored text is trained on."""

LONG_CONTEXT: dict[str, Any] = {"talan_layers": "all"}
"""The axes that the documentation recommends for recall beyond the window."""


def window_config(task: Task) -> MistralConfig:
    """The small window model: Mistral's architecture, every block with a sliding window.

    Args:
        task: The task, which decides on the size of the vocabulary.

    Returns:
        The configuration; 4 blocks of 16 keys, hidden size 64.
    """
    return MistralConfig(
        vocab_size=FIRST_PAIR + (NAMES * ANSWERS if task == "pairs" else 0),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=WINDOW,
        max_position_embeddings=131_072,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def make_texts(task: Task, windows: int, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw texts that end with a question about their beginning, or, for `count`, about all of them.

    `key`: an answer stands after a mark among the first tokens. `pairs`: three tokens at the start give each of three
    names an answer, and one name is asked for. `count`: up to 15 marks stand anywhere (14 in one window), and their
    number is the answer.

    Args:
        task: Which task.
        windows: The texts' length, in windows of 16 tokens.
        rows: How many texts.
        generator: What is drawn from.

    Returns:
        The token ids, [rows, windows * 16], and the answers' token ids, [rows].
    """
    length = windows * WINDOW
    tokens = torch.randint(FIRST_FILLER, FIRST_PAIR, (rows, length), generator=generator)
    # A text of one window has places for fewer marks.
    most = min(ANSWERS, length - 1) if task == "count" else ANSWERS
    answers = torch.randint(most, (rows,), generator=generator)
    every = torch.arange(rows)
    if task == "key":
        place = torch.randint(1, LATEST_KEY + 1, (rows,), generator=generator)
        tokens[every, place], tokens[every, place + 1] = MARK, answers + FIRST_ANSWER
    elif task == "pairs":
        names = torch.rand(rows, NAMES, generator=generator).argsort(1)
        values = torch.randint(ANSWERS, (rows, NAMES), generator=generator)
        tokens[:, 1 : 1 + NAMES] = FIRST_PAIR + names * ANSWERS + values
        asked = torch.randint(NAMES, (rows,), generator=generator)
        tokens[:, -1], answers = names[every, asked] + FIRST_NAME, values[every, asked]
    else:
        order = torch.rand(rows, length - 2, generator=generator).argsort(1).argsort(1)
        tokens[:, 1:-1][order < answers[:, None]] = MARK
    tokens[:, 0] = BEGIN
    tokens[:, -1 if task != "pairs" else -2] = ASK
    return tokens, answers + FIRST_ANSWER


def answer_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The model's logits for what follows the last token.

    Args:
        model: The window model, with or without an adapter.
        tokens: Token ids, [rows, length].

    Returns:
        Logits, [rows, vocabulary].
    """
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Args:
        steps: Optimizer steps.
        learning_rate: The highest, after a warm-up of a tenth of the steps and before a linear decay.
        batch_size: Texts a step.
        windows: The lengths to draw from, one each step.
        seed: Of the texts and their order.
    """

    steps: int
    learning_rate: float
    batch_size: int = 32
    windows: Sequence[int] = TRAINED_WINDOWS
    seed: int = 0


def warm_up_and_decay(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Raise the learning rate in the first tenth of the steps, then lower it linearly to zero.

    Args:
        optimizer: The optimizer, with the highest rate.
        steps: All steps of the training.

    Returns:
        The schedule.
    """
    warm_up = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )


def take_step(
    model: nn.Module,
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """Take one optimizer step with gradients of norm 1 at most.

    Args:
        model: The model.
        loss: Its loss, a scalar.
        optimizer: Of its parameters.
        schedule: Of the optimizer's learning rate.

    Returns:
        The loss.
    """
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return float(loss.detach())


def train(model: Any, task: Task, training: Training, report: Callable[[float], None] | None = None) -> list[float]:
    """Train whatever requires a gradient, on the answers alone.

    Args:
        model: The window model, with or without an adapter.
        task: Which task.
        training: How.
        report: Called with the loss after each step.

    Returns:
        The loss of each step, nats.
    """
    optimizer = torch.optim.AdamW(talan_param_groups(model, training.learning_rate))
    schedule = warm_up_and_decay(optimizer, training.steps)
    generator = torch.Generator().manual_seed(training.seed)
    losses = []
    model.train()
    for _ in range(training.steps):
        windows = training.windows[int(torch.randint(len(training.windows), (), generator=generator))]
        tokens, answers = make_texts(task, windows, training.batch_size, generator)
        loss = F.cross_entropy(answer_logits(model, tokens), answers)
        losses.append(take_step(model, loss, optimizer, schedule))
        if report is not None:
            report(losses[-1])
    model.eval()
    return losses


def pretrained(
    task: Task,
    seed: int,
    steps: int = 400,
    *,
    full_attention: bool = False,
    report: Callable[[float], None] | None = None,
) -> PreTrainedModel:
    """Train a base model that can do the task inside its window, and nothing beyond.

    Args:
        task: Which task.
        seed: Of the weights and the texts.
        steps: Optimizer steps. Default 400.
        full_attention: Train with full attention on all of `TRAINED_WINDOWS`; the window is set afterwards, as where
            a full-attention model's old keys are dropped. Default False.
        report: Called with the loss after each step.

    Returns:
        The model.
    """
    torch.manual_seed(seed)
    model = MistralForCausalLM(window_config(task))
    if full_attention:
        model.config.sliding_window = None
    train(model, task, Training(steps, 3e-3, windows=TRAINED_WINDOWS if full_attention else (1,), seed=seed), report)
    model.config.sliding_window = WINDOW
    return model


@torch.no_grad()
def recall(model: Any, task: Task, windows: int, rows: int = 256, batch_size: int = 64) -> float:
    """The share of held-out texts whose answer is the likeliest next token.

    Args:
        model: The window model, with or without an adapter.
        task: Which task.
        windows: The texts' length, in windows of 16 tokens.
        rows: How many texts. Default 256.
        batch_size: Texts of one forward pass. Default 64.

    Returns:
        The share, between 0 and 1.
    """
    tokens, answers = make_texts(task, windows, rows, torch.Generator().manual_seed(SCORED_SEED + windows))
    parts = [answer_logits(model, part).argmax(-1) for part in tokens.split(batch_size)]
    return float((torch.cat(parts) == answers).float().mean())
