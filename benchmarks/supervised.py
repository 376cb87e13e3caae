"""What the measurements on SmolLM2 share: examples as tokens, batches and a plain loop of AdamW.

The command line trains with TRL. These stay as they were when the results in results/ were measured: with them, the
same command gives the same numbers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peft_talan import TalanConfig

IGNORED = -100
"""The label that the loss passes over."""


class Example(NamedTuple):
    """One question and the answer to it.

    Args:
        messages: The conversation up to the answer, as (role, content).
        answer: What the model is to say next.
    """

    messages: tuple[tuple[str, str], ...]
    answer: str


def make_examples(task: str, count: int, seed: int) -> list[Example]:
    """Generate examples of a reasoning-gym task, each question once.

    Args:
        task: The task's name.
        count: How many.
        seed: The generator's seed.

    Returns:
        The examples.
    """
    import reasoning_gym

    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2} if task == "chain_sum" else {}
    found: dict[str, Example] = {}
    # Questions repeat, so more are drawn than are wanted.
    for item in reasoning_gym.create_dataset(task, size=3 * count, seed=seed, **settings):
        found.setdefault(item["question"], Example((("user", item["question"]),), item["answer"]))
    return list(found.values())[:count]


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    """Turn an example into the tokens of its prompt and of its answer, by the tokenizer's chat template if it has one.

    Args:
        tokenizer: The model's tokenizer.
        example: The example.

    Returns:
        The prompt's tokens and the answer's, ending as the template or the end-of-sequence token says.
    """
    if tokenizer.chat_template is None:
        prompt = "".join(f"{content}\n" for _, content in example.messages)
        answer = example.answer + (tokenizer.eos_token or "")
    else:
        messages = [{"role": role, "content": content} for role, content in example.messages]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        messages.append({"role": "assistant", "content": example.answer})
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        answer = whole.removeprefix(prompt).rstrip("\n")
    return (
        tokenizer(prompt, add_special_tokens=False)["input_ids"],
        tokenizer(answer, add_special_tokens=False)["input_ids"],
    )


def load_base_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer in float32.

    Args:
        name: A hub id or a folder.

    Returns:
        The model, for evaluation, and the tokenizer, with a padding token.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.eval()
    return model, tokenizer


def build_config(arm: str, rank: int, axes: dict[str, Any]) -> LoraConfig:
    """The configuration of one arm; both have the same low-rank half.

    Args:
        arm: `LoRA`, or anything else for LoRA with the side path.
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
