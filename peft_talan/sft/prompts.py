"""Rows and prompts as tokens, and the form of the prompts that an adapter was trained on, stored beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .data import DataError, Rows
from .formats import TEMPLATE_COLUMNS, Row, is_conversational, messages_of

PROMPT_FORM_FILE = "prompt_form.json"
IGNORED = -100
"""The label that losses pass over."""
FORM_ROWS = 64
"""How many rows tell how answers begin."""
PLACEHOLDER = "TheAnswerStandsHere"
"""A text that chat templates write as it is."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of a row.

    Args:
        prompt: The tokens that are given; empty for plain text.
        answer: The tokens that follow.
        end: What ends the answer; of a conversation no more than up to the first special token.
        marks: Of each token whether it is trained on, where that isn't the completion alone.
    """

    prompt: list[int]
    answer: list[int]
    end: list[int] = field(default_factory=list)
    marks: list[int] | None = None

    @property
    def completion(self) -> list[int]:
        """The answer and its end."""
        return self.answer + self.end

    @property
    def tokens(self) -> list[int]:
        """All tokens."""
        return self.prompt + self.completion

    @property
    def labels(self) -> list[int]:
        """The tokens that are trained on, and `IGNORED` in place of the others."""
        if self.marks is None:
            return [IGNORED] * len(self.prompt) + self.completion
        return [token if mark else IGNORED for token, mark in zip(self.tokens, self.marks, strict=True)]

    @property
    def length(self) -> int:
        """How many there are."""
        return len(self.prompt) + len(self.answer) + len(self.end)


@dataclass(frozen=True)
class PromptForm:
    """How the prompts that an adapter was trained on became tokens.

    Args:
        chat: Whether they went through the chat template.
        system: The system message with which every conversation began, if there was one.
        tools: The `tools` of every row, if they were the same.
        chat_template_kwargs: Those of every row, if they were the same.
        generation_prompt: Whether answers begin after the template's generation prompt, as those with reasoning do,
            and not after all that the template writes before an answer's text.
    """

    chat: bool
    system: str | None = None
    tools: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    generation_prompt: bool = False

    @classmethod
    def of(cls, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> PromptForm:
        """The form of the prompts of an adapter that is trained on these rows."""
        if not rows.conversational:
            return cls(chat=False)
        options = {name: rows.shared(name) for name in TEMPLATE_COLUMNS}
        read = [_Talk.of(tokenizer, row).opened for row in rows.rows[:FORM_ROWS]]
        return cls(True, rows.system, **options, generation_prompt=2 * sum(read) < len(read))

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the form into an adapter's folder."""
        Path(folder, PROMPT_FORM_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, adapter: str) -> PromptForm | None:
        """Read the form from an adapter's folder or hub id; None if something else trained the adapter."""
        try:
            file = str(cached_file(adapter, PROMPT_FORM_FILE))
        except OSError:  # There is none, or no hub to look at.
            return None
        return cls(**json.loads(Path(file).read_text(encoding="utf-8")))


def _template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], row: Mapping[str, Any], **options: Any
) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **{**options, **_template_options(row)}))


def _around_answer(
    tokenizer: PreTrainedTokenizerBase, given: list[dict[str, Any]], row: Mapping[str, Any], role: str = "assistant"
) -> tuple[str, str]:
    """What the chat template writes up to an answer's text, such as an empty thought, and after it."""
    asked = _render(tokenizer, given, row, add_generation_prompt=True)
    both = _render(tokenizer, [*given, {"role": role, "content": PLACEHOLDER}], row)
    before, found, after = both.partition(PLACEHOLDER)
    # A space before an answer is a part of its first token.
    opened = before.rstrip(" ")
    if not found or (before.startswith(asked) and asked.startswith(opened)):
        return asked, after
    return opened, after


