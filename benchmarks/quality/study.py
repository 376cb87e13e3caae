"""The paired study: backbone x task x adapter x seed, matched in everything else.

    python -m benchmarks.quality.backbones                 # pretrains the two small backbones, once
    python -m benchmarks.quality.study --seeds 0 1 2 3 4   # runs what is not in the results yet
    python -m benchmarks.quality.report                    # tables and plots

One JSON line per finished run, so a study that was stopped continues where it was; the seed changes slowest, so that a
part of a study is balanced. `--jobs N` runs N processes. `--ablation` changes one axis at a time instead.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..runs import Row, finished, run_missing
from .arms import ADAPTERS, MATCHED, VARIANTS
from .backbones import cache_folder
from .one_run import Settings, loaded, run
from .tasks import TASKS

RESULTS = Path(__file__).parents[1] / "results" / "quality.jsonl"
Arm = tuple[str, str, dict[str, Any]]
"""Adapter, name of the variant, and its axes."""


def common_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all runs share."""
    names = ("steps", "batch_size", "learning_rate", "rank", "held_out", "held_out_known")
    targets = options.target_modules
    whole = targets[0] if targets == ["all-linear"] else tuple(targets)
    return {**{name: getattr(options, name) for name in names}, "target_modules": whole}


def run_in_worker(settings: Settings, options: argparse.Namespace) -> Row:
    """Run once; workers are spread over the GPUs."""
    device = options.device
    if device == "cuda":
        identity = multiprocessing.current_process()._identity
        device = f"cuda:{(identity[0] - 1 if identity else 0) % torch.cuda.device_count()}"
    return run(settings, device, options.dtype, options.adapters_folder, options.lm_eval, options.lm_eval_folder)


def run_grid(options: argparse.Namespace, tasks: Iterable[str], arms: Iterable[Arm], most: float = math.inf) -> None:
    """Run what is missing of all combinations."""
    common = common_settings(options)
    everything = [
        Settings(backbone, task, adapter, seed, variant, axes, **common)
        for seed in options.seeds
        for backbone in options.backbones
        for task in tasks
        for adapter, variant, axes in arms
    ]
    done = finished(options.results)

    def missing() -> list[Settings]:
        return [settings for settings in everything if settings.key() not in done]

    run_missing(
        missing,
        partial(run_in_worker, options=options),
        options.results,
        done,
        lambda row: "{backbone} {task} {adapter} {seed}: ".format(**row["settings"]) + scores_text(row),
        total=len(everything),
        initial=len(everything) - len(missing()),
        jobs=options.jobs,
        seconds=options.limit_seconds,
        most=most,
    )
    left = len(missing())
    print(f"{left} runs left" if left else "finished")


def scores_text(row: Row) -> str:
    return f"loss {row['loss']:.4f}, {100 * row['exact_match']:.1f}%"


def make_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
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
    parser.set_defaults(**{"learning_rate": 1e-2, **defaults})
    return parser


def make_adapters_parser(description: str | None, results: Path) -> argparse.ArgumentParser:
    """The options of what is measured on the adapters of a study."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=RESULTS)
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--adapters-folder", type=Path, default=cache_folder() / "study")
    parser.add_argument("--limit-seconds", type=float, default=math.inf, help="start no adapter after this time")
    return parser


def measure_adapters(
    options: argparse.Namespace,
    wanted: Callable[[dict[str, Any]], bool],
    measure: Callable[[Any, Any, dict[str, Any]], Row],
) -> list[Row]:
    """Measure the stored adapters whose settings are wanted, those that have a result left out; all results."""
    done = finished(options.results)

    def missing() -> list[Row]:
        rows = [row for row in finished(options.study).values() if wanted(row["settings"]) and row["key"] not in done]
        return [row for row in rows if (options.adapters_folder / row["key"]).exists()]

    def measured(row: Row) -> Row:
        base, tokenizer, weights = loaded(row["settings"]["backbone"])
        if weights != row["weights"]:
            name = row["settings"]["backbone"]
            raise SystemExit(f"{name} has other weights than the study's: {weights}, not {row['weights']}")
        model = PeftModel.from_pretrained(base, options.adapters_folder / row["key"]).eval()
        found = {"key": row["key"], "settings": row["settings"], **measure(model, tokenizer, row["settings"])}
        model.unload()
        return found

    run_missing(
        missing,
        measured,
        options.results,
        done,
        lambda row: row["key"],
        total=len(missing()),
        seconds=options.limit_seconds,
    )
    return list(done.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--ablation", action="store_true", help="LoRA+TALAN with one axis changed at a time")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--axes", type=json.loads, default=None, help='other defaults, as JSON: {"talan_alpha": 3}')
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--runs", type=int, default=math.inf, help="at most so many runs, then stop")
    options = parser.parse_args(arguments)
    arms: list[Arm] = [(adapter, "default", {}) for adapter in options.adapters]
    if options.ablation:
        arms = [("lora", "default", {}), (MATCHED, "default", {})]
        arms += [("lora+talan", name, VARIANTS[name]) for name in options.variants]
    if options.axes:
        arms = [(adapter, json.dumps(options.axes), options.axes) for adapter, _, _ in arms]
    run_grid(options, options.tasks, arms, options.runs)


if __name__ == "__main__":
    main()
