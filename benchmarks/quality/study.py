"""The paired study: backbone x task x adapter x seed, matched in everything else.

    python -m benchmarks.quality.backbones                 # pretrains the two small backbones, once
    python -m benchmarks.quality.study --seeds 0 1 2 3 4   # runs what is not in the results yet
    python -m benchmarks.quality.report                    # tables and plots

One JSON line a finished run, so a study that was stopped goes on where it was; the seed changes slowest, so that a
part of a study is balanced. `--jobs N` runs N processes. `--ablation` changes one axis at a time instead.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .arms import ADAPTERS, MATCHED, VARIANTS
from .backbones import cache_folder
from .one_run import Settings, run
from .tasks import TASKS

RESULTS = Path(__file__).parents[1] / "results" / "quality.jsonl"


def finished(results: Path) -> dict[str, dict[str, Any]]:
    """The finished runs by key; a line that was cut off is no run."""
    rows: dict[str, dict[str, Any]] = {}
    if results.exists():
        for line in results.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[row["key"]] = row
    return rows


def common_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all runs share."""
    names = ("steps", "batch_size", "learning_rate", "rank", "held_out", "held_out_known")
    targets = options.target_modules
    whole = targets[0] if targets == ["all-linear"] else tuple(targets)
    return {**{name: getattr(options, name) for name in names}, "target_modules": whole}


def grid(options: argparse.Namespace) -> list[Settings]:
    """All runs that are asked for, the seed changing slowest."""
    common = common_settings(options)
    arms = (
        [("lora", "default", {}), (MATCHED, "default", {})]
        + [("lora+talan", name, VARIANTS[name]) for name in options.variants]
        if options.ablation
        else [(adapter, "default", {}) for adapter in options.adapters]
    )
    if options.axes:
        arms = [(adapter, json.dumps(options.axes), options.axes) for adapter, _, _ in arms]
    return [
        Settings(backbone, task, adapter, seed, variant, axes, **common)
        for seed in options.seeds
        for backbone in options.backbones
        for task in options.tasks
        for adapter, variant, axes in arms
    ]


def device_of_this_worker(device: str) -> str:
    """Spread the workers over the GPUs."""
    if device != "cuda":
        return device
    identity = multiprocessing.current_process()._identity
    return f"cuda:{(identity[0] - 1 if identity else 0) % torch.cuda.device_count()}"


def run_in_worker(settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    return run(
        settings,
        device_of_this_worker(options.device),
        options.dtype,
        options.adapters_folder,
        options.lm_eval,
        options.lm_eval_folder,
    )


def run_all(wanted: list[Settings], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run what is wanted, here or in processes, and start nothing new after the time that is given."""
    deadline = time.monotonic() + options.limit_seconds
    if options.jobs == 1:
        for settings in wanted:
            if time.monotonic() > deadline:
                return
            yield run_in_worker(settings, options)
        return
    queue = list(reversed(wanted))
    running: set[Future[dict[str, Any]]] = set()
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        while running or (queue and time.monotonic() < deadline):
            while queue and len(running) < options.jobs and time.monotonic() < deadline:
                running.add(pool.submit(run_in_worker, queue.pop(), options))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every study has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backbones", nargs="+", default=["tiny-qwen3", "tiny-qwen3-moe"], help="names, folders or hub ids"
    )
    parser.add_argument("--adapters", nargs="+", choices=["base", *ADAPTERS], default=list(ADAPTERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--target-modules", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"])
    parser.add_argument("--held-out", type=int, default=200, help="items of the task")
    parser.add_argument("--held-out-known", type=int, default=20, help="items of each known task; 0: none")
    parser.add_argument("--lm-eval", nargs="*", default=[], help="names of lm-eval tasks, after every run")
    parser.add_argument("--lm-eval-folder", type=Path, default=None, help="take the lm-eval tasks from its YAML files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--adapters-folder", type=Path, default=cache_folder() / "study")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; the processes are spread over the GPUs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the backbone")
    parser.add_argument("--limit-seconds", type=float, default=math.inf, help="start no run after this time")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--ablation", action="store_true", help="LoRA+TALAN with one axis changed at a time")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--axes", type=json.loads, default=None, help='other defaults, as JSON: {"talan_alpha": 3}')
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--runs", type=int, default=None, help="at most so many runs, then stop")
    options = parser.parse_args(arguments)
    everything = grid(options)
    done = finished(options.results)
    wanted = [settings for settings in everything if settings.key() not in done]
    before = len(everything) - len(wanted)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    # The bar shows the runs done, the time gone and an estimate of the time left.
    with tqdm(total=len(everything), initial=before, desc="runs", mininterval=1) as bar:
        for row in run_all(wanted[: options.runs], options):
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            name = "{backbone} {task} {adapter} {seed}".format(**row["settings"])
            bar.set_postfix_str(f"{name}: loss {row['loss']:.4f}, {100 * row['exact_match']:.1f}%")
            bar.update()
    left = len(wanted) - (bar.n - before)
    print(f"{left} runs left" if left else "finished")


if __name__ == "__main__":
    main()
