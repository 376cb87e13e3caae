"""The first part of the demo: LoRA and LoRA+TALAN recall a key that lies beyond the attention window, or don't."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from ..config import TalanConfig
from ..sft.comparison import BASE, LORA, TALAN, lora_options
from ..sft.display import make_figure, make_table, progress_bars
from ..sft.intervals import Interval
from .recall import ANSWERS, CHANCE, LONG_CONTEXT, REACH, WINDOW, Task, Training, pretrained, recall, train

TASK: Task = "key"
BASE_STEPS_PER_STEP = 3
"""The base model learns from texts of one window, which take a fraction of the time."""
LEARNING_RATE = 3e-3
BATCH_SIZE = 8
RANK = 8
ROWS = 128
WINDOWS = (1, 2, 3, 4, 6, 8, 10)

COLOURS = ("tab:grey", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
MARKERS, LINES = "osD^vPX", (":", "-", "--", "-", "--", "-.", ":")


@dataclass(frozen=True)
class Recall:
    """What one arm recalls: by distance in windows, the share of right answers with its interval."""

    arm: str
    trainable: int
    shares: dict[int, Interval]

    def as_dict(self) -> dict[str, Any]:
        """The outcome as JSON can hold it."""
        shares = {windows: [share.mean, share.low, share.high] for windows, share in self.shares.items()}
        return {"arm": self.arm, "trainable": self.trainable, "recall": shares}


def run_recall(steps: int, seed: int, console: Console, windows: Sequence[int] = WINDOWS) -> list[Recall]:
    """Pretrain the window model, fine-tune it with LoRA and with LoRA+TALAN, and measure what each recalls.

    The window model takes three times as many steps as each adapter.
    """
    low_rank = lora_options(RANK)
    configurations = {LORA: LoraConfig(**low_rank), TALAN: TalanConfig(**low_rank, **LONG_CONTEXT)}
    base_steps = BASE_STEPS_PER_STEP * steps
    totals = {BASE: base_steps, **dict.fromkeys(configurations, steps)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with progress_bars({arm: (arm, total + len(windows)) for arm, total in totals.items()}, console) as report:

        def measure(arm: str, model: Any, trainable: int) -> Recall:
            shares = {}
            for distance in windows:
                right = round(ROWS * recall(model, TASK, distance, ROWS))
                shares[distance] = Interval.of_share(right, ROWS)
                report(arm, f"{distance} windows: {100 * right / ROWS:.0f} %", 1)
            return Recall(arm, trainable, shares)

        def report_loss(arm: str, loss: float) -> None:
            report(arm, f"loss {loss:.3f}", 1)

        model: Any = pretrained(TASK, seed, base_steps, report=partial(report_loss, BASE))
        outcomes = [measure(BASE, model, 0)]
        for arm, configuration in configurations.items():
            torch.manual_seed(seed)
            tuned = get_peft_model(model, configuration)
            training = Training(steps, LEARNING_RATE, BATCH_SIZE, seed=seed + 1)
            train(tuned, TASK, training, partial(report_loss, arm))
            outcomes.append(measure(arm, tuned, tuned.get_nb_trainable_parameters()[0]))
            model = tuned.unload()
    torch.set_num_threads(threads)
    return outcomes


def recall_table(outcomes: Sequence[Recall]) -> Table:
    """The table of recall by distance."""
    title = f"Recall of a key among {ANSWERS} (chance {100 * CHANCE:.0f} %); {ROWS} texts per distance, 95% interval"
    *near, last = outcomes[0].shares
    table = make_table(title, "distance in windows", "trainable", *map(str, (*near, last)))
    for outcome in outcomes:
        cells = [f"{100 * outcome.shares[windows].mean:.0f} %" for windows in near]
        trainable = f"{outcome.trainable:,}" if outcome.trainable else "-"
        table.add_row(outcome.arm, trainable, *cells, outcome.shares[last].text(0, 100.0) + " %")
    return table


def recall_difference(outcomes: Sequence[Recall]) -> str:
    """What LoRA+TALAN recalls more than LoRA at the longest distance, with its interval, in one line."""
    shares = {outcome.arm: outcome.shares for outcome in outcomes}
    last = max(shares[LORA])
    difference = shares[TALAN][last].minus(shares[LORA][last])
    verdict = ("better" if difference.mean > 0 else "worse") if difference.excludes_zero else "within noise"
    return (
        f"{TALAN} minus {LORA} at {last} windows ({last * WINDOW} tokens; all blocks together reach {REACH} back): "
        f"{difference.text(0, 100.0, sign='+')} points: {verdict}"
    )


def draw_recall(curves: Mapping[str, Mapping[int, Interval]], file: Path) -> None:
    """Draw recall over distance, a line with a band for each arm, with the reach of attention marked."""
    figure = make_figure(8, 4.5)
    axes = figure.add_subplot()
    axes.axvspan(0.9, REACH / WINDOW, color="tab:grey", alpha=0.12, label="within reach of attention")
    axes.axhline(100 * CHANCE, color="black", linewidth=0.8, linestyle=(0, (1, 2)), label="chance")
    distances = sorted({windows for curve in curves.values() for windows in curve})
    for (arm, curve), colour, marker, line in zip(curves.items(), COLOURS, MARKERS, LINES, strict=False):
        windows = sorted(curve)
        mean, low, high = ([100 * getattr(curve[d], end) for d in windows] for end in ("mean", "low", "high"))
        axes.plot(windows, mean, color=colour, marker=marker, markersize=5, linestyle=line, label=arm)
        axes.fill_between(windows, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(distances, [str(distance) for distance in distances])
    axes.minorticks_off()
    axes.set(
        xlim=(0.9, 1.1 * max(distances)),
        ylim=(-3, 103),
        xlabel=f"length of the text in windows of {WINDOW} tokens",
        ylabel="right answers, %",
    )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
