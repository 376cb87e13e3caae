"""Whose answer is it? Three facts in a text, asked for one by one: which mixer learns to bind an answer to its name.

    python -m benchmarks.memory.binding
    python -m benchmarks.memory.report --page docs/evidence.md

The task is `pairs` of the demo, the base model that of the memory study. Unlike there, a text may end in several
questions, each about another name: the same memory then has to give different answers. Results, with the loss of every
twentieth step, go to `benchmarks/results/memory_binding.jsonl`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.nn import functional as F
from tqdm import tqdm

from peft_talan import TalanConfig, talan_param_groups
from peft_talan.demo.recall import (
    ANSWERS,
    ASK,
    FIRST_ANSWER,
    FIRST_NAME,
    FIRST_PAIR,
    LONG_CONTEXT,
    NAMES,
    SCORED_WINDOWS,
    make_texts,
    recall,
)

from ..measure import code_version, machine
from ..pages import columns_table
from ..runs import Row, RunSettings, append_line, finished
from ..training import adapted, train
from .one_run import base_of

RESULTS = Path(__file__).parents[1] / "results" / "memory_binding.jsonl"
EVERY = 20
"""The curve has the mean loss of so many steps."""
ARMS: dict[str, dict[str, Any] | None] = {
    "LoRA": None,
    "attention": {},
    "linear": {"talan_mixer": "linear"},
    "delta": {"talan_mixer": "delta", "talan_slots": 16},
}
"""By arm: the axes that differ from side paths in all blocks; None: no side path."""


@dataclass(frozen=True)
class Settings(RunSettings):
    """All that a run depends on: texts of `shortest` to `longest` windows, which end in `questions` questions.

    In the first `one_name` and the next `two_names` shares of the steps, texts have one and two facts.
    """

    arm: str
    seed: int = 0
    questions: int = NAMES
    shortest: int = 2
    longest: int = 6
    steps: int = 1_500
    batch_size: int = 16
    learning_rate: float = 3e-3
    side_path_scale: float = 1.0
    one_name: float = 0.0
    two_names: float = 0.0
    rows: int = 128


def make_questions(
    windows: int, rows: int, questions: int, facts: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of `pairs` with several questions at their ends.

    Args:
        windows: Their length.
        rows: Their number.
        questions: How many of the names are asked for, at the last tokens but 0, 2, 4 ...
        facts: How many facts are left in a text; answers to other names are not asked for.
        generator: Draws the texts.

    Returns:
        Token ids, [rows, windows * 16], and the answers' from the last question to the first, [rows, questions].
    """
    tokens, _ = make_texts("pairs", windows, rows, generator)
    places = torch.arange(1, 1 + NAMES)
    pairs = tokens[:, places] - FIRST_PAIR
    order = torch.rand(rows, NAMES, generator=generator).argsort(1)
    # Facts that are left out are repeated by the first one that is not.
    pairs = pairs.gather(1, torch.where(torch.arange(NAMES) < facts, order, order[:, :1]))
    order = torch.rand(rows, NAMES, generator=generator).argsort(1)
    tokens[:, places] = FIRST_PAIR + pairs.gather(1, order)
    asked = pairs[:, torch.arange(questions) % facts]
    last = tokens.shape[1] - 1 - 2 * torch.arange(questions)
    tokens[:, last], tokens[:, last - 1] = asked // ANSWERS + FIRST_NAME, ASK
    return tokens, asked % ANSWERS + FIRST_ANSWER


