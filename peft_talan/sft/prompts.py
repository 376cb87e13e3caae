"""Rows and prompts as tokens, and the form of the prompts that an adapter was trained on, stored beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .data import DataError, Rows
from .formats import is_conversational, messages_of

PROMPT_FORM_FILE = "prompt_form.json"


class Encoded(NamedTuple):
    """The tokens of a row.

    Args:
        prompt: The tokens that are given; empty for plain text.
        completion: The tokens that follow, up to the end-of-sequence token.
    """

    prompt: list[int]
    completion: list[int]

    @property
    def length(self) -> int:
        """How many there are."""
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class PromptForm:
    """How the prompts that an adapter was trained on became tokens.

    Args:
        chat: Whether they went through the chat template.
        system: The system message with which every conversation began, if there was one.
    """

    chat: bool
    system: str | None = None

    @classmethod
    def of(cls, rows: Rows) -> PromptForm:
        """The form of the prompts of an adapter that is trained on these rows."""
        return cls(rows.conversational, rows.system)

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


def _from_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], row: Mapping[str, Any], **options: Any
) -> list[int]:
    tools = row.get("tools")
    options |= {"tools": json.loads(tools) if isinstance(tools, str) else tools, **row.get("chat_template_kwargs", {})}
    # Tokenized by the template's method: the template itself writes what special tokens it wants.
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return list(encoded["input_ids"])


def _with_end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    end = tokenizer.eos_token or ""  # analysis takes tokenizers without one; `train` refuses them
    return text if text.endswith(end) else text + end


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, form: PromptForm) -> list[int]:
    """Turn a prompt, with the chat template the user's message, into tokens as training did."""
    if not form.chat:
        return list(tokenizer(prompt)["input_ids"])
    system = [{"role": "system", "content": form.system}] if form.system is not None else []
    messages = [*system, {"role": "user", "content": prompt}]
    return _from_template(tokenizer, messages, {}, add_generation_prompt=True)


def encode(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> Encoded:
    """Turn a row into tokens as TRL's SFTTrainer does.

    What the last message of a conversation says is its completion if it is the assistant's.
    """
    if "text" in row:
        return Encoded([], list(tokenizer(_with_end(tokenizer, row["text"]))["input_ids"]))
    if not is_conversational(row):
        prompt = list(tokenizer(row["prompt"])["input_ids"])
        whole = list(tokenizer(row["prompt"] + _with_end(tokenizer, row["completion"]))["input_ids"])
    else:
        messages = messages_of(row)
        given = row["prompt"] if "prompt" in row else messages[:-1]
        whole = _from_template(tokenizer, messages, row)
        answered = "prompt" in row or (given and messages[-1]["role"] == "assistant")
        prompt = _from_template(tokenizer, given, row, add_generation_prompt=True) if answered else []
    # Tokens can merge across the boundary: the completion starts where both differ, as in TRL.
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
    return Encoded(whole[:shared], whole[shared:])


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> list[Encoded]:
    """Turn all rows into tokens, with a bar on a terminal.

    Raises `DataError` if rows and tokenizer don't fit.
    """
    if rows.conversational and not tokenizer.chat_template:
        raise DataError(
            f"{rows.source}: the rows hold messages, and the tokenizer has no chat template; give 'prompt' and "
            "'completion' as texts"
        )
    if not rows.conversational and tokenizer.eos_token is None:
        raise DataError(f"{rows.source}: the tokenizer has no end-of-sequence token, which ends every text")
    return [encode(tokenizer, row) for row in logging.tqdm(rows.rows, "Counting tokens", disable=None, leave=False)]
