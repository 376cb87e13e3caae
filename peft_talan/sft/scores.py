"""What held-out rows and plain text say about a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from .prompts import Encoded, encode

IGNORED = -100
"""The label that losses pass over."""

TEXT_WINDOW = 256
"""Tokens of plain text in a row."""


@dataclass(frozen=True)
class Scores:
    """The scores of one model on held-out rows.

    Args:
        losses: The summed negative log-likelihood of each row's completion, nats.
        tokens: The number of tokens of each.
        exact: Whether greedy decoding gives the completion to the token, row by row.
    """

    losses: list[float]
    tokens: list[int]
    exact: list[bool]

    @property
    def loss(self) -> float:
        """The mean negative log-likelihood of a completion's token, nats."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def exact_match(self) -> float:
        """The share of completions that greedy decoding gives to the token."""
        return sum(self.exact) / len(self.exact)


def pad_batch(rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Pad rows to one length, on the right; the labels are the completions' tokens.

    Args:
        rows: The tokens of each row.
        tokenizer: The model's tokenizer, with a padding token.

    Returns:
        `input_ids`, `attention_mask` and `labels`, [rows, tokens].
    """
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    features = []
    for prompt, completion in rows:
        whole = prompt + completion
        labels = [IGNORED] * len(prompt) + completion
        features.append({"input_ids": whole, "attention_mask": [1] * len(whole), "labels": labels})
    previous, tokenizer.padding_side = tokenizer.padding_side, "right"
    try:
        return dict(collate(features))
    finally:
        tokenizer.padding_side = previous


def _until_end(encoded: Encoded, end: int | None) -> Encoded:
    """Leave out what a template writes after the end of the answer, which generation never comes to."""
    prompt, completion = encoded
    return Encoded(prompt, completion[: completion.index(end) + 1] if end in completion else completion)


@torch.no_grad()
def score_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int = 16,
    max_length: int = 1024,
    report: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Score a model on held-out rows, in one forward pass each.

    Greedy decoding gives a completion to the token exactly if each of its tokens is the most likely one after the
    right ones before it: no token has to be generated.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        rows: The checked rows.
        batch_size: Rows a forward pass. Default 16.
        max_length: Where longer rows are cut, in tokens. Default 1024.
        report: Called with the number of rows done.

    Returns:
        The scores; a row without a token to score is left out.
    """
    found = Scores([], [], [])
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
    for start in range(0, len(rows), batch_size):
        part = [encode(tokenizer, row) for row in rows[start : start + batch_size]]
        encoded = [_until_end(row, tokenizer.eos_token_id) for row in part]
        encoded = [Encoded(prompt, completion[: max(0, max_length - len(prompt))]) for prompt, completion in encoded]
        batch = {name: tensor.to(model.device) for name, tensor in pad_batch(encoded, tokenizer).items()}
        labels = batch.pop("labels")[:, 1:]
        asked: dict[str, int] = {}
        if keeps:
            # Logits of the prompts, of which a large vocabulary makes gigabytes, are not asked for.
            labels = labels[:, max(0, min(len(row.prompt) for row in encoded) - 1) :]
            asked["logits_to_keep"] = labels.shape[1] + 1
        logits = model(**batch, **asked, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        scored = labels != IGNORED
        exact = ((logits.argmax(-1) == labels) | ~scored).all(-1)
        for loss, count, right in zip(losses.sum(-1).tolist(), scored.sum(-1).tolist(), exact.tolist(), strict=True):
            if count:
                found.losses.append(loss)
                found.tokens.append(count)
                found.exact.append(right)
        report(min(start + batch_size, len(rows)))
    return found


def default_text() -> str:
    """English prose in the public domain, to see what a model still knows of plain text."""
    return files(__package__).joinpath("plain_text.txt").read_text(encoding="utf-8")


@torch.no_grad()
def text_loss(model: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Measure the mean loss of a token of plain text, in windows; its exponential is the perplexity.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        text: The text.

    Returns:
        The mean negative log-likelihood of a token, nats.
    """
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], device=model.device)
    total, count = 0.0, 0
    for window in tokens.split(TEXT_WINDOW):
        if len(window) > 1:
            loss = model(input_ids=window[None], labels=window[None], use_cache=False).loss
            total, count = total + float(loss) * (len(window) - 1), count + len(window) - 1
    return total / count
