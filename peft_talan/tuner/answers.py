"""The answers of a batch that depend on what lies beyond a window, and their losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F


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
            raise ValueError("dataloader: its rows are packed; give rows that aren't, or use initialize_talan_weights")
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

    def copies(self, window: int) -> torch.Tensor:
        """Where answers stand beyond the window, too: of each the last place of most of its tokens from the first on.

        Returns:
            Of each such token: its row, the token that predicts it, and its place; int64, [3, found].
        """
        found: list[tuple[int, int, int]] = []
        # On the host: what follows looks at one token after the other.
        parts = (part.cpu() for part in (self.inputs["input_ids"], self.trained, self.valid))
        for row, (ids, trained, valid) in enumerate(zip(*parts, strict=True)):
            for first in (trained & ~F.pad(trained[:-1], (1, 0))).nonzero()[:, 0].tolist():
                places = (valid & (ids == ids[first]))[: max(first - window, 0)].nonzero()[:, 0]
                number = 0
                while len(places):
                    last, number = int(places[-1]), number + 1
                    if first + number == len(ids) or not trained[first + number]:
                        break
                    places = places[ids[places + number] == ids[first + number]]
                found += [(row, first + token - 1, last + token) for token in range(number)]
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


def reach_beyond(batches: Iterable[Mapping[str, Any]], window: int, slots: int, copied: bool = False) -> bool:
    """Whether an answer of rows that aren't packed has a token beyond the window, by its first tokens.

    With `copied`, that a token of an answer stands there.
    """
    for batch in batches:
        if batch.get("position_ids") is None:
            answers = Answers.of(batch, window, slots, batch["input_ids"].device)
            if answers.copies(window).shape[1] if copied else answers.any:
                return True
    return False