def run(settings: Settings) -> Row:
    """Train and score once, on one thread."""
    torch.set_num_threads(1)
    base, weights, _ = base_of("pairs", settings.seed, "window")
    axes = ARMS[settings.arm]
    low_rank: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    config = LoraConfig(**low_rank) if axes is None else TalanConfig(**low_rank, **LONG_CONTEXT, **axes)
    generator = torch.Generator().manual_seed(1000 + settings.seed)
    bar = tqdm(total=settings.steps, desc=settings.arm, mininterval=10)
    torch.manual_seed(settings.seed)
    with adapted(base, config) as model:

        def loss_of(step: int) -> torch.Tensor:
            bar.update()
            done = step / settings.steps
            facts = 1 if done < settings.one_name else 2 if done < settings.one_name + settings.two_names else NAMES
            spread = settings.longest - settings.shortest + 1
            windows = settings.shortest + int(torch.randint(spread, (), generator=generator))
            tokens, answers = make_questions(windows, settings.batch_size, settings.questions, facts, generator)
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=2 * settings.questions).logits
            return F.cross_entropy(logits.flip(1)[:, ::2].flatten(0, 1), answers.flatten())

        scale = settings.side_path_scale
        groups = talan_param_groups(model, settings.learning_rate, side_path_lr_scale=scale)
        started = time.process_time()
        losses = train(model, torch.optim.AdamW(groups), settings.steps, loss_of)
        seconds = time.process_time() - started
        parts = [losses[start : start + EVERY] for start in range(0, len(losses), EVERY)]
        return {
            "key": settings.key(),
            "settings": asdict(settings),
            "recall": {windows: recall(model, "pairs", windows, settings.rows) for windows in SCORED_WINDOWS},
            "losses": [round(sum(part) / len(part), 3) for part in parts],
            "trainable": model.get_nb_trainable_parameters()[0],
            "processor_seconds": round(seconds, 1),
            "weights": weights,
            "code": code_version(),
            "machine": machine(),
        }


def table(rows: Sequence[Row]) -> str:
    """All runs, with what differs between them, the loss along the way, and recall by distance."""

    def of_settings(name: str) -> Callable[[Row], Any]:
        return lambda row: row["settings"][name]

    def loss_after(share: float) -> Callable[[Row], str]:
        return lambda row: f"{row['losses'][math.ceil(share * len(row['losses'])) - 1]:.2f}"

    def right_at(windows: int) -> Callable[[Row], str]:
        return lambda row: f"{100 * row['recall'][str(windows)]:.0f}%"

    return columns_table(
        {
            "arm": of_settings("arm"),
            "questions a text": of_settings("questions"),
            "windows in training": lambda row: f"{row['settings']['shortest']} to {row['settings']['longest']}",
            "steps": of_settings("steps"),
            "learning rate": lambda row: f"{row['settings']['learning_rate']:g}",
            "times, side path": lambda row: f"{row['settings']['side_path_scale']:g}",
            "seed": of_settings("seed"),
            **{f"loss after {100 * share:.0f}%": loss_after(share) for share in (0.25, 0.5, 0.75, 1.0)},
            **{f"{windows} windows": right_at(windows) for windows in (2, 10, 32)},
        },
        rows,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["delta"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--questions", type=int, choices=range(1, NAMES + 1), default=NAMES)
    parser.add_argument("--shortest", type=int, default=2, help="windows of the shortest text in training")
    parser.add_argument("--longest", type=int, default=6)
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--side-path-scale", type=float, default=1.0, help="times the learning rate of the LoRA weights"
    )
    parser.add_argument("--one-name", type=float, default=0.0, help="share of the steps whose texts have one fact")
    parser.add_argument("--two-names", type=float, default=0.0, help="share of the next steps, with two facts")
    parser.add_argument("--rows", type=int, default=128, help="texts that are scored at each distance")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--limit-seconds", type=float, default=math.inf, help="start no run after this time")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = vars(make_parser().parse_args(arguments))
    arms, seeds, results = options.pop("arms"), options.pop("seeds"), options.pop("results")
    stop = time.monotonic() + options.pop("limit_seconds")
    for seed in seeds:
        for arm in arms:
            settings = Settings(arm, seed, **options)
            if settings.key() not in finished(results) and time.monotonic() < stop:
                row = run(settings)
                append_line(results, row)
                print(arm, seed, row["losses"][-1], row["recall"], flush=True)


if __name__ == "__main__":
    main()
