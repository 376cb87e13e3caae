"""The examples of the demo: from a JSONL file, or made by a generator whose answers can be checked."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

SMALLEST_FILE = 2
"""One example to train on and one to hold out."""


class DataError(Exception):
    """A data file can't be used; the message names file and line."""


class Example(NamedTuple):
    """One question and the answer to it.

    Args:
        messages: The conversation up to the answer, as (role, content).
        answer: What the model is to say next.
    """

    messages: tuple[tuple[str, str], ...]
    answer: str


def _parse(line: str) -> Example:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError(f"a line must hold a JSON object, not {type(fields).__name__}")
    if "messages" in fields:
        messages = fields["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise ValueError("'messages' must be a list of at least a user's and an assistant's message")
        turns = []
        for message in messages:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise ValueError("each of 'messages' must be an object with the texts 'role' and 'content'")
            turns.append((message["role"], message["content"]))
        if turns[-1][0] != "assistant":
            raise ValueError(f"the last of 'messages' must be the assistant's, not {turns[-1][0]!r}'s")
        return Example(tuple(turns[:-1]), turns[-1][1])
    missing = [key for key in ("prompt", "completion") if key not in fields]
    if missing:
        raise ValueError(f"{' and '.join(map(repr, missing))} missing; give 'prompt' and 'completion', or 'messages'")
    for key in ("prompt", "completion"):
        if not isinstance(fields[key], str) or not fields[key].strip():
            raise ValueError(f"{key!r} must be a text that is not empty, not {fields[key]!r}")
    return Example((("user", fields["prompt"]),), fields["completion"])


def read_examples(path: str) -> list[Example]:
    """Read a JSONL file of `prompt`/`completion` or `messages`.

    Args:
        path: The file.

    Returns:
        The examples in the file's order.

    Raises:
        DataError: The file can't be read, or a line of it can't be used; the message names both.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from None
    examples = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if line:
                examples.append(_parse(line))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8"
            ) from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not JSON ({error.msg}, column {error.colno}); one object a line"
            ) from None
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from None
    if len(examples) < SMALLEST_FILE:
        raise DataError(f"{path}:1: {len(examples)} examples; at least {SMALLEST_FILE} are needed, one to hold out")
    return examples


def make_examples(task: str, count: int, seed: int) -> list[Example]:
    """Generate examples of a reasoning-gym task, each question once.

    Args:
        task: The task's name.
        count: How many.
        seed: The generator's seed.

    Returns:
        The examples.
    """
    import reasoning_gym

    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2} if task == "chain_sum" else {}
    found: dict[str, Example] = {}
    # Questions repeat, so more are drawn than are wanted.
    for item in reasoning_gym.create_dataset(task, size=3 * count, seed=seed, **settings):
        found.setdefault(item["question"], Example((("user", item["question"]),), item["answer"]))
    return list(found.values())[:count]


def split_examples(examples: list[Example], held_out: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Shuffle, and keep some examples from training: at most a fifth of them.

    Args:
        examples: All examples.
        held_out: How many to hold out at most.
        seed: Of the shuffle.

    Returns:
        The examples to train on, and those held out.
    """
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    kept = max(1, min(held_out, len(shuffled) // 5))
    return shuffled[kept:], shuffled[:kept]


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    """Turn an example into the tokens of its prompt and of its answer, by the tokenizer's chat template if it has one.

    Args:
        tokenizer: The model's tokenizer.
        example: The example.

    Returns:
        The prompt's tokens and the answer's, ending as the template or the end-of-sequence token says.
    """
    if tokenizer.chat_template is None:
        prompt = "".join(f"{content}\n" for _, content in example.messages)
        answer = example.answer + (tokenizer.eos_token or "")
    else:
        messages = [{"role": role, "content": content} for role, content in example.messages]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        messages.append({"role": "assistant", "content": example.answer})
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        answer = whole.removeprefix(prompt).rstrip("\n")
    return (
        tokenizer(prompt, add_special_tokens=False)["input_ids"],
        tokenizer(answer, add_special_tokens=False)["input_ids"],
    )
