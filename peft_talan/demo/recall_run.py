"""The demo's first half: LoRA and LoRA+TALAN are asked for a key that lies beyond the attention window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..config import TalanConfig
from ..sft.comparison import BASE, LORA, TALAN
from ..sft.intervals import Interval
from .recall import ANSWERS, CHANCE, LONG_CONTEXT, REACH, WINDOW, Task, Training, pretrained, recall, train

TASK: Task = "key"
BASE_STEPS_A_STEP = 3
"""The base model learns from texts of one window, which take a fraction of the time."""
LEARNING_RATE = 3e-3
BATCH_SIZE = 8
RANK = 8
ROWS = 128
WINDOWS = (1, 2, 3, 4, 6, 8, 10)

STYLES = (
    ("tab:grey", "o", ":"),
    ("tab:blue", "s", "-"),
    ("tab:orange", "D", "--"),
    ("tab:green", "^", "-"),
    ("tab:red", "v", "--"),
    ("tab:purple", "P", "-."),
    ("tab:brown", "X", ":"),
)


@dataclass(frozen=True)
class Recall:
    """What one arm recalls.

    Args:
        arm: `BASE`, `LORA` or `TALAN`.
        trainable: The number of trainable parameters.
        shares: By distance in windows, the share of right answers with its interval.
    """

    arm: str
    trainable: int
    shares: dict[int, Interval]

    def as_dict(self) -> dict[str, Any]:
        """The outcome as JSON can hold it."""
        shares = {windows: [share.mean, share.low, share.high] for windows, share in self.shares.items()}
        return {"arm": self.arm, "trainable": self.trainable, "recall": shares}


def _configurations() -> dict[str, LoraConfig]:
    low_rank: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    task_type = "CAUSAL_LM"
    return {
        LORA: LoraConfig(**low_rank, task_type=task_type),
        TALAN: TalanConfig(**low_rank, task_type=task_type, **LONG_CONTEXT),
    }


def run_recall(steps: int, seed: int, console: Console, windows: Sequence[int] = WINDOWS) -> list[Recall]:
    """Pretrain the window model, fine-tune it with LoRA and with LoRA+TALAN, and ask each for keys.

    Args:
        steps: Optimizer steps of each adapter; the window model takes three times as many.
        seed: Of weights and texts.
        console: Where the bars go, one for each model.
        windows: The distances to ask at.

    Returns:
        What the base model and both adapters recall.
    """
    base_steps = BASE_STEPS_A_STEP * steps
    configurations = _configurations()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        totals = {BASE: base_steps, **dict.fromkeys(configurations, steps)}
        bars = {
            arm: progress.add_task(arm, total=total + len(windows), note="waits", start=False)
            for arm, total in totals.items()
        }

        def shares(model: Any, arm: str) -> dict[int, Interval]:
            asked = {}
            for distance in windows:
                right = round(ROWS * recall(model, TASK, distance, ROWS))
                asked[distance] = Interval.of_share(right, ROWS)
                progress.update(bars[arm], advance=1, note=f"{distance} windows: {100 * right / ROWS:.0f} %")
            return asked

        def show_loss(arm: str, loss: float) -> None:
            progress.update(bars[arm], advance=1, note=f"loss {loss:.3f}")

        progress.start_task(bars[BASE])
        model: Any = pretrained(TASK, seed, base_steps, report=partial(show_loss, BASE))
        found.append(Recall(BASE, 0, shares(model, BASE)))
        for arm, configuration in configurations.items():
            progress.start_task(bars[arm])
            torch.manual_seed(seed)
            tuned = get_peft_model(model, configuration)
            training = Training(steps, LEARNING_RATE, BATCH_SIZE, seed=seed + 1)
            train(tuned, TASK, training, report=partial(show_loss, arm))
            trainable = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
            found.append(Recall(arm, trainable, shares(tuned, arm)))
            model = tuned.unload()
    torch.set_num_threads(threads)
    return found


def recall_table(outcomes: Sequence[Recall]) -> Table:
    """The table of recall by distance.

    Args:
        outcomes: What `run_recall` returned.

    Returns:
        The table.
    """
    title = f"Recall of a key among {ANSWERS} (chance {100 * CHANCE:.0f} %); {ROWS} texts a distance, 95% interval"
    table = Table(title=title, title_justify="left")
    *near, last = outcomes[0].shares
    for column in ("distance in windows", "trainable", *map(str, near), str(last)):
        table.add_column(column, justify="left" if column.startswith("distance") else "right")
    for outcome in outcomes:
        cells = [f"{100 * outcome.shares[windows].mean:.0f} %" for windows in near]
        trainable = f"{outcome.trainable:,}" if outcome.trainable else "-"
        table.add_row(outcome.arm, trainable, *cells, outcome.shares[last].text(0, 100.0) + " %")
    return table


def recall_difference(outcomes: Sequence[Recall]) -> str:
    """What LoRA+TALAN recalls more than LoRA at the longest distance, with its interval.

    Args:
        outcomes: What `run_recall` returned.

    Returns:
        One line.
    """
    of = {outcome.arm: outcome.shares for outcome in outcomes}
    last = max(of[LORA])
    mine, its = of[TALAN][last], of[LORA][last]
    # Newcombe's interval for a difference of two shares, from the Wilson interval of each.
    mean = mine.mean - its.mean
    low = mean - ((mine.mean - mine.low) ** 2 + (its.high - its.mean) ** 2) ** 0.5
    high = mean + ((mine.high - mine.mean) ** 2 + (its.mean - its.low) ** 2) ** 0.5
    difference = Interval(mean, low, high)
    verdict = ("better" if mean > 0 else "worse") if difference.excludes_zero else "within noise"
    return (
        f"{TALAN} minus {LORA} at {last} windows ({last * WINDOW} tokens; all blocks together reach {REACH} back): "
        f"{difference.text(0, 100.0, sign='+')} points: {verdict}"
    )


def draw_recall(curves: Mapping[str, Mapping[int, Interval]], file: Path) -> None:
    """Draw recall over distance, a line with a band for each arm, with the reach of attention marked.

    Args:
        curves: By arm, the shares by distance in windows.
        file: The picture to write.
    """
    # Figure and not pyplot: nothing global is set, and no window is opened.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(0.9, REACH / WINDOW, color="tab:grey", alpha=0.12, label="within reach of attention")
    axes.axhline(100 * CHANCE, color="black", linewidth=0.8, linestyle=(0, (1, 2)), label="chance")
    distances = sorted({windows for curve in curves.values() for windows in curve})
    for (arm, curve), (colour, marker, line) in zip(curves.items(), STYLES, strict=False):
        windows = sorted(curve)
        axes.plot(
            windows,
            [100 * curve[distance].mean for distance in windows],
            color=colour,
            marker=marker,
            markersize=5,
            linestyle=line,
            label=arm,
        )
        low, high = ([100 * getattr(curve[distance], end) for distance in windows] for end in ("low", "high"))
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
