"""Rows whose answers stand further back than a window: what doesn't fit, and how many are answered right by length."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

from peft import PeftModel
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..tuner.measured_pass import in_evaluation_mode
from ..tuner.sliding_window import own_window, without_window
from .data import DataError, Rows
from .display import make_table
from .prompts import Encoded, encode
from .recall import last_answers
from .scores import score_rows

FEW_ROWS, READ_ROWS = 64, 32
LONG_ANSWER = 8
"""Tokens; a side path has so many slots that can each hold one."""
UNIT = 128
"""Where the first length ends, tokens, for a model without a window."""
BATCH_TOKENS = 4096
MODEL, ADAPTER, BASE, FULL = "model", "adapter", "base model", "base model without window"


@dataclass(frozen=True)
class RightAnswers:
    """How many rows of some lengths are answered right.

    Args:
        shortest: The first of these lengths, tokens.
        longest: The last of them: the window times a power of two.
        windows: The same in windows; None for a model without one.
        rows: How many rows there are.
        right: How many of them each reader answers right: `"adapter"`, `"base model"` and, where it has a window,
            `"base model without window"`; of a model without an adapter `"model"`.
    """

    shortest: int
    longest: int
    windows: int | None
    rows: int
    right: dict[str, int]


def _window_of(model: nn.Module) -> int | None:
    try:
        return own_window(model)
    except ValueError:
        return None


def _answered(rows: Rows) -> Rows:
    """Rows with an answer each; refused if they have none."""
    if rows.form == "text":
        raise DataError(
            f"{rows.source}: rows of 'text' have no answers; give 'prompt' and 'completion', or 'messages'"
        )
    return last_answers(rows)


def _readers(model: Any) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """What makes a model read as the adapter, as its base model, and as that without its window."""
    if not isinstance(model, PeftModel):
        return {MODEL: nullcontext}

    @contextmanager
    def full() -> Iterator[None]:
        with model.disable_adapter(), without_window(model):
            yield

    with_adapter: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        ADAPTER: nullcontext,
        BASE: model.disable_adapter,
    }
    return with_adapter if _window_of(model) is None else {**with_adapter, FULL: full}


def count_right(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> list[RightAnswers]:
    """Count the rows that greedy decoding answers right, by length, with an adapter and without it.

    The adapter is right if it gives all tokens of the completion and ends there. Of the base model, which was never
    told where such answers end, the end isn't asked for.

    Args:
        model: What `load_adapter` or a trainer has: an adapter on its base model, or a merged model.
        tokenizer: Its tokenizer.
        rows: Rows of `prompt` and `completion`, or of `messages`, whose last answer counts; held out from training.

    Returns:
        The counts, the shortest rows first.

    Raises:
        DataError: The rows have no answers.

    Examples:
        >>> model, tokenizer = load_adapter("recall")
        >>> for found in count_right(model, tokenizer, read_rows("held-out.jsonl")):
        ...     print(f"up to {found.longest} tokens: {found.right['adapter']} of {found.rows}")
    """
    window = _window_of(model)
    unit = window or UNIT
    by_length: dict[int, list[Any]] = {}
    for row in _answered(rows).rows:
        length = sum(map(len, encode(tokenizer, row)))
        longest = unit
        while longest < length:
            longest *= 2
        by_length.setdefault(longest, []).append(row)
    found = []
    with in_evaluation_mode(model):
        for longest, part in sorted(by_length.items()):
            right = {}
            for reader, reading in _readers(model).items():
                with reading():
                    right[reader] = _right(model, tokenizer, part, longest, ends=reader in (MODEL, ADAPTER))
            shortest = 1 if longest == unit else longest // 2 + 1
            found.append(RightAnswers(shortest, longest, window and longest // window, len(part), right))
    return found


def _right(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any], longest: int, ends: bool) -> int:
    size = max(1, BATCH_TOKENS // longest)
    return sum(score_rows(model, tokenizer, rows, batch_size=size, max_length=longest, ends=ends).exact)


def right_answers_table(found: Sequence[RightAnswers]) -> Table:
    """The counts as a table, with a line for each range of lengths."""
    in_windows = found[0].windows is not None
    table = make_table("Right answers", "tokens", *(["windows"] if in_windows else []), "rows", *found[0].right)
    for part in found:
        windows = [f"up to {part.windows}"] if in_windows else []
        table.add_row(f"{part.shortest}-{part.longest}", *windows, str(part.rows), *map(str, part.right.values()))
    return table


def describe_reading(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int) -> str:
    """Tell how many of the first rows of at most a length a model answers right without its window."""
    fitting = ((row, sum(map(len, encode(tokenizer, row)))) for row in _answered(rows).rows)
    read = list(islice((both for both in fitting if both[1] <= max_length), READ_ROWS))
    if not read:
        return f"no row has at most {max_length} tokens: whether the model can answer without its window isn't known"
    answered = [row for row, _ in read]
    with in_evaluation_mode(model), without_window(model):
        right = _right(model, tokenizer, answered, max(length for _, length in read), ends=False)
    line = f"without its window the model answers {right} of {len(answered)} rows right"
    if 2 * right >= len(answered):
        return line
    return f"{line}, and recall starts from those; ask for what it can answer, or take more steps"


def describe_far_answers(tokenizer: PreTrainedTokenizerBase, rows: Rows, window: int) -> list[str]:
    """Count the rows that teach no recall from beyond a window, a line for each kind, with what to change."""
    if rows.form == "text":
        return [
            f"all {len(rows)} rows are plain 'text': the model learns to live with its window, and nothing is asked "
            "for from beyond it; give 'prompt' and 'completion', or 'messages'"
        ]
    answered = last_answers(rows)
    parts = [_Parts.of(tokenizer, row) for row in answered.rows]
    lines = []
    for matches, what in (
        (
            lambda part: part.length <= window,
            f"have at most {window} tokens, the window: nothing lies beyond it; give longer rows, or a smaller window",
        ),
        (
            lambda part: part.length > window and part.stands_in(part.tokens.prompt[-window:], tokenizer),
            f"have their answer in the last {window} tokens of the prompt, too, where the window sees it; ask for "
            "what stands further back alone",
        ),
        (
            lambda part: not part.stands_in(part.tokens.prompt, tokenizer),
            "have an answer that their prompt doesn't hold as it is written; a memory is best at what can be copied",
        ),
        (
            lambda part: len(part.tokens.completion) > LONG_ANSWER + 1,
            f"have an answer of more than {LONG_ANSWER} tokens; longer ones take more steps, or are not learned",
        ),
        (
            lambda part: part.glued,
            "have a completion that is written on to the prompt's last word; begin it with a space",
        ),
    ):
        places = [place for place, part in zip(answered.places, parts, strict=True) if matches(part)]
        if places:
            lines.append(f"{len(places)} of {len(rows)} rows {what} (the first: {places[0]})")
    if len(rows) < FEW_ROWS:
        lines.append(f"{len(rows)} rows are few: they are learned by heart; give some hundred that differ")
    return lines


@dataclass(frozen=True)
class _Parts:
    """A row's tokens and its answer."""

    tokens: Encoded
    answer: str
    glued: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, row: Any) -> _Parts:
        tokens = encode(tokenizer, row)
        answer = str(tokenizer.decode(tokens.completion, skip_special_tokens=True)).strip()
        texts = isinstance(row["prompt"], str)
        return cls(tokens, answer, texts and row["prompt"][-1].isalnum() and row["completion"][0].isalnum())

    @property
    def length(self) -> int:
        return sum(map(len, self.tokens))

    def stands_in(self, tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the answer stands there, and not as a part of another word."""
        return bool(re.search(rf"(?<!\w){re.escape(self.answer)}(?!\w)", str(tokenizer.decode(tokens))))
