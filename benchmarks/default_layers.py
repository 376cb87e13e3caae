"""Measures where one or two side paths do best, so that the default of `talan_layers` rests on something.

Every run fine-tunes SmolLM2-135M-Instruct on sums of two two-digit numbers, matched in all but the placement, and
reports the held-out loss. One JSON line per finished run; a killed run continues where it stopped. Two processes, one
thread each:

    python -m benchmarks.default_layers --steps 50 --seeds 0 1
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from peft_talan.demo.base_model import default_model_folder
from peft_talan.demo.tasks import make_rows
from peft_talan.sft.models import load_model, load_tokenizer
from peft_talan.sft.prompts import Encoded, encode

from .measure import machine
from .quality.arms import make_config
from .runs import Row, RunSettings, read_lines, run_missing
from .training import adapted, make_batch, train

RESULTS = Path(__file__).parent / "results" / "default_layers.jsonl"
PLACEMENTS: dict[str, list[float] | None] = {
    "LoRA": None,
    "0.33": [0.33],
    "0.5": [0.5],
    "0.67": [0.67],
    "0.33 and 0.67": [0.33, 0.67],
}
HELD_OUT, SCORED_TOGETHER = 200, 50
RANK = 8
BATCH_SIZE = 8


@dataclass(frozen=True)
class Settings(RunSettings):
    """All that a run depends on."""

    placement: str
    seed: int
    steps: int


def run(settings: Settings, folder: str) -> Row:
    """Train and evaluate once."""
    torch.set_num_threads(1)
    rows = make_rows("chain_sum", settings.steps * BATCH_SIZE + HELD_OUT, settings.seed).rows
    base, tokenizer = load_model(folder, "float32", "cpu"), load_tokenizer(folder)
    layers = PLACEMENTS[settings.placement]
    adapter, axes = ("lora", {}) if layers is None else ("lora+talan", {"talan_layers": layers})
    encoded = [encode(tokenizer, row) for row in rows]
    held_out, trained = encoded[:HELD_OUT], encoded[HELD_OUT:]
    order = random.Random(settings.seed).sample(trained, len(trained))
    torch.manual_seed(settings.seed)
    with adapted(base, make_config(adapter, base, RANK, "all-linear", axes)) as model:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

        def loss_of(rows: list[Encoded]) -> torch.Tensor:
            return model(**make_batch(model, tokenizer, rows), use_cache=False).loss

        started = time.perf_counter()
        batches = [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]
        train(model, optimizer, settings.steps, lambda step: loss_of(batches[step]))
        seconds = time.perf_counter() - started
        parts = [held_out[start : start + SCORED_TOGETHER] for start in range(0, HELD_OUT, SCORED_TOGETHER)]
        with torch.no_grad():
            losses = [float(loss_of(part)) for part in parts]
        return {
            "key": settings.key(),
            **asdict(settings),
            "held_out_loss": statistics.mean(losses),
            "seconds_a_step": seconds / settings.steps,
            "trainable": model.get_nb_trainable_parameters()[0],
            "machine": machine(),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder or a hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    wanted = [Settings(placement, seed, options.steps) for seed in options.seeds for placement in PLACEMENTS]
    stored = read_lines(options.results)
    done = {Settings(row["placement"], row["seed"], row["steps"]).key(): row for row in stored}
    run_missing(
        lambda: [settings for settings in wanted if settings.key() not in done],
        partial(run, folder=options.model or default_model_folder()),
        options.results,
        done,
        lambda row: f"{row['placement']}, seed {row['seed']}: {row['held_out_loss']:.4f}",
        jobs=options.jobs,
    )
    print(f"{'placement':16} held-out loss, by seed")
    for placement in PLACEMENTS:
        losses = [done[settings.key()]["held_out_loss"] for settings in wanted if settings.placement == placement]
        print(f"{placement:16} {' '.join(f'{loss:.4f}' for loss in losses)}   mean {statistics.mean(losses):.4f}")


if __name__ == "__main__":
    main()
