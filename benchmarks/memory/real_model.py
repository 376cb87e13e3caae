"""A fact at the start of a real text, asked for beyond the window, with the weights of a real model.

    python -m benchmarks.memory.real_model
    python -m benchmarks.memory.report --page docs/evidence.md

SmolLM2-135M-Instruct is a Llama, which becomes a Mistral with a sliding window. The text is a story of 1889, the fact
one of 16 colours. A training text asks for it several times, without the answer, and the pieces of the story between
the questions grow in the first part of the training; the loss is that of the answers and of some tokens of the story.
Scored are texts of held-out story with one question at the end. Every arm is first trained with equally many learning
rates on a development seed; the one with the lowest loss of the answers is taken for the fresh seeds. A step takes
about six seconds on one core. Runs that are in the results are not repeated.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from peft_talan import talan_param_groups
from peft_talan.sft.window import with_sliding_window

from ..measure import code_version, machine
from ..quality.backbones import REAL, backbone_folder
from ..quality.one_run import text_loss
from ..quality.tasks import plain_text
from ..runs import DEVELOPMENT_SEED, Row, RunSettings, finished, run_missing, tuned
from ..training import adapted
from ..training import train as train_on
from .one_run import ARMS, config_of, mean_of_last
from .study import describe

RESULTS = Path(__file__).parents[1] / "results" / "memory_real_model.jsonl"
BASE, FULL = "base model", "base model, full attention"
COLOURS = (
    "red", "blue", "green", "yellow", "black", "white", "orange", "purple",
    "pink", "brown", "grey", "gold", "silver", "violet", "scarlet", "olive",
)  # fmt: skip
FACT, QUESTION = "The colour of the door is {}.\n", "\nThe colour of the door is"
RATES = ((1e-3, 5.0), (3e-4, 10.0))
"""What every arm tries: a learning rate, and by how much the side path's is higher."""
SMALLEST_PIECE, FIRST_SHARE = 4, 0.4
"""The shortest piece of the story in tokens, and how much of its length a piece has at the first step."""


@dataclass(frozen=True)
class Settings(RunSettings):
    """All that a run depends on; `arm` is one of `ARMS` or of the base models.

    `window`, `pieces` and `story_tokens` are in tokens: the keys that a token sees, the longest pieces of the story
    before each question, and how much of the story is in the loss. `scored` are lengths in windows, `rows` the
    held-out texts of each.
    """

    model: str
    arm: str
    seed: int
    window: int
    pieces: tuple[int, ...]
    steps: int
    batch_size: int
    story_tokens: int
    scored: tuple[int, ...]
    rows: int
    learning_rate: float = 0.0
    side_path_lr_scale: float = 0.0


