"""What is told of rows before training: which ones it changes or leaves out, and which ones teach no recall."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..tuner.answers import whole_words
from .data import DataError, Rows
from .prompts import IGNORED, Encoded

FEW_ROWS = 64
LONG_ANSWER = 8
"""Tokens; a side path has so many slots that can each hold one."""


def describe_lengths(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, encoded: Sequence[Encoded], max_length: int, name: str = "rows"
) -> list[str]:
    """Count the rows, of which the tokens are given, that training would change or leave out, a line for each kind.

    `name` is what the lines call them. Raises `DataError` if no row has a token to train on.
    """
    begins_twice = [tokenizer.bos_token_id] * 2

    def places(matches: Callable[[Encoded], bool]) -> list[str]:
        return [place for place, row in zip(rows.places, encoded, strict=True) if matches(row)]

    cut = places(lambda row: row.length > max_length)
    lost = places(lambda row: all(label == IGNORED for label in row.labels[:max_length]))
    doubled = places(lambda row: row.tokens[:2] == begins_twice)
    if len(lost) == len(rows):
        raise DataError(
            f"{rows.source}: every row's first token to train on stands behind {max_length} tokens or more; raise "
            f"max_length={max_length}"
        )
    lines = []
    if cut:
        lengths = [tokens.length for tokens in encoded]
        longest = max(lengths)
        lines.append(
            f"{len(cut)} of {len(rows)} {name} are longer than max_length={max_length} and are cut there (the "
            f"longest: {longest:,} tokens, {rows.places[lengths.index(longest)]})"
        )
    if lost:
        part = "completion" if rows.form == "prompt-completion" else "assistant"
        lines.append(f"{len(lost)} of these have no token of the {part} left and are left out (first: {lost[0]})")
    if doubled:
        lines.append(
            f"{len(doubled)} of {len(rows)} {name} begin with two {tokenizer.bos_token!r}: the tokenizer adds one; "
            f"take it out of the data (first: {doubled[0]})"
        )
    return lines


def describe_far_answers(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, encoded: Sequence[Encoded], window: int
) -> list[str]:
    """Count the rows, of which the tokens are given, that teach no recall from beyond a window.

    The rows are of `prompt` and `completion`, or of `text`. A line for each kind, with what to change.
    """
    if rows.form == "text":
        return [
            f"all {len(rows)} rows are plain 'text': the model learns to live with its window, and nothing is asked "
            "for from beyond it; give 'prompt' and 'completion', or 'messages'"
        ]
    parts = [_Parts.of(tokenizer, row, tokens) for row, tokens in zip(rows.rows, encoded, strict=True)]
    lines = []
    for matches, what in (
        (
            lambda part: part.tokens.length <= window,
            f"have at most {window} tokens, the window: nothing lies beyond it; give longer rows, or a smaller window",
        ),
        (
            lambda part: part.tokens.length > window and part.stands_in(part.tokens.prompt[-window:], tokenizer),
            f"have their answer in the last {window} tokens of the prompt, where the window sees it; most rows should "
            "ask for what stands further back",
        ),
        (
            lambda part: not part.stands_in(part.tokens.prompt, tokenizer),
            "have an answer that their prompt doesn't hold as it is written; a memory is best at what can be copied",
        ),
        (
            lambda part: len(part.tokens.answer) > LONG_ANSWER,
            f"have an answer of more than {LONG_ANSWER} tokens; longer ones take more steps, or are not learned",
        ),
        (
            lambda part: part.glued,
            "have a completion that is written on to the prompt's last word; begin it with a space",
        ),
    ):
        places = [place for place, part in zip(rows.places, parts, strict=True) if matches(part)]
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
    def of(cls, tokenizer: PreTrainedTokenizerBase, row: Any, tokens: Encoded) -> _Parts:
        answer = str(tokenizer.decode(tokens.answer, skip_special_tokens=True)).strip()
        texts = isinstance(row["prompt"], str)
        return cls(tokens, answer, texts and row["prompt"][-1].isalnum() and row["completion"][0].isalnum())

    def stands_in(self, tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the answer stands there, and not as a part of another word."""
        return bool(whole_words(self.answer).search(str(tokenizer.decode(tokens))))
