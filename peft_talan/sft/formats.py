"""The formats of a row of data: those of TRL (https://huggingface.co/docs/trl/dataset_formats), checked row by row.

- `messages`: a conversation, whose tokens are all trained on;
- `prompt` and `completion`: both texts, or both lists of messages; the completion's tokens are trained on;
- `text`: plain text, whose tokens are all trained on.

Messages go through the tokenizer's chat template, texts never do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Form = Literal["messages", "prompt-completion", "text"]

COLUMNS: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
KEPT_COLUMNS = ("tools", "chat_template_kwargs")
"""What chat templates take beside the messages; TRL hands both on."""

SHAREGPT = {"from": "role", "value": "content"}
"""The names in ShareGPT's files, which TRL takes, too."""

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
KNOWN_ALIASES = {
    "prompt": ("instruction", "question", "input", "query"),
    "completion": ("output", "answer", "response", "target"),
}
REMEDY = "give 'messages', 'prompt' and 'completion', or 'text'"


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} must be a text that is not empty, not {value!r}")


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


def form_of(row: Mapping[str, Any]) -> Form:
    """Find out which format a row has.

    Args:
        row: The row.

    Returns:
        The format.

    Raises:
        ValueError: It has none; the message says what is missing.
    """
    if "messages" in row or "conversations" in row:
        return "messages"
    missing = [name for name in COLUMNS["prompt-completion"] if name not in row]
    if not missing:
        return "prompt-completion"
    if "text" in row:
        return "text"
    renames = [f"rename {alias!r} to {name!r}" for name in missing for alias in KNOWN_ALIASES[name] if alias in row]
    remedy = " and ".join(renames) if len(renames) == len(missing) else REMEDY
    raise ValueError(f"{' and '.join(map(repr, missing))} missing; {remedy}")


def checked(row: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """Check a row, and keep the columns of its format.

    Args:
        row: The row.
        form: The format that it must have.

    Returns:
        The row with these columns alone.

    Raises:
        ValueError: It has another format, or a value can't be used.
    """
    found = form_of(row)
    if found != form:
        raise ValueError(f"the row is of the format {found!r}, but the first one of {form!r}; use one format")
    kept = {name: row[name] for name in KEPT_COLUMNS if row.get(name) is not None}
    if form == "messages":
        return {"messages": _check_messages("messages", row.get("messages", row.get("conversations"))), **kept}
    if form == "text":
        _check_text("text", row["text"])
        return {"text": row["text"]}
    if all(isinstance(row[name], (list, tuple)) for name in COLUMNS[form]):
        return {**{name: _check_messages(name, row[name]) for name in COLUMNS[form]}, **kept}
    for name in COLUMNS[form]:
        _check_text(name, row[name])
    return {name: row[name] for name in COLUMNS[form]}


def is_conversational(row: Mapping[str, Any]) -> bool:
    """Whether a checked row holds messages, which go through the chat template, and not texts."""
    return not isinstance(row.get("prompt", row.get("text")), str)


def messages_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All messages of a checked row, in order; none if it holds texts."""
    if not is_conversational(row):
        return []
    return [*row["messages"]] if "messages" in row else [*row["prompt"], *row["completion"]]


class Tally:
    """Counts what can be trained on but is seldom meant."""

    def __init__(self) -> None:
        self.rows = 0
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.system: str | None = None

    def add(self, row: Mapping[str, Any], place: str) -> None:
        """Count one row.

        Args:
            row: The checked row.
            place: Where it stands, such as `data.jsonl:6`.
        """
        messages = messages_of(row)
        kinds = [f"have a message of the role {role!r}" for role in {m["role"] for m in messages} - ROLES]
        if messages and messages[-1]["role"] != "assistant":
            kinds.append("do not end with a message of the assistant")
        for kind in kinds:
            self.counts[kind] += 1
            self.first.setdefault(kind, place)
        system = messages[0].get("content") if messages and messages[0]["role"] == "system" else None
        text = system if isinstance(system, str) else None
        self.system = text if self.rows == 0 or text == self.system else None
        self.rows += 1

    def notes(self) -> tuple[str, ...]:
        """One line for each kind of row that is seldom meant."""
        return tuple(
            f"{count} of {self.rows} rows {kind} (the first: {self.first[kind]})"
            for kind, count in sorted(self.counts.items())
        )
