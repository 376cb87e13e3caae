"""Tasks that ask for what a text says: facts in words, needles, variables, the most frequent word, who is where.

The facts stand at the start of a text, so that the question is as far from them as the text is long. The needles are
after RULER (arXiv 2404.06654) and the supporting facts after BABILong (arXiv 2406.10149), the first two tasks of bAbI
inside a text: their recipes with other sentences, at places that are drawn all over the text.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from .row_maker import KINDS, NAMES, NUMBERS, PLACES, RowMaker, fitting

FILLER = "The river runs to the sea. A cloud hangs over the hill. Nobody is on the road. The night is long and quiet. "
CODE = "The code of the {} is #{}."
THINGS = "cellar ladder barn bridge tower garden kitchen harbour"
LETTERS = "A B C D E F G H J K L M"
WORDS = "apple stone river candle horse window garden bottle paper cloud hammer island"
ROOMS = "kitchen garden office hall cellar attic"
OBJECTS = "lamp book apple key"
WENT, TOOK, LEFT = "{} went to the {}.", "{} took the {}.", "{} left the {} there."


@dataclass(frozen=True)
class Asked:
    """What a text is made of.

    Args:
        sentences: What has to be remembered, and what is like it.
        places: Where each sentence stands, as shares of the text around them in ascending order.
        question: The last words of the prompt.
        answer: The completion.
        words: The text around the sentences; None: a piece of real text.
    """

    sentences: list[str]
    places: list[float]
    question: str
    answer: str
    words: str | None = None


def spread(count: int, draw: random.Random) -> list[float]:
    """Places all over a text."""
    return sorted(draw.random() for _ in range(count))


def facts(count: int, draw: random.Random, tokens: int) -> Asked:
    """The homes of so many people; which is that of one of them?"""
    people, places = draw.sample(NAMES.split(), count), draw.sample(PLACES.split(), count)
    asked = draw.randrange(count)
    sentences = [f"The home of {person} is {place}." for person, place in zip(people, places, strict=True)]
    return Asked(sentences, [0.0] * count, f"\nThe home of {people[asked]} is", f" {places[asked]}")


def ordinary(latest: float, draw: random.Random, tokens: int) -> Asked:
    """A row as `ordinary_rows` trains on, a fact of one of three kinds; at the start, or up to a share of the text."""
    fact, question, _, answers = draw.choice(KINDS)
    answer = draw.choice(answers.split())
    # Nothing is drawn where the fact stands at the start: its rows stay those that were scored.
    place = latest * draw.random() if latest else 0.0
    return Asked([fact.format(answer).strip()], [place], question, answer if question.endswith("#") else f" {answer}")


def needles(count: int, draw: random.Random, tokens: int) -> Asked:
    """So many codes in a text that repeats itself; which is the code of one thing?"""
    things, numbers = draw.sample(THINGS.split(), count), draw.sample(NUMBERS.split(), count)
    asked, sentences = draw.randrange(count), list(map(CODE.format, things, numbers))
    question = "\n" + CODE.format(things[asked], "").removesuffix(".")
    return Asked(sentences, spread(count, draw), question, numbers[asked], FILLER * (tokens // 20 + 1))


def variables(draw: random.Random, tokens: int) -> Asked:
    """Two numbers, each of which two more variables get one from another; which number has the last of one chain?"""
    names, numbers = draw.sample(LETTERS.split(), 6), draw.sample(NUMBERS.split(), 2)
    chains = []
    for chain, number in zip((names[:3], names[3:]), numbers, strict=True):
        values = [f"#{number}", *chain]
        chains.append([f"Let {name} be {value}." for name, value in zip(chain, values, strict=False)])
    # Both chains keep their order.
    order = [0, 0, 0, 1, 1, 1]
    draw.shuffle(order)
    left = [iter(chain) for chain in chains]
    asked = draw.randrange(2)
    question = f"\nSo the value of {names[3 * asked + 2]} is #"
    return Asked(
        [next(left[chain]) for chain in order], spread(6, draw), question, numbers[asked], FILLER * (tokens // 20 + 1)
    )


def frequent_word(draw: random.Random, tokens: int) -> Asked:
    """Words of which three in eight are the same one; which?"""
    first, *others = draw.sample(WORDS.split(), len(WORDS.split()))
    words: list[str] = []
    while len(words) < tokens:
        eight = [first] * 3 + draw.sample(others, 5)
        draw.shuffle(eight)
        words += eight
    return Asked([], [], "\nThe word that occurs most often above is", f" {first}", " ".join(words))


def one_supporting_fact(draw: random.Random, tokens: int) -> Asked:
    """People go from room to room; where is one of them?"""
    people, where, sentences = draw.sample(NAMES.split(), 3), {}, []
    for _ in range(6):
        person = draw.choice(people)
        where[person] = draw.choice([room for room in ROOMS.split() if room != where.get(person)])
        sentences.append(WENT.format(person, where[person]))
    asked = draw.choice(list(where))
    return Asked(sentences, spread(6, draw), f"\nNow {asked} is in the", f" {where[asked]}")


def two_supporting_facts(draw: random.Random, tokens: int) -> Asked:
    """People go from room to room with things that they take and leave; where is one of the things?"""
    people, things = draw.sample(NAMES.split(), 2), draw.sample(OBJECTS.split(), 2)
    where: dict[str, str] = {}
    carried: dict[str, str] = {}
    sentences: list[str] = []

    def go(person: str) -> None:
        where[person] = draw.choice([room for room in ROOMS.split() if room != where.get(person)])
        sentences.append(WENT.format(person, where[person]))

    for person, thing in zip(people, things, strict=True):
        go(person)
        carried[thing] = person
        sentences.append(TOOK.format(person, thing))
        go(person)
    lies = {}
    for thing in draw.sample(things, draw.randrange(3)):
        person = carried.pop(thing)
        lies[thing] = where[person]
        sentences.append(LEFT.format(person, thing))
        go(person)
    asked = draw.choice(things)
    room = lies[asked] if asked in lies else where[carried[asked]]
    return Asked(sentences, spread(len(sentences), draw), f"\nNow the {asked} is in the", f" {room}")


WINDOWS, FROM_128 = (32, 128, 320, 1024), (128, 256, 512, 1024)
ORDINARY, ORDINARY_LATER = "ordinary row", "ordinary row, later"
RULER = ("needle", "4 keys", "variables", "frequent word")
BABI = ("one supporting fact", "two supporting facts")
MAKERS: dict[str, Callable[[random.Random, int], Asked]] = {
    ORDINARY: partial(ordinary, 0.0),
    ORDINARY_LATER: partial(ordinary, 0.5),
    "1 fact": partial(facts, 1),
    **{f"{count} facts": partial(facts, count) for count in (2, 4, 8, 16)},
    "needle": partial(needles, 1),
    "4 keys": partial(needles, 4),
    "variables": variables,
    "frequent word": frequent_word,
    "one supporting fact": one_supporting_fact,
    "two supporting facts": two_supporting_facts,
}
LENGTHS: dict[str, tuple[int, ...]] = {
    ORDINARY: WINDOWS,
    ORDINARY_LATER: WINDOWS[1:],
    "1 fact": WINDOWS,
    "2 facts": WINDOWS,
    # In shorter texts there is no room for so many.
    "4 facts": WINDOWS[1:],
    "8 facts": WINDOWS[1:],
    "16 facts": WINDOWS[2:],
    **dict.fromkeys((*RULER, *BABI), FROM_128),
}
"""Of each task, the lengths that are scored, tokens."""
FACTS = tuple(name for name in LENGTHS if "fact" in name and "supporting" not in name)


class TaskRows:
    """Makes the rows of all tasks.

    Args:
        tokenizer: The model's.
        held_out: Whether real text is of the parts that aren't trained on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, held_out: bool) -> None:
        self.tokenizer = tokenizer
        self.texts = RowMaker(tokenizer, "prompt-completion", held_out).texts

    def make(self, task: str, tokens: int, draw: random.Random) -> dict[str, Any]:
        """One row of that many tokens or, as pieces of text can become other tokens, some fewer."""
        asked = MAKERS[task](draw, tokens)
        if asked.words is None:
            text = draw.choice([text for text in self.texts if len(text) > tokens])
            start = draw.randrange(len(text) - tokens)
            around = text[start : start + tokens]
        else:
            around = list(self.tokenizer(asked.words, add_special_tokens=False)["input_ids"])

        def row_of(length: int) -> dict[str, Any]:
            pieces, last = [], 0
            for sentence, place in zip(asked.sentences, asked.places, strict=True):
                end = round(place * length)
                pieces += [self.tokenizer.decode(around[last:end]), sentence]
                last = end
            pieces.append(self.tokenizer.decode(around[last:length]))
            story = "\n".join(piece for piece in pieces if piece)
            return {"prompt": story + asked.question, "completion": asked.answer}

        what = f"the sentences of {task!r} and the question"
        return fitting(row_of, self.tokenizer, min(tokens, len(around)), tokens, what)

    def rows(self, task: str, count: int, shortest: int, longest: int, seed: int) -> list[dict[str, Any]]:
        """Rows whose lengths are drawn."""
        draw = random.Random(f"{task} {seed}")
        return [self.make(task, draw.randint(shortest, longest), draw) for _ in range(count)]
