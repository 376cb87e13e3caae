"""A plain SFT loop and a held-out evaluation, the same for every adapter."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .data import Example, encode

IGNORED = -100
"""The label that the loss passes over."""

EVALUATION_BATCH = 25
MOST_NEW_TOKENS = 64


class Evaluation(NamedTuple):
    """What the held-out items say.

    Args:
        exact_match: The share of answers that are right to the letter.
        loss: The mean negative log-likelihood of an answer's token, nats.
    """

    exact_match: float
    loss: float


def make_batch(
    rows: Sequence[tuple[list[int], list[int]]], pad_token_id: int, left: bool = False
) -> dict[str, torch.Tensor]:
    """Pad prompts with answers to one length.

    Args:
        rows: The tokens of each prompt and of its answer.
        pad_token_id: What to pad with.
        left: Whether the padding comes first, as generation needs it. Default False.

    Returns:
        `input_ids`, `attention_mask` and `labels`, [rows, tokens]; the labels are the answers' tokens.
    """
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens, mask, labels = [], [], []
    for prompt, answer in rows:
        padding = longest - len(prompt) - len(answer)
        before, after = (padding, 0) if left else (0, padding)
        tokens.append([pad_token_id] * before + prompt + answer + [pad_token_id] * after)
        mask.append([0] * before + [1] * (longest - padding) + [0] * after)
        labels.append([IGNORED] * (before + len(prompt)) + answer + [IGNORED] * after)
    return {
        "input_ids": torch.tensor(tokens),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def train(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    report: Callable[[int, float], None],
) -> tuple[list[float], float]:
    """Fine-tune on the answers' tokens with AdamW, a short warm-up and a linear decay.

    Args:
        model: The model with its adapter.
        tokenizer: Its tokenizer.
        examples: What to train on.
        steps: Optimizer steps.
        batch_size: Examples a step.
        learning_rate: The highest learning rate.
        seed: Of the examples' order.
        report: Called after each step with its number and loss.

    Returns:
        The losses, and the median seconds a step.
    """
    rows = [encode(tokenizer, example) for example in examples]
    order = random.Random(seed)
    queue: list[tuple[list[int], list[int]]] = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    losses, seconds = [], []
    model.train()
    for step in range(steps):
        while len(queue) < batch_size:
            queue += order.sample(rows, len(rows))
        batch, queue = queue[:batch_size], queue[batch_size:]
        started = time.perf_counter()
        loss = model(**make_batch(batch, tokenizer.pad_token_id), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss.detach()))
        report(step + 1, losses[-1])
    model.eval()
    return losses, sorted(seconds)[len(seconds) // 2]


@torch.no_grad()
def answer(model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], longest: int) -> list[str]:
    """Let the model answer, greedily.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        examples: The questions.
        longest: The most new tokens.

    Returns:
        The answers' texts.
    """
    prompts: list[tuple[list[int], list[int]]] = [(encode(tokenizer, example)[0], []) for example in examples]
    inputs = make_batch(prompts, tokenizer.pad_token_id, left=True)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=longest,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


@torch.no_grad()
def evaluate(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], report: Callable[[int], None]
) -> Evaluation:
    """Measure exact match and loss on held-out items.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        examples: The items.
        report: Called with the number of items done.

    Returns:
        The measurements.
    """
    right, total, tokens = 0, 0.0, 0
    longest = min(MOST_NEW_TOKENS, 2 + max(len(encode(tokenizer, example)[1]) for example in examples))
    for start in range(0, len(examples), EVALUATION_BATCH):
        part = examples[start : start + EVALUATION_BATCH]
        batch = make_batch([encode(tokenizer, example) for example in part], tokenizer.pad_token_id)
        counted = int((batch["labels"] != IGNORED).sum())
        total += float(model(**batch, use_cache=False).loss) * counted
        tokens += counted
        texts = answer(model, tokenizer, part, longest)
        right += sum(text == example.answer.strip() for text, example in zip(texts, part, strict=True))
        report(start + len(part))
    return Evaluation(right / len(examples), total / tokens)
