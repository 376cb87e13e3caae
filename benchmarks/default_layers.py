"""Measures where one or two side paths do best, so that the default of `talan_layers` rests on something.

Every run fine-tunes SmolLM2-135M-Instruct on sums of two two-digit numbers, matched in all but the placement, and
reports the held-out loss. One JSON line a finished run; a killed run goes on where it stopped. Two processes, one
thread each:

    python benchmarks/default_layers.py --steps 50 --seeds 0 1
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "default_layers.jsonl"
PLACEMENTS: dict[str, list[float] | None] = {
    "LoRA": None,
    "0.33": [0.33],
    "0.5": [0.5],
    "0.67": [0.67],
    "0.33 and 0.67": [0.33, 0.67],
}
HELD_OUT = 200
RANK = 8
BATCH_SIZE = 8


def run(placement: str, seed: int, steps: int) -> None:
    """Train and evaluate once, in this process."""
    import torch
    from peft import get_peft_model
    from supervised import build_config, encode, load_base_model, make_batch, make_examples, train

    from peft_talan.demo.base_model import default_model_folder

    torch.set_num_threads(1)
    examples = make_examples("chain_sum", steps * BATCH_SIZE + HELD_OUT, seed)
    base, tokenizer = load_base_model(default_model_folder())
    layers = PLACEMENTS[placement]
    config = (
        build_config("LoRA", RANK, {}) if layers is None else build_config("TALAN", RANK, {"talan_layers": layers})
    )
    torch.manual_seed(seed)
    model: Any = get_peft_model(base, config)
    _, seconds = train(
        model,
        tokenizer,
        examples[HELD_OUT:],
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        seed=seed,
        report=lambda step, loss: None,
    )
    losses = []
    with torch.no_grad():
        for start in range(0, HELD_OUT, 50):
            rows = [encode(tokenizer, example) for example in examples[start : start + 50]]
            losses.append(float(model(**make_batch(rows, tokenizer.pad_token_id), use_cache=False).loss))
    row = {
        "placement": placement,
        "seed": seed,
        "steps": steps,
        "held_out_loss": statistics.mean(losses),
        "seconds_a_step": seconds,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def finished() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run(options.one[0], int(options.one[1]), options.steps)
        return
    done = {(row["placement"], row["seed"], row["steps"]) for row in finished()}
    wanted = [(p, s) for s in options.seeds for p in PLACEMENTS if (p, s, options.steps) not in done]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def start(work: tuple[str, int]) -> None:
        command = [sys.executable, __file__, "--steps", str(options.steps), "--one", work[0], str(work[1])]
        subprocess.run(command, check=True, env=environment)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(start, wanted))
    rows = [row for row in finished() if row["steps"] == options.steps and row["seed"] in options.seeds]
    print(f"{'placement':16} held-out loss, by seed")
    for placement in PLACEMENTS:
        losses = [row["held_out_loss"] for row in rows if row["placement"] == placement]
        print(f"{placement:16} {' '.join(f'{loss:.4f}' for loss in losses)}   mean {statistics.mean(losses):.4f}")


if __name__ == "__main__":
    main()
