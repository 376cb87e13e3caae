"""Counts how many rows, whose answers stand further back than a window, are answered right by length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

from peft import PeftModel
from rich.console import Group
from rich.text import Text
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..tuner.measured_pass import in_evaluation_mode
from ..tuner.sliding_window import own_window, without_window
from .data import DataError, Rows
from .display import make_table
from .prompts import Encoded, encode_rows
from .recall import last_answers
from .scores import Scores, score_rows

READ_ROWS = 32
SHOWN_WRONG, SHOWN_CHARACTERS = 3, 48
"""How many wrong answers of each length are shown, and how much of the question's end."""
UNIT = 128
"""Where the first length ends, tokens, for a model without a window."""
BATCH_TOKENS = 4096
MODEL, ADAPTER, BASE, FULL = "model", "adapter", "base model", "base model without window"


@dataclass(frozen=True)
class WrongAnswer:
    """A row that is answered wrong.

    Args:
        place: Where the row stands, such as `data.jsonl:6`.
        tokens: Its length with the token that ends it.
        question: The end of its prompt, of a conversation that of the last message.
        expected: Its answer.
        given: What greedy decoding gives, up to the first wrong token; `"…"` stands where it would go on, and nothing
            if it ended at once.
    """

    place: str
    tokens: int
    question: str
    expected: str
    given: str


@dataclass(frozen=True)
class RightAnswers:
    """How many rows of some lengths are answered right, and which ones aren't.

    Args:
        shortest: The first of these lengths, tokens.
        longest: The last of them: the window times a power of two.
        windows: The same in windows; None for a model without one.
        rows: How many rows there are.
        right: How many of them each reader answers right: `"adapter"`, `"base model"` and, where it has a window,
            `"base model without window"`; of a model without an adapter `"model"`.
        wrong: The rows that the adapter, or a model without one, answers wrong.
    """

    shortest: int
    longest: int
    windows: int | None
    rows: int
    right: dict[str, int]
    wrong: list[WrongAnswer]


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
            Those with an empty prompt aren't counted.

    Returns:
        The counts, the shortest rows first.

    Raises:
        DataError: The rows have no answers, or one has no token.

    Examples:
        >>> model, tokenizer = load_adapter("recall")
        >>> for found in count_right(model, tokenizer, read_rows("held-out.jsonl")):
        ...     print(f"up to {found.longest} tokens: {found.right['adapter']} of {found.rows}")
    """
    window = _window_of(model)
    unit = window or UNIT
    by_length: dict[int, list[_Asked]] = {}
    answered = _answered(rows)
    for asked in map(_Asked, answered.places, answered.rows, encode_rows(tokenizer, answered)):
        if not asked.tokens.prompt:
            continue
        longest = unit
        while longest < asked.tokens.length:
            longest *= 2
        by_length.setdefault(longest, []).append(asked)
    readers = _readers(model)
    found = []
    bar = logging.tqdm(desc="Counting right answers", total=len(rows) * len(readers), disable=None, leave=False)
    with in_evaluation_mode(model), bar:
        for longest, part in sorted(by_length.items()):
            encoded = [asked.tokens for asked in part]
            scores = {}
            for reader, reading in readers.items():
                with reading():
                    ends = reader in (MODEL, ADAPTER)
                    scores[reader] = _score(model, tokenizer, encoded, longest, ends=ends, report=bar.update)
            first = next(iter(scores.values()))
            answers = zip(part, first.exact, first.given, strict=True)
            found.append(
                RightAnswers(
                    shortest=1 if longest == unit else longest // 2 + 1,
                    longest=longest,
                    windows=window and longest // window,
                    rows=len(part),
                    right={reader: sum(of_reader.exact) for reader, of_reader in scores.items()},
                    wrong=[asked.wrong(given, tokenizer) for asked, right, given in answers if not right],
                )
            )
    return found


@dataclass(frozen=True)
class _Asked:
    """A row that is counted, and its tokens."""

    place: str
    row: Any
    tokens: Encoded

    def wrong(self, given: list[int], tokenizer: PreTrainedTokenizerBase) -> WrongAnswer:
        """The row with the answer that was given up to its first wrong token."""

        def read(tokens: list[int]) -> str:
            return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

        prompt = self.row["prompt"]
        asked = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
        question = " ".join(asked.split())[-SHOWN_CHARACTERS:]
        goes_on = "" if given[-1] in (tokenizer.eos_token_id, *self.tokens.end) else "…"
        return WrongAnswer(
            self.place, self.tokens.length, question, read(self.tokens.completion), read(given) + goes_on
        )


def _score(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    longest: int,
    ends: bool,
    report: Callable[[int], object] = lambda count: None,
) -> Scores:
    size = max(1, BATCH_TOKENS // longest)
    return score_rows(model, tokenizer, rows, batch_size=size, max_length=longest, ends=ends, report=report)


def right_answers_tables(found: Sequence[RightAnswers], others: str) -> Group:
    """The counts, with a line for each range of lengths, and a few wrong answers of each.

    `others` says where the other wrong ones stand.
    """
    in_windows = found[0].windows is not None
    counts = make_table("Right answers", "tokens", *(["windows"] if in_windows else []), "rows", *found[0].right)
    for part in found:
        windows = [f"up to {part.windows}"] if in_windows else []
        counts.add_row(f"{part.shortest}-{part.longest}", *windows, str(part.rows), *map(str, part.right.values()))
    shown = [wrong for part in found for wrong in part.wrong[:SHOWN_WRONG]]
    if not shown:
        return Group(counts)
    total = sum(len(part.wrong) for part in found)
    title = "Wrong answers" if len(shown) == total else f"Wrong answers: {len(shown)} of {total}, {others}"
    wrong_answers = make_table(title, "row", "tokens", "the question ends", "expected", "given")
    for wrong in shown:
        # As texts: what stands in brackets is no markup.
        place, *texts = map(Text, (wrong.place, wrong.question, wrong.expected, wrong.given))
        wrong_answers.add_row(place, str(wrong.tokens), *texts)
    return Group(counts, wrong_answers)


def describe_reading(
    model: Any, tokenizer: PreTrainedTokenizerBase, encoded: Sequence[Encoded], max_length: int
) -> str:
    """Tell how many of the first rows of at most a length a model answers right without its window."""
    read = list(islice((row for row in encoded if row.length <= max_length), READ_ROWS))
    if not read:
        return f"no row has at most {max_length} tokens: whether the model can answer without its window isn't known"
    with in_evaluation_mode(model), without_window(model):
        right = sum(_score(model, tokenizer, read, max(row.length for row in read), ends=False).exact)
    line = f"without its window the model answers {right} of {len(read)} rows right"
    if 2 * right >= len(read):
        return line
    return f"{line}; training mends a right answer in other words, else ask in the text's words or take a larger model"