def load_with_window(folder: str, window: int | None) -> PreTrainedModel:
    """Load a Llama with a sliding window, or with none."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model if window is None else with_sliding_window(model, window)


class Texts:
    """Texts with a fact at the start and questions in a story."""

    def __init__(self, tokenizer: Any, story: str) -> None:
        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids

        self.story, self.question = encode(story), encode(QUESTION)
        self.facts = {colour: encode(FACT.format(colour)) for colour in COLOURS}
        self.answers = {colour: encode(f" {colour}")[0] for colour in COLOURS}

    def draw(
        self, rows: int, pieces: Sequence[int], draw: random.Random
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The texts, the first tokens of their answers, and the places after which those are asked for."""
        longest = max(map(len, self.facts.values()))
        texts, answers = [], []
        for _ in range(rows):
            colour, places = draw.choice(COLOURS), []
            text = [*self.facts[colour]]
            # Colours may differ in length: the first piece is cut, so that all texts have one length.
            lengths = [pieces[0] + longest - len(text), *pieces[1:]]
            for length in lengths:
                start = draw.randrange(len(self.story) - length)
                text += self.story[start : start + length] + self.question
                places.append(len(text) - 1)
            texts.append(text)
            answers.append(self.answers[colour])
        return torch.tensor(texts), torch.tensor(answers), torch.tensor(places)

    def of_length(self, rows: int, tokens: int, draw: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts of that many tokens with one question, at the end, and the first tokens of the answers."""
        piece = tokens - max(map(len, self.facts.values())) - len(self.question)
        texts, answers, _ = self.draw(rows, [piece], draw)
        return texts, answers


def train(model: Any, texts: Texts, settings: Settings) -> list[float]:
    """Train the adapter; the losses of the answers."""
    groups = talan_param_groups(model, settings.learning_rate, side_path_lr_scale=settings.side_path_lr_scale)
    draw, losses = random.Random(settings.seed), []

    def loss_of(step: int) -> torch.Tensor:
        share = min(1.0, FIRST_SHARE + 2 * step / settings.steps)
        pieces = [max(SMALLEST_PIECE, int(piece * share * draw.uniform(0.5, 1.0))) for piece in settings.pieces]
        tokens, answers, asked = texts.draw(settings.batch_size, pieces, draw)
        others = sorted(set(range(tokens.shape[1] - 1)) - set(asked.tolist()))
        story = torch.tensor(draw.sample(others, settings.story_tokens))
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=torch.cat([asked, story])).logits
        answered, continued = logits.transpose(1, 2).split([len(asked), len(story)], dim=2)
        loss = F.cross_entropy(answered, answers[:, None].expand(-1, len(asked)))
        losses.append(float(loss.detach()))
        return loss + F.cross_entropy(continued, tokens[:, story + 1])

    train_on(model, torch.optim.AdamW(groups), settings.steps, loss_of, f"{settings.arm}, seed {settings.seed}")
    return losses


@torch.no_grad()
def recall(model: Any, texts: Texts, tokens: int, rows: int) -> float:
    """The share of held-out texts of that length whose answer is the likeliest token."""
    inputs, answers = texts.of_length(rows, tokens, random.Random(1))
    parts = [model(input_ids=part, use_cache=False, logits_to_keep=1).logits[:, -1] for part in inputs.split(4)]
    return float((torch.cat(parts).argmax(-1) == answers).float().mean())


def run(settings: Settings) -> Row:
    """Train and score once, on one thread."""
    torch.set_num_threads(1)
    folder = backbone_folder(settings.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = load_with_window(folder, None if settings.arm == FULL else settings.window)
    train_texts, held_out = (Texts(tokenizer, part) for part in plain_text())
    torch.manual_seed(settings.seed)
    config = config_of(settings.arm, base) if settings.arm in ARMS else None
    with adapted(base, config) as model:
        started = time.process_time()
        losses = [] if config is None else train(model, train_texts, settings)
        seconds = time.process_time() - started
        lengths = {windows: windows * settings.window for windows in settings.scored}
        return {
            "key": settings.key(),
            "settings": asdict(settings),
            "recall": {windows: recall(model, held_out, tokens, settings.rows) for windows, tokens in lengths.items()},
            "text_loss": text_loss(model, tokenizer),
            "last_loss": mean_of_last(losses),
            "losses": [round(loss, 3) for loss in losses],
            "trainable": 0 if config is None else model.get_nb_trainable_parameters()[0],
            "processor_seconds": round(seconds, 1),
            "code": code_version(),
            "machine": machine(),
        }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=REAL, help="SmolLM2-135M-Instruct, a folder or a hub id")
    arms = [BASE, FULL, *ARMS]
    default = [BASE, FULL, "LoRA", "LoRA, as many parameters", "TALAN, all blocks"]
    parser.add_argument("--arms", nargs="+", choices=arms, default=default)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--window", type=int, default=32, help="keys that a token sees in each block")
    parser.add_argument(
        "--pieces", nargs="+", type=int, default=[8, 24, 40, 60], help="tokens of the story before each question"
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--story-tokens", type=int, default=16, help="of each text, in the loss")
    parser.add_argument("--scored", nargs="+", type=int, default=[1, 2, 4, 10], help="lengths in windows")
    parser.add_argument("--rows", type=int, default=32, help="held-out texts of each length")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = vars(make_parser().parse_args(arguments))
    arms, seeds, results = options.pop("arms"), options.pop("seeds"), options.pop("results")
    options.update(pieces=tuple(options["pieces"]), scored=tuple(options["scored"]))
    common = Settings(arm=BASE, seed=0, **options)
    first = replace(common, seed=DEVELOPMENT_SEED)
    tries = [
        [replace(first, arm=arm, learning_rate=rate, side_path_lr_scale=scale) for rate, scale in RATES]
        for arm in arms
        if arm in ARMS
    ]
    done = finished(results)

    def missing() -> Iterator[Settings]:
        bases = [replace(common, arm=arm) for arm in arms if arm not in ARMS]
        yield from (settings for settings in bases if settings.key() not in done)
        yield from tuned(tries, done, seeds)

    run_missing(missing, run, results, done, describe)


if __name__ == "__main__":
    main()