@dataclass(frozen=True)
class _Talk:
    """A conversation as text, and where in it the last answer's text stands; nowhere if nothing is answered."""

    text: str
    begin: int = 0
    end: int = 0
    opened: bool = True
    """Whether the answer stands where the template puts an answer's text."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> _Talk:
        messages = messages_of(row)
        given = row["prompt"] if "prompt" in row else messages[:-1]
        text = _render(tokenizer, messages, row)
        if "prompt" not in row and not (given and messages[-1]["role"] == "assistant"):
            return cls(text)
        before, after = _around_answer(tokenizer, given, row, messages[len(given)]["role"])
        if len(given) < len(messages) - 1:
            after = _around_answer(tokenizer, messages[:-1], row, messages[-1]["role"])[1]
        opened = text.startswith(before)
        if not opened:  # Such as one with reasoning, which the model writes by itself.
            asked = _render(tokenizer, given, row, add_generation_prompt=True)
            before = asked[: _shared(asked, text)]
        end = len(text) - len(after) if text.endswith(after) else len(text)
        return cls(text, len(before), max(end, len(before)), opened)


def _with_end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    end = tokenizer.eos_token or ""  # analysis takes tokenizers without one; `train` refuses them
    return text if text.endswith(end) else text + end


def _shared(tokens: Sequence[Any], others: Sequence[Any]) -> int:
    """How many tokens two texts begin with alike: tokens can merge across the place where one ends."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, others, strict=False)))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, form: PromptForm) -> list[int]:
    """Turn a prompt, with the chat template the user's message, into tokens as training did."""
    if not form.chat:
        return list(tokenizer(prompt)["input_ids"])
    system = [{"role": "system", "content": form.system}] if form.system is not None else []
    messages, row = [*system, {"role": "user", "content": prompt}], asdict(form)
    if form.generation_prompt:
        text = _render(tokenizer, messages, row, add_generation_prompt=True)
    else:
        text, _ = _around_answer(tokenizer, messages, row)
    # The template itself writes what special tokens it wants.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_texts(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> Encoded:
    given, answer = ("", row["text"]) if "text" in row else (row["prompt"], row["completion"])
    tokens = list(tokenizer(given + _with_end(tokenizer, answer))["input_ids"])
    begin = 0 if "text" in row else _shared(tokenizer(given)["input_ids"], tokens)
    end = tokens.index(tokenizer.eos_token_id, begin) if tokenizer.eos_token_id in tokens[begin:] else len(tokens)
    return Encoded(tokens[:begin], tokens[begin:end], tokens[end:])


def encode(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> Encoded:
    """Turn a row into tokens as TRL's SFTTrainer does; what the assistant says last is a conversation's completion.

    Beside that, what the chat template writes before an answer's text is a part of the prompt, as the model never has
    to write it; and what it writes after the token that ends the answer is left out.
    """
    if not is_conversational(row):
        return _encode_texts(tokenizer, row)
    talk = _Talk.of(tokenizer, row)
    texts = [talk.text, talk.text[: talk.begin], talk.text[: talk.end]]
    tokens, given, answered = (list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    if not talk.end:
        return Encoded([], tokens)
    begin = _shared(given, tokens)
    end = stop = max(begin, _shared(answered, tokens))
    while stop < len(tokens):
        stop += 1
        if _is_special(tokenizer, tokens[stop - 1]):
            break
    return Encoded(tokens[:begin], tokens[begin:end], tokens[end:stop])


def _is_special(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return bool(tokenizer.decode([token])) and not tokenizer.decode([token], skip_special_tokens=True)


def stop_tokens(tokenizer: PreTrainedTokenizerBase, form: PromptForm) -> list[int]:
    """The tokens that end answers in training: the tokenizer's, and that of the chat template if it is another one."""
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if form.chat:
        talk = [{"role": role, "content": "?"} for role in ("user", "assistant")]
        end = encode(tokenizer, {**asdict(form), "messages": talk}).end
        stops += [token for token in end if token not in stops and _is_special(tokenizer, token)]
    return stops


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Rows, marked: str | None = None) -> list[Encoded]:
    """Turn all rows into the tokens that are trained on, with a bar on a terminal.

    Of `messages` that is all of the conversation; with `marked`, a chat template that marks what the assistant says,
    only that. Raises `DataError` if rows and tokenizer don't fit.
    """
    if rows.conversational and not tokenizer.chat_template:
        raise DataError(
            f"{rows.source}: the rows hold messages, and the tokenizer has no chat template; give 'prompt' and "
            "'completion' as texts"
        )
    if not rows.conversational and tokenizer.eos_token is None:
        raise DataError(f"{rows.source}: the tokenizer has no end-of-sequence token, which ends every text")
    both = zip(logging.tqdm(rows.rows, "Tokenizing", disable=None, leave=False), rows.places, strict=True)
    return [_encode_trained(tokenizer, row, place, marked) for row, place in both]


def _encode_trained(tokenizer: PreTrainedTokenizerBase, row: Row, place: str, marked: str | None) -> Encoded:
    if "messages" not in row:
        encoded_row = encode(tokenizer, row)
        if not encoded_row.answer:
            raise DataError(f"{place}: the answer adds no token to the prompt; mend the row or the chat template")
        return encoded_row
    options = {"chat_template": marked, "return_assistant_tokens_mask": marked is not None, **_template_options(row)}
    encoded: Any = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True, **options)
    marks = encoded.get("assistant_masks")
    if marks is not None and 1 not in marks:
        raise DataError(f"{place}: the chat template marks no token as the assistant's; give an answer to train on")
    return Encoded([], list(encoded["input_ids"]), marks=marks)
