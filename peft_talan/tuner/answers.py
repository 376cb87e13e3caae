"""The answers of a batch that depend on what lies beyond a window, and their losses."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase


class NothingToRecall(ValueError):
    """Side paths can't start as a memory, of these axes or from these rows; the message says why."""


@dataclass
class Answers:
    """The tokens of a batch that are trained on and depend on what lies beyond the window, in the answers' order."""

    inputs: dict[str, Any]
    trained: torch.Tensor
    """[batch, tokens], bool: whether a token is part of an answer, of which a row may have several."""
    valid: torch.Tensor
    """[batch, tokens], bool; without each row's first token, which attention uses as a sink."""
    places: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """For the first, second, ... token of an answer: rows, the tokens that predict it, and its ids, [answers] each."""

    @classmethod
    def of(cls, batch: Mapping[str, Any], window: int, slots: int, device: torch.device) -> Answers:
        """Find them, one for each slot at most; of a row the last answer counts, without the token that ends it."""
        if batch.get("labels") is None:
            raise ValueError("dataloader: its batches have no 'labels'; give them, or use initialize_talan_weights")
        if batch.get("position_ids") is not None:
            remedy = "give rows that aren't, or use initialize_talan_weights"
            raise NothingToRecall(f"dataloader: its rows are packed; {remedy}")
        inputs = {name: part.to(device) for name, part in batch.items() if isinstance(part, torch.Tensor)}
        labels = inputs.pop("labels")
        mask = inputs.get("attention_mask")
        valid = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool().clone()
        first = valid.long().argmax(1)
        valid[torch.arange(len(valid), device=device), first] = False
        found = cls(inputs, labels != -100, valid)
        answers = []
        for row in (labels != -100).tolist():
            last = len(row) - 1 - row[::-1].index(True) if True in row else -1
            begin = last
            while begin > 0 and row[begin - 1]:
                begin -= 1
            answers.append(range(begin, max(last, begin + 1)) if last > 0 else range(0))
        for ordinal in range(min(slots, max(map(len, answers), default=0))):
            chosen = [
                (row, tokens[ordinal])
                for row, tokens in enumerate(answers)
                if ordinal < len(tokens) and tokens[ordinal] - 1 - window > int(first[row])
            ]
            rows, at = torch.tensor(chosen, device=device, dtype=torch.long).reshape(-1, 2).T
            found.places.append((rows, at - 1, labels[rows, at]))
        return found

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return any(len(rows) > 0 for rows, _, _ in self.places)

    def copies(self, window: int, tokenizer: PreTrainedTokenizerBase | None = None) -> torch.Tensor:
        """Where answers stand beyond the window, too: of each the last place of as much of its beginning as does.

        With the tokenizer they are compared as text, without regard to case and to the spaces around an answer;
        without it as tokens.

        Returns:
            Of each such token: its row, the token that predicts it, and its place; int64, [3, found].
        """
        found: list[tuple[int, int, int]] = []
        # On the host: what follows looks at one token after the other.
        parts = (part.cpu() for part in (self.inputs["input_ids"], self.trained, self.valid))
        for row, (ids, trained, valid) in enumerate(zip(*parts, strict=True)):
            pieces = _texts(ids.tolist(), tokenizer)
            begin = int(valid.long().argmax())
            firsts = (trained & ~F.pad(trained[:-1], (1, 0))).nonzero()[:, 0].tolist()
            ends = (trained & ~F.pad(trained[1:], (0, 1))).nonzero()[:, 0].tolist()
            for first, last in zip(firsts, ends, strict=True):
                places = _standing(pieces[begin : max(first - window, begin)], pieces[first : last + 1])
                found += [(row, first + token - 1, begin + place) for token, place in enumerate(places)]
        return torch.tensor(found, device=self.valid.device, dtype=torch.long).reshape(-1, 3).T

    def losses(self, forward: Callable[..., Any], **options: Any) -> tuple[list[torch.Tensor], Any]:
        """The summed cross-entropy of each place in the answers, and the model's output."""
        needed = [at for _, at, _ in self.places]
        kept = torch.unique(torch.cat(needed)) if needed else torch.zeros(0, dtype=torch.long)
        output = forward(**self.inputs, use_cache=False, logits_to_keep=kept, **options)
        return [
            F.cross_entropy(output.logits[rows, torch.searchsorted(kept, at)].float(), ids, reduction="sum")
            for rows, at, ids in self.places
        ], output


def whole_words(text: str) -> re.Pattern[str]:
    """Where a text stands by itself, and not as a part of other words."""
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")


def _texts(ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """What tokens are compared by."""
    if tokenizer is None:
        return [f"<{token}>" for token in ids]
    # Behind another token, as some tokenizers leave out the space of a first one.
    begin = len(tokenizer.decode(ids[:1]))
    texts = [text[begin:] for text in tokenizer.batch_decode([[ids[0], token] for token in ids])]
    # Parts of a letter look alike.
    return [f"<{token}>" if "\ufffd" in text else text.casefold() for token, text in zip(ids, texts, strict=True)]


def _standing(text: list[str], answer: list[str]) -> list[int]:
    """Of the tokens of as much of an answer's beginning as stands in a text: the text's token in which each begins.

    It is the last such place, and one of whole words, but for a whole answer that has none.
    """
    if not text:
        return []
    ends, whole = list(accumulate(map(len, text))), "".join(text)
    for number in range(len(answer), 0, -1):
        wanted = "".join(answer[:number]).strip()
        if not wanted or wanted not in whole:
            continue
        words = [match.start() for match in whole_words(wanted).finditer(whole)]
        # The last token may be the one that ends an answer.
        if not words and number < len(answer) - 1:
            continue
        at = words[-1] if words else whole.rindex(wanted)
        spaces = len("".join(answer)) - len("".join(answer).lstrip())
        starts = accumulate(map(len, answer[: number - 1]), initial=-spaces)
        return [bisect_right(ends, at + max(start, 0)) for start in starts if start < len(wanted)]
    return []
