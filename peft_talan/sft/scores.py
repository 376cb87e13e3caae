"""What held-out rows and plain text say about a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .prompts import IGNORED, Encoded


@dataclass(frozen=True)
class Scores:
    """The scores of one model on held-out rows.

    Args:
        losses: The summed negative log-likelihood of each row's completion, nats.
        tokens: The number of tokens of each.
        exact: Whether greedy decoding generates exactly the completion, row by row.
        given: The tokens that greedy decoding generates, up to the first that isn't the completion's, row by row.
    """

    losses: list[float]
    tokens: list[int]
    exact: list[bool]
    given: list[list[int]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """The mean negative log-likelihood per token of the completions, nats."""
        return sum(self.losses) / sum(self.tokens)

    @property
    def exact_match(self) -> float:
        """The share of completions that greedy decoding generates exactly."""
        return sum(self.exact) / len(self.exact)


def pad_batch(rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Pad rows to one length, on the right; the labels, [rows, tokens], are the tokens of the completions."""
    columns = {
        "input_ids": ([row.tokens for row in rows], tokenizer.pad_token_id or 0),
        "attention_mask": ([[1] * row.length for row in rows], 0),
        "labels": ([row.labels for row in rows], IGNORED),
    }
    return {
        name: pad_sequence(
            [torch.tensor(row, dtype=torch.long) for row in column], batch_first=True, padding_value=padding
        )
        for name, (column, padding) in columns.items()
    }


def _scored_part(row: Encoded, stop: int | None, max_length: int, ends: bool) -> Encoded:
    """Cut a row at its largest length, and after or before the end of its answer, where generation stops, too."""
    end = row.end[: row.end.index(stop) + 1] if stop in row.end else row.end
    completion = row.answer + end if ends else row.answer
    return Encoded(row.prompt, completion[: max(0, max_length - len(row.prompt))])


@torch.no_grad()
def score_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    *,
    batch_size: int = 16,
    max_length: int = 1024,
    ends: bool = True,
    report: Callable[[int], object] = lambda count: None,
) -> Scores:
    """Score a model on held-out rows, in one forward pass each; rows without a token to score are left out.

    Greedy decoding generates exactly the completion if each of its tokens is the most likely one after the right ones
    before it: no token has to be generated. `ends`: what ends an answer is part of it. `report` is told how many rows
    were scored or left out.
    """
    scores = Scores([], [], [])
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    can_select = "logits_to_keep" in inspect.signature(base.forward).parameters
    parts = [_scored_part(row, tokenizer.eos_token_id, max_length, ends) for row in rows]
    scored_rows = [part for part in parts if part.completion and part.length > 1]
    report(len(rows) - len(scored_rows))
    for start in range(0, len(scored_rows), batch_size):
        part = scored_rows[start : start + batch_size]
        batch = {name: tensor.to(model.device) for name, tensor in pad_batch(part, tokenizer).items()}
        labels = batch.pop("labels")[:, 1:]
        selection: dict[str, int] = {}
        if can_select:
            # Logits of the prompts, of which a large vocabulary makes gigabytes, are not computed.
            labels = labels[:, max(0, min(len(row.prompt) for row in part) - 1) :]
            selection["logits_to_keep"] = labels.shape[1] + 1
        logits = model(**batch, **selection, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        scored, generated = labels != IGNORED, logits.argmax(-1)
        right = ((generated == labels) & scored).cpu()
        for loss, own, token_right, tokens in zip(
            losses.sum(-1).tolist(), scored.cpu(), right, generated.cpu(), strict=True
        ):
            scores.losses.append(loss)
            scores.tokens.append(int(own.sum()))
            matched = int(token_right[own].long().cumprod(0).sum())
            scores.exact.append(matched == scores.tokens[-1])
            scores.given.append(tokens[own][: matched + 1].tolist())
        report(len(part))
    return scores


def default_text() -> str:
    """A page of English prose in the public domain."""
    return files(__package__).joinpath("plain_text.txt").read_text(encoding="utf-8")


@torch.no_grad()
def text_loss(model: Any, tokenizer: PreTrainedTokenizerBase, text: str, window: int = 256) -> float:
    """Measure the mean loss per token of plain text, nats, in windows; its exponential is the perplexity."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], device=model.device)
    windows = [part[None] for part in tokens.split(window) if len(part) > 1]
    # The first token of a window has no loss.
    counts = [part.shape[1] - 1 for part in windows]
    losses = [float(model(input_ids=part, labels=part, use_cache=False).loss) for part in windows]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
