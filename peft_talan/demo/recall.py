"""Recall beyond the attention window: three tasks, a small window model that is trained here, and its fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..sft.callbacks import StepReport

Task = Literal["key", "pairs", "count"]
TASKS: tuple[Task, ...] = get_args(Task)

WINDOW = 16
"""Keys that a token attends to, itself included; also the length in which the tasks measure their texts."""
BLOCKS = 4
REACH = BLOCKS * (WINDOW - 1)
"""How many tokens back the last block's output depends on, through all blocks."""
ANSWERS = 16
CHANCE = 1 / ANSWERS
NAMES, MOST_NAMES = 3, 8
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


def window_config(task: Task, names: int = NAMES) -> MistralConfig:
    """The small window model: Mistral's architecture, 4 blocks, each with a sliding window of 16 keys."""
    return MistralConfig(
        vocab_size=FIRST_PAIR + (names * ANSWERS if task == "pairs" else 0),
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


def make_texts(
    task: Task, windows: int, rows: int, generator: torch.Generator, names: int = NAMES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw texts that end with a question about their beginning, or, for `count`, about all of them.

    `key`: an answer stands after a mark among the first tokens. `pairs`: the tokens at the start hold an answer for
    each of `names` names, 8 at most, and the question is about one name. `count`: up to 15 marks stand anywhere (14 in
    one window), and their number is the answer. Returned are token ids, [rows, windows * 16], and those of the
    answers, [rows].
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
        named = torch.rand(rows, names, generator=generator).argsort(1)
        values = torch.randint(ANSWERS, (rows, names), generator=generator)
        tokens[:, 1 : 1 + names] = FIRST_PAIR + named * ANSWERS + values
        chosen = torch.randint(names, (rows,), generator=generator)
        tokens[:, -1], answers = named[every, chosen] + FIRST_NAME, values[every, chosen]
    else:
        order = torch.rand(rows, length - 2, generator=generator).argsort(1).argsort(1)
        tokens[:, 1:-1][order < answers[:, None]] = MARK
    tokens[:, 0] = BEGIN
    tokens[:, -1 if task != "pairs" else -2] = ASK
    return tokens, answers + FIRST_ANSWER


def answer_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of what follows the last token, [rows, vocabulary] of [rows, length]."""
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits


@dataclass(frozen=True)
class Training:
    """How a model is trained: with AdamW, a warm-up of a tenth of the steps and a linear decay.

    Each step has `batch_size` texts of one of the lengths `windows`; the seed is that of the texts and their order.
    """

    steps: int
    learning_rate: float
    batch_size: int = 32
    windows: Sequence[int] = TRAINED_WINDOWS
    seed: int = 0


def _answer_loss(outputs: Any, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return F.cross_entropy(outputs.logits[:, -1], labels)


def train(
    model: Any, task: Task, training: Training, report: Callable[[float], None] = lambda loss: None
) -> list[float]:
    """Train whatever requires a gradient on the answers alone; return the loss of each step, nats."""
    generator = torch.Generator().manual_seed(training.seed)
    batches: list[dict[str, Any]] = []
    for _ in range(training.steps):
        windows = training.windows[int(torch.randint(len(training.windows), (), generator=generator))]
        tokens, answers = make_texts(task, windows, training.batch_size, generator)
        batches.append({"input_ids": tokens, "labels": answers, "use_cache": False, "logits_to_keep": 1})
    steps = StepReport(report)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            max_steps=training.steps,
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            learning_rate=training.learning_rate,
            warmup_steps=max(1, training.steps // 10),
            logging_steps=1,
            save_strategy="no",
        )
        # A row of the data is a batch of texts of one length.
        trainer = Trainer(
            model,
            arguments,
            train_dataset=batches,
            data_collator=lambda rows: rows[0],
            compute_loss_func=_answer_loss,
            callbacks=[steps],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return steps.losses


def pretrained(
    task: Task,
    seed: int,
    steps: int = 400,
    *,
    full_attention: bool = False,
    report: Callable[[float], None] = lambda loss: None,
) -> PreTrainedModel:
    """Train a base model that can do the task inside its window, and nothing beyond.

    With `full_attention` it is trained so on all of `TRAINED_WINDOWS`, and the window is set afterwards, as where a
    full-attention model's old keys are dropped.
    """
    torch.manual_seed(seed)
    model = MistralForCausalLM(window_config(task))
    if full_attention:
        model.config.sliding_window = None
    train(model, task, Training(steps, 3e-3, windows=TRAINED_WINDOWS if full_attention else (1,), seed=seed), report)
    model.config.sliding_window = WINDOW
    return model


@torch.no_grad()
def recall(model: Any, task: Task, windows: int, rows: int = 256, batch_size: int = 64, names: int = NAMES) -> float:
    """The share of held-out texts of a length whose answer is the likeliest next token."""
    tokens, answers = make_texts(task, windows, rows, torch.Generator().manual_seed(SCORED_SEED + windows), names)
    parts = [answer_logits(model, part).argmax(-1) for part in tokens.split(batch_size)]
    return float((torch.cat(parts) == answers).float().mean())
