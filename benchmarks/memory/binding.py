"""Whose answer is it, and how many? Several facts in a text, asked for one by one, and marks that are counted.

    python -m benchmarks.memory.binding
    python -m benchmarks.memory.binding --names 8
    python -m benchmarks.memory.binding --task count --questions 6 --shortest 1
    python -m benchmarks.memory.report --page docs/evidence.md

The tasks are `pairs` and `count` of the demo, the base models those of the memory study. Unlike there, a text of the
training has several questions: the same memory then has to give different answers. Results, with the loss of every
twentieth step, go to `benchmarks/results/memory_binding.jsonl`.
"""

from __future__ import annotations

import argparse
import json
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

from peft_talan import TalanConfig, initialize_talan_keys, talan_param_groups
from peft_talan.demo.recall import (
    ANSWERS,
    ASK,
    FIRST_ANSWER,
    FIRST_NAME,
    FIRST_PAIR,
    LONG_CONTEXT,
    MARK,
    MOST_NAMES,
    NAMES,
    SCORED_WINDOWS,
    Task,
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
ONE_BLOCK: dict[str, Any] = {"talan_layers": [0], "talan_position": "input"}
DELTA: dict[str, Any] = {"talan_mixer": "delta", "talan_slots": 16}
ARMS: dict[str, dict[str, Any] | None] = {
    "LoRA": None,
    "attention": LONG_CONTEXT,
    "linear": {**LONG_CONTEXT, "talan_mixer": "linear"},
    "delta": {**LONG_CONTEXT, **DELTA},
    "attention, first block": ONE_BLOCK,
    "delta, first block": {**DELTA, **ONE_BLOCK},
    "delta, first block, keys of its attention": {**DELTA, **ONE_BLOCK},
    "delta, all blocks, keys of their attention": {**DELTA, **LONG_CONTEXT, "talan_position": "input"},
}
"""By arm: the axes of its side paths, at the blocks' outputs unless it says `input`; None: no side path."""
OF_ATTENTION = ("delta, first block, keys of its attention", "delta, all blocks, keys of their attention")
"""The arms whose keys and queries start from the attention; those of the others are drawn."""
MOST_NAMES_STEPS = 800
"""Steps after which the base model knows the answers of 8 names inside its window; for others see `one_run`."""


@dataclass(frozen=True)
class Settings(RunSettings):
    """All that a run depends on: texts of `shortest` to `longest` windows with `questions` questions.

    With `spread` these stand at drawn places, one of them at the end; else all at the end. In the first `one_name` and
    the next `two_names` shares of the steps, texts have one and two facts. For `count` they are always spread.
    """

    arm: str
    seed: int = 0
    task: Task = "pairs"
    names: int = NAMES
    questions: int = 10
    spread: bool = True
    shortest: int = 2
    longest: int = 6
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 3e-4
    side_path_scale: float = 30.0
    one_name: float = 0.0
    two_names: float = 0.0
    rows: int = 128


def make_questions(
    windows: int,
    rows: int,
    questions: int,
    facts: int,
    generator: torch.Generator,
    *,
    names: int = NAMES,
    spread: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Texts of `pairs` with several questions.

    Args:
        windows: Their length.
        rows: Their number.
        questions: How many questions a text has; each takes two tokens.
        facts: How many facts are left in a text; answers to other names are not asked for.
        generator: Draws the texts.
        names: How many names there are.
        spread: Whether the questions stand at drawn places after the facts, one at the end, each about a name that is
            drawn. Else they end at the last tokens but 0, 2, 4 ..., each about another name as far as there are facts.

    Returns:
        Token ids, [rows, windows * 16]; where the questions end and their answers, [rows, questions], from the last
        question to the first.
    """
    tokens, _ = make_texts("pairs", windows, rows, generator, names)
    places = torch.arange(1, 1 + names)
    pairs = tokens[:, places] - FIRST_PAIR
    order = torch.rand(rows, names, generator=generator).argsort(1)
    # Facts that are left out are repeated by the first one that is not.
    pairs = pairs.gather(1, torch.where(torch.arange(names) < facts, order, order[:, :1]))
    order = torch.rand(rows, names, generator=generator).argsort(1)
    tokens[:, places] = FIRST_PAIR + pairs.gather(1, order)
    ends = torch.arange(questions).expand(rows, -1)
    which = ends % facts
    if spread:
        drawn = torch.rand(rows, (tokens.shape[1] - 1 - names) // 2 - 1, generator=generator)
        ends = F.pad(1 + drawn.argsort(1)[:, : questions - 1].sort(1).values, (1, 0))
        which = torch.randint(facts, (rows, questions), generator=generator)
    ends, asked = tokens.shape[1] - 1 - 2 * ends, pairs.gather(1, which)
    tokens.scatter_(1, ends, asked // ANSWERS + FIRST_NAME).scatter_(1, ends - 1, ASK)
    return tokens, ends, asked % ANSWERS + FIRST_ANSWER


def make_counts(
    windows: int, rows: int, questions: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Texts of `count` that ask for the number of marks so far, at drawn places and at the end; see above."""
    tokens, _ = make_texts("count", windows, rows, generator)
    last = tokens.shape[1] - 1
    drawn = 2 + torch.rand(rows, last - 2, generator=generator).argsort(1)[:, : questions - 1]
    ends = F.pad(drawn.sort(1, descending=True).values, (1, 0), value=last)
    tokens.scatter_(1, ends, ASK)
    return tokens, ends, (tokens == MARK).cumsum(1).gather(1, ends) + FIRST_ANSWER


def run(settings: Settings) -> Row:
    """Train and score once, on one thread."""
    torch.set_num_threads(1)
    steps = MOST_NAMES_STEPS if settings.names == MOST_NAMES else None
    base, weights, _ = base_of(settings.task, settings.seed, "window", settings.names, steps)
    axes = ARMS[settings.arm]
    low_rank: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    config = LoraConfig(**low_rank) if axes is None else TalanConfig(**low_rank, **axes)

    def recall_of(model: Any, scored: Sequence[int] = SCORED_WINDOWS) -> dict[int, float]:
        return {
            windows: recall(model, settings.task, windows, settings.rows, names=settings.names) for windows in scored
        }

    base_recall = recall_of(base, [1])
    generator = torch.Generator().manual_seed(1000 + settings.seed)
    bar = tqdm(total=settings.steps, desc=settings.arm, mininterval=10)
    torch.manual_seed(settings.seed)
    with adapted(base, config) as model:
        if settings.arm in OF_ATTENTION:
            initialize_talan_keys(model)

        def loss_of(step: int) -> torch.Tensor:
            bar.update()
            done = step / settings.steps
            facts = settings.names
            if done < settings.one_name:
                facts = 1
            elif done < settings.one_name + settings.two_names:
                facts = 2
            spread = settings.longest - settings.shortest + 1
            windows = settings.shortest + int(torch.randint(spread, (), generator=generator))
            size = (windows, settings.batch_size, settings.questions)
            if settings.task == "count":
                tokens, ends, answers = make_counts(*size, generator)
            else:
                tokens, ends, answers = make_questions(
                    *size, facts, generator, names=settings.names, spread=settings.spread
                )
            logits = model(input_ids=tokens, use_cache=False).logits
            asked = logits.gather(1, ends.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
            return F.cross_entropy(asked.flatten(0, 1), answers.flatten())

        scale = settings.side_path_scale
        groups = talan_param_groups(model, settings.learning_rate, side_path_lr_scale=scale)
        started = time.process_time()
        losses = train(model, torch.optim.AdamW(groups), settings.steps, loss_of)
        seconds = time.process_time() - started
        parts = [losses[start : start + EVERY] for start in range(0, len(losses), EVERY)]
        return {
            "key": settings.key(),
            "settings": asdict(settings),
            "recall": recall_of(model),
            "base_recall": base_recall,
            "losses": [round(sum(part) / len(part), 3) for part in parts],
            "trainable": model.get_nb_trainable_parameters()[0],
            "processor_seconds": round(seconds, 1),
            "weights": weights,
            "code": code_version(),
            "machine": machine(),
        }


def table(rows: Sequence[Row]) -> str:
    """A line for all runs that differ in nothing but the seed; loss along the way and recall, one number a seed."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps({**row["settings"], "seed": None}), []).append(row)

    def of_settings(name: str) -> Callable[[list[Row]], Any]:
        return lambda runs: runs[0]["settings"][name]

    def asked_for(runs: list[Row]) -> str:
        settings = runs[0]["settings"]
        what = f"{settings['names']} names" if settings["task"] == "pairs" else f"`{settings['task']}`"
        return f"{what}, {settings['questions']}{' spread' if settings['spread'] else ''}"

    def training(runs: list[Row]) -> str:
        settings = runs[0]["settings"]
        rates = f"{settings['learning_rate']:g}, {settings['learning_rate'] * settings['side_path_scale']:g}"
        return f"{settings['shortest']} to {settings['longest']} windows x {settings['steps']}, {rates}"

    def loss_after(share: float) -> Callable[[list[Row]], str]:
        return lambda runs: ", ".join(
            f"{row['losses'][math.ceil(share * len(row['losses'])) - 1]:.2f}" for row in runs
        )

    def right_at(windows: int) -> Callable[[list[Row]], str]:
        return lambda runs: ", ".join(f"{100 * row['recall'][str(windows)]:.0f}" for row in runs)

    return columns_table(
        {
            "arm": of_settings("arm"),
            "task, questions": asked_for,
            "texts x steps, learning rates": training,
            "seeds": lambda runs: ", ".join(str(row["settings"]["seed"]) for row in runs),
            **{f"loss after {100 * share:.0f}%": loss_after(share) for share in (0.25, 0.5, 1.0)},
            **{f"right at {windows}, %": right_at(windows) for windows in (1, 10, 32)},
        },
        [sorted(runs, key=lambda row: row["settings"]["seed"]) for runs in groups.values()],
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=[OF_ATTENTION[0]])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--task", choices=["pairs", "count"], default=Settings.task)
    parser.add_argument("--names", type=int, choices=[NAMES, MOST_NAMES], default=Settings.names)
    parser.add_argument("--questions", type=int, default=Settings.questions, help="in a text of the training")
    parser.add_argument("--at-the-end", dest="spread", action="store_false", help="all questions, not only one")
    parser.add_argument("--shortest", type=int, default=Settings.shortest, help="windows of the shortest such text")
    parser.add_argument("--longest", type=int, default=Settings.longest)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--batch-size", type=int, default=Settings.batch_size)
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument(
        "--side-path-scale", type=float, default=Settings.side_path_scale, help="times that of the LoRA weights"
    )
    parser.add_argument("--one-name", type=float, default=0.0, help="share of the steps whose texts have one fact")
    parser.add_argument("--two-names", type=float, default=0.0, help="share of the next steps, with two facts")
    parser.add_argument("--rows", type=int, default=Settings.rows, help="texts that are scored at each distance")
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
                print(arm, seed, row["losses"], row["base_recall"], row["recall"], flush=True)


if __name__ == "__main__":
    main()
