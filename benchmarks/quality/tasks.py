"""The study's questions: four tasks to fine-tune on, easier ones that a backbone knows before, and plain text.

Every answer can be checked: reasoning-gym computes them, or Python does (`code`). Held-out items are the same for
every seed and are never trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import reasoning_gym
from transformers import PreTrainedTokenizerBase

from ..runs import DEVELOPMENT_SEED

HELD_OUT_SEED = 1_000_000
TEXT_HELD_OUT = 4_000
"""Characters at the end of the plain text that no backbone is pretrained on."""

Make = Callable[[int, int], list[tuple[str, str]]]
"""From a number and a seed to so many questions with their answers."""


class Example(NamedTuple):
    """A conversation up to the answer, as (role, content), and the answer."""

    messages: tuple[tuple[str, str], ...]
    answer: str

    def row(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The example as `peft_talan.sft` takes it: messages, or texts where the tokenizer has no chat template."""
        if tokenizer.chat_template is None:
            return {"prompt": "".join(f"{content}\n" for _, content in self.messages), "completion": self.answer}
        messages = [{"role": role, "content": content} for role, content in self.messages]
        return {"prompt": messages, "completion": [{"role": "assistant", "content": self.answer}]}


def example_of(question: str, answer: str) -> Example:
    return Example((("user", question),), answer)


def _gym(name: str, **settings: Any) -> Make:
    def make(count: int, seed: int) -> list[tuple[str, str]]:
        items = reasoning_gym.create_dataset(name, size=count, seed=seed, **settings)
        return [(item["question"], item["answer"]) for item in items]

    return make


def _list_programs(count: int, seed: int) -> list[tuple[str, str]]:
    """Short programs about a list of digits, and what they print."""
    draw = random.Random(seed)
    uses: list[tuple[str, Callable[[list[int]], object]]] = [
        ("max(x)", max),
        ("min(x)", min),
        ("sum(x)", sum),
        ("len(x)", len),
        ("x[0]", lambda x: x[0]),
        ("x[-1]", lambda x: x[-1]),
        ("x[1:]", lambda x: x[1:]),
        ("sorted(x)", sorted),
        ("x[::-1]", lambda x: x[::-1]),
        ("x[0] + x[-1]", lambda x: x[0] + x[-1]),
    ]
    items = []
    for _ in range(count):
        numbers = [draw.randint(0, 9) for _ in range(draw.randint(2, 5))]
        expression, compute = draw.choice(uses)
        items.append((f"What does this program print?\nx = {numbers}\nprint({expression})", str(compute(numbers))))
    return items


def _number_programs(count: int, seed: int) -> list[tuple[str, str]]:
    """Short programs about two numbers, and what they print."""
    draw = random.Random(seed)
    items = []
    for _ in range(count):
        a, b = draw.randint(0, 20), draw.randint(0, 20)
        sign, result = draw.choice([("+", a + b), ("-", a - b)])
        items.append((f"What does this program print?\na = {a}\nb = {b}\nprint(a {sign} b)", str(result)))
    return items


TASKS: dict[str, Make] = {
    "arithmetic": _gym("chain_sum", min_terms=3, max_terms=3, min_digits=1, max_digits=1),
    "algebra": _gym("simple_equations", min_terms=2, max_terms=2, min_value=1, max_value=9),
    "logic": _gym("family_relationships"),
    "code": _list_programs,
}
"""What the adapters are trained on."""

KNOWN_TASKS: dict[str, Make] = {
    "sums": _gym("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=2),
    "divisors": _gym("gcd", min_numbers=2, max_numbers=2, min_value=2, max_value=40),
    "letters": _gym("letter_counting", min_words=2, max_words=4),
    "syllogisms": _gym("syllogism"),
    "programs": _number_programs,
}
"""What the small backbones are pretrained on, and what every run measures retention with."""

_RELATION = re.compile(r"(\w+)(?: related)? to (\w+)\?")

SHORTENED: dict[str, Callable[[str], str]] = {
    "arithmetic": lambda question: question.rsplit(": ", 1)[1],
    "algebra": lambda question: question.rsplit(": ", 1)[1] + " by",
    "logic": lambda question: " : ".join([question.split("\n")[0], *_RELATION.findall(question)[-1]]),
    "code": lambda question: question.split("x = ")[1].replace("\nprint(", " give ")[:-1],
}
"""The same questions in other words, so that a backbone can know a task's matter and not its wording."""

PROMPTS = ("{}", "{} ?", "Answer this: {}", "{}\nAnswer:")
"""What a short form may stand in where a backbone is pretrained on it."""
ASKED = "Question: {}"
"""The prompt of a short form that no backbone was pretrained with."""


def _short(task: str, prompt: str = "{}") -> Make:
    def make(count: int, seed: int) -> list[tuple[str, str]]:
        return [(prompt.format(SHORTENED[task](question)), answer) for question, answer in TASKS[task](count, seed)]

    return make


SHORT_TASKS = {f"short {task}": _short(task) for task in TASKS}
ASKED_TASKS = {f"asked {task}": _short(task, ASKED) for task in TASKS}
ALL_TASKS = {**TASKS, **KNOWN_TASKS, **SHORT_TASKS, **ASKED_TASKS}
MIXTURES = {"mixture": tuple(TASKS), "asked mixture": tuple(ASKED_TASKS)}
"""The tasks that are trained together, by the name of the mixture."""


@cache
def held_out(task: str, count: int) -> tuple[Example, ...]:
    """Held-out items of a task of either kind, each question once, the same for every seed."""
    found: dict[str, str] = {}
    for question, answer in ALL_TASKS[task](2 * count, HELD_OUT_SEED):
        found.setdefault(question, answer)
    return tuple(example_of(*item) for item in list(found.items())[:count])


def scored_items(task: str, count: int, seed: int) -> dict[str, tuple[Example, ...]]:
    """The held-out items that a run is scored on, by task."""
    if task not in MIXTURES:
        return {task: held_out(task, count)}
    first = count if seed == DEVELOPMENT_SEED else 0
    return {name: held_out(name, 2 * count)[first : first + count] for name in MIXTURES[task]}


def items_to_train_on(task: str, count: int, seed: int, held_out_items: int) -> list[Example]:
    """A run's items; of a mixture equally many of each task. No seed trains on what any seed is scored on."""
    if task not in MIXTURES:
        return to_train_on(task, count, seed, held_out(task, held_out_items))
    names = MIXTURES[task]
    each = -(-count // len(names))
    return [example for name in names for example in to_train_on(name, each, seed, held_out(name, 2 * held_out_items))]


def to_train_on(task: str, count: int, seed: int, without: tuple[Example, ...]) -> list[Example]:
    """Items to train on in a seed's order; questions that are held out are left out."""
    kept_out = {example.messages[0][1] for example in without}
    make = ALL_TASKS[task]
    items = [item for item in make(count + count // 4 + len(without), seed) if item[0] not in kept_out]
    return [example_of(*item) for item in items[:count]]


@cache
def plain_text() -> tuple[str, str]:
    """English prose (a story of 1889 in the public domain that reasoning-gym carries): to train on, and held out."""
    book = files("reasoning_gym").joinpath("data/in_the_year_2889.txt").read_text(encoding="utf-8")
    story = book[book.index("Little though they seem") : book.index("*** END OF")]
    text = " ".join(story.split())
    return text[:-TEXT_HELD_OUT], text[-TEXT_HELD_OUT:]
