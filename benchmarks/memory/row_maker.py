"""Rows that ask for a fact after a piece of a text: a name, a place, a number or a colour before real text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from transformers import PreTrainedTokenizerBase

from peft_talan.sft.prompts import encode

LICENCE = Path(__file__).parents[2] / "LICENSE"
TRAINED_SHARE = 0.8
"""How much of each text is trained on, from its start."""
NAMES = (
    "James Mary Robert Patricia John Jennifer Michael Linda David Elizabeth William Barbara Richard Susan Joseph "
    "Jessica Thomas Karen Charles Sarah Daniel Lisa Matthew Nancy Anthony Sandra Mark Betty Donald Ashley Steven "
    "Emily Paul Donna Andrew Michelle Joshua Carol Kenneth Amanda Kevin Olga Ingrid Pedro Hassan Fatima Yuki Igor"
)
PLACES = (
    "London Paris Berlin Madrid Rome Vienna Lisbon Dublin Oslo Stockholm Helsinki Warsaw Prague Athens Cairo "
    "Nairobi Lagos Tokyo Seoul Beijing Delhi Mumbai Sydney Melbourne Toronto Montreal Chicago Boston Denver "
    "Seattle Houston Miami Lima Bogota Santiago Havana Geneva Munich Hamburg Venice Naples Milan Lyon Marseille "
    "Porto Seville Valencia Krakow"
)
NUMBERS = " ".join(map(str, range(100, 1000)))
COLOURS = "red blue green yellow black white orange purple pink brown grey gold silver violet scarlet olive"
KINDS = (
    ("The name of the witness is {}.\n", "\nThe name of the witness is", "\nWhat is the name of the witness?", NAMES),
    ("The train goes to {}.\n", "\nThe train goes to", "\nWhere does the train go?", PLACES),
    ("The code of the locker is #{}.\n", "\nThe code of the locker is #", "\nWhat is the code?", NUMBERS),
)
"""The fact, its question where a completion answers, its question where a message answers, and the answers."""
FACTS = {
    "mixed": KINDS,
    "names": KINDS[:1],
    "colours": (
        (
            "The colour of the door is {}.\n",
            "\nThe colour of the door is",
            "\nWhat is the colour of the door?",
            COLOURS,
        ),
    ),
}
"""The kinds that a run's rows are of, in turn."""


def fitting(
    row_of: Callable[[int], dict[str, Any]], tokenizer: PreTrainedTokenizerBase, length: int, tokens: int, what: str
) -> dict[str, Any]:
    """The row with as much text around what is asked for, of `length` tokens at most, as `tokens` have room for."""
    while length >= 0:
        row = row_of(length)
        excess = encode(tokenizer, row).length - tokens
        if excess <= 0:
            return row
        length -= excess
    raise ValueError(f"tokens={tokens}: too few for {what}")


class RowMaker:
    """Makes rows of a wanted length.

    Args:
        tokenizer: The model's.
        form: `prompt-completion` or `messages`.
        held_out: Whether to use the parts of the texts that aren't trained on.
        facts: A name of `FACTS`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, form: str, held_out: bool, facts: str = "mixed") -> None:
        self.tokenizer, self.form, self.kinds = tokenizer, form, FACTS[facts]
        self.texts = []
        for text in ("\n\n".join(topics[name] for name in sorted(topics)), LICENCE.read_text(encoding="utf-8")):
            words = text.split()
            end = int(TRAINED_SHARE * len(words))
            part = " ".join(words[end:] if held_out else words[:end])
            self.texts.append(list(tokenizer(part, add_special_tokens=False)["input_ids"]))

    def make(self, kind: int, tokens: int, draw: random.Random) -> dict[str, Any]:
        """One row of that many tokens or, as pieces of text can become other tokens, some fewer."""
        fact, question, asked, answers = self.kinds[kind]
        answer, text = draw.choice(answers.split()), draw.choice(self.texts)
        start = draw.randrange(len(text) - tokens)

        def row_of(length: int) -> dict[str, Any]:
            story = fact.format(answer) + self.tokenizer.decode(text[start : start + length])
            if self.form == "messages":
                said = {"role": "assistant", "content": answer}
                return {"prompt": [{"role": "user", "content": story + asked}], "completion": [said]}
            completion = answer if question.endswith("#") else f" {answer}"
            return {"prompt": story + question, "completion": completion}

        return fitting(row_of, self.tokenizer, tokens, tokens, "the fact and its question")

    def rows(self, count: int, shortest: int, longest: int, seed: int) -> list[dict[str, Any]]:
        """Rows whose lengths are drawn, of all kinds in turn."""
        draw = random.Random(seed)
        return [self.make(i % len(self.kinds), draw.randint(shortest, longest), draw) for i in range(count)]
