"""The formats of a row of data: those of TRL (https://huggingface.co/docs/trl/dataset_formats), checked row by row.

- `messages`: a conversation, whose tokens are all trained on;
- `prompt` and `completion`: both texts, or both lists of messages; the completion's tokens are trained on;
- `text`: plain text, whose tokens are all trained on.

Messages go through the tokenizer's chat template, texts never do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Row = Mapping[str, Any]
Form = Literal["messages", "prompt-completion", "text"]

PAIR = ("prompt", "completion")
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""What chat templates take beside the messages; TRL passes both on."""

SHAREGPT = {"from": "role", "value": "content"}
"""The names in ShareGPT's files, which TRL takes, too."""

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
KNOWN_ALIASES = {
    "prompt": ("instruction", "question", "input", "query"),
    "completion": ("output", "answer", "response", "target"),
}
REMEDY = "give 'messages', 'prompt' and 'completion', or 'text'"


def _check_text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} must be a text that is not empty, not {value!r}")
    return value


def _check_messages(name: str, value: object) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"{name!r} must be a list of messages, not {value!r}")
    messages: list[dict[str, Any]] = []
    for message in value:
        if not isinstance(message, Mapping):
            raise ValueError(f"each of {name!r} must be an object with 'role' and 'content', not {message!r}")
        renamed = {SHAREGPT.get(str(key), str(key)): part for key, part in message.items() if part is not None}
        # Parts of a multimodal message, or a call of a tool in the place of a text.
        has_content = isinstance(renamed.get("content"), (str, list)) or renamed.get("tool_calls")
        if not isinstance(renamed.get("role"), str) or not has_content:
            raise ValueError(f"each of {name!r} must have the texts 'role' and 'content', not be {message!r}")
        messages.append(renamed)
    return messages


def form_of(row: Row) -> Form:
    """Return the format of a row, or raise `ValueError`, which says what is missing."""
    if "messages" in row or "conversations" in row:
        return "messages"
    missing = [name for name in PAIR if name not in row]
    if not missing:
        return "prompt-completion"
    if "text" in row:
        return "text"
    renames = [f"rename {alias!r} to {name!r}" for name in missing for alias in KNOWN_ALIASES[name] if alias in row]
    remedy = " and ".join(renames) if len(renames) == len(missing) else REMEDY
    raise ValueError(f"{' and '.join(map(repr, missing))} missing; {remedy}")


def checked(row: Row, form: Form) -> dict[str, Any]:
    """Return the columns of a format, which the row must have, with what chat templates take beside them."""
    own_form = form_of(row)
    if own_form != form:
        raise ValueError(f"the row is of the format {own_form!r}, but the first one of {form!r}; use one format")
    options = {name: row[name] for name in TEMPLATE_COLUMNS if row.get(name) is not None}
    if form == "messages":
        return {"messages": _check_messages("messages", row.get("messages", row.get("conversations"))), **options}
    if form == "text":
        return {"text": _check_text("text", row["text"])}
    if all(isinstance(row[name], (list, tuple)) for name in PAIR):
        return {**{name: _check_messages(name, row[name]) for name in PAIR}, **options}
    return {name: _check_text(name, row[name]) for name in PAIR}


def is_conversational(row: Row) -> bool:
    """Whether a checked row holds messages, which go through the chat template, and not texts."""
    return not isinstance(row.get("prompt", row.get("text")), str)


def messages_of(row: Row) -> list[dict[str, Any]]:
    """All messages of a checked row, in order; none if it holds texts."""
    if not is_conversational(row):
        return []
    return [*row["messages"]] if "messages" in row else [*row["prompt"], *row["completion"]]


def system_of(row: Row) -> str | None:
    """The system message with which a checked row begins, if it is a text."""
    first = messages_of(row)[:1]
    content = first[0].get("content") if first and first[0]["role"] == "system" else None
    return content if isinstance(content, str) else None


def unusual_rows(rows: Sequence[Row], places: Sequence[str]) -> list[str]:
    """Count what can be trained on but is seldom meant, a line for each kind of row."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for row, place in zip(rows, places, strict=True):
        messages = messages_of(row)
        for role in {message["role"] for message in messages} - ROLES:
            kinds[f"have a message of the role {role!r}"].append(place)
        if messages and messages[-1]["role"] != "assistant":
            kinds["do not end with a message of the assistant"].append(place)
    return [f"{len(own)} of {len(rows)} rows {kind} (the first: {own[0]})" for kind, own in sorted(kinds.items())]
