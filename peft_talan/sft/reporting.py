"""What a comparison shows: bars while it runs, then a table, the differences and a picture."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .comparison import BASE, DONE, LORA, Job, Outcome, compare
from .intervals import Interval

SMOOTHING = 10
"""Steps in the running mean of a loss."""

PIPE_WIDTH = 200

STYLES = (("tab:blue", "-"), ("tab:orange", "--"), ("tab:green", ":"), ("tab:red", "-."))


def make_console(stderr: bool = False) -> Console:
    """A console whose lines are not broken in a pipe or a file, which have no width of their own.

    Args:
        stderr: Whether it writes to stderr. Default False.

    Returns:
        The console.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(stderr=stderr, highlight=False, width=width)


def compare_with_bars(
    job: Job, arms: Sequence[str], seeds: Sequence[int], *, processes: int, steps: int, console: Console
) -> list[Outcome]:
    """Run a comparison with a bar for each arm and seed.

    Args:
        job: What all arms share.
        arms: The arms.
        seeds: Of initialization and order.
        processes: How many run at a time.
        steps: Optimizer steps of each.
        console: Where the bars go.

    Returns:
        The outcomes.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bars = {(BASE, 0): progress.add_task(BASE, total=1, note="waits", start=False)}
        for seed in seeds:
            for arm in arms:
                name = arm if len(seeds) == 1 else f"{arm}, seed {seed}"
                bars[arm, seed] = progress.add_task(name, total=steps, note="waits", start=False)

        def report(arm: str, seed: int, note: str) -> None:
            bar = bars[arm, seed]
            progress.start_task(bar)
            if note == DONE:
                progress.update(bar, completed=progress.tasks[bar].total, note=note)
            else:
                progress.update(bar, advance=1 if note.startswith("loss") else 0, note=note)

        return compare(job, arms, seeds, processes=processes, report=report)


def paired_difference(outcomes: Sequence[Outcome], arm: str, other: str, measure: str) -> Interval:
    """The difference of two arms: over the seeds, or over the held-out rows if there is one seed.

    Args:
        outcomes: All outcomes.
        arm: The one arm.
        other: The arm that is subtracted.
        measure: `loss` or `exact_match`.

    Returns:
        The mean difference with its interval.
    """
    pairs = [
        (mine.scores, its.scores)
        for mine in outcomes
        for its in outcomes
        if (mine.arm, its.arm) == (arm, other) and mine.seed == its.seed
    ]
    if len(pairs) > 1:
        return Interval.of_mean([getattr(mine, measure) - getattr(its, measure) for mine, its in pairs])
    mine, its = pairs[0]
    if measure == "exact_match":
        return Interval.of_mean([float(a) - float(b) for a, b in zip(mine.exact, its.exact, strict=True)])
    # The mean over tokens is a mean over rows, each weighted by its tokens.
    scale = len(mine.tokens) / sum(mine.tokens)
    return Interval.of_mean([scale * (a - b) for a, b in zip(mine.losses, its.losses, strict=True)])


def _of(outcomes: Sequence[Outcome], arm: str) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.arm == arm]


def arms_of(outcomes: Sequence[Outcome]) -> list[str]:
    """The arms of a comparison, in order."""
    return list(dict.fromkeys(outcome.arm for outcome in outcomes))


def _exact_interval(found: Sequence[Outcome]) -> Interval:
    if len(found) > 1:
        return Interval.of_mean([outcome.scores.exact_match for outcome in found])
    return Interval.of_share(sum(found[0].scores.exact), len(found[0].scores.exact))


def make_table(outcomes: Sequence[Outcome]) -> Table:
    """The table of a comparison: means with 95% intervals over the seeds, or over the rows if there is one seed.

    Args:
        outcomes: All outcomes.

    Returns:
        The table.
    """
    trained = [outcome for outcome in outcomes if outcome.trainable]
    seeds, rows = len({outcome.seed for outcome in trained}), len(outcomes[0].scores.exact)
    over = f"{seeds} seeds" if seeds > 1 else f"the {rows} held-out rows, one seed"
    table = Table(title=f"Held out: {rows} rows; 95% intervals over {over}", title_justify="left")
    for column in ("", "trainable", "loss", "exact match", "plain text loss", "s/step"):
        table.add_column(column, justify="left" if column == "" else "right")
    for arm in arms_of(outcomes):
        found = _of(outcomes, arm)
        table.add_row(
            arm,
            f"{found[0].trainable:,}" if found[0].trainable else "-",
            Interval.of_mean([outcome.scores.loss for outcome in found]).text(),
            _exact_interval(found).text(1, 100.0) + " %",
            Interval.of_mean([outcome.text_loss for outcome in found]).text(),
            f"{found[0].seconds:.2f}" if found[0].trainable else "-",
        )
    return table


def difference_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """What every arm differs from LoRA by, and in what it is better or worse with an interval that excludes zero.

    Args:
        outcomes: All outcomes.

    Returns:
        A line for each arm.
    """
    lines = []
    for arm in [arm for arm in arms_of(outcomes) if arm not in (BASE, LORA)]:
        loss, exact = (paired_difference(outcomes, arm, LORA, measure) for measure in ("loss", "exact_match"))
        # A lower loss is better, and a higher exact match.
        gains = (("loss", -loss.mean, loss.excludes_zero), ("exact match", exact.mean, exact.excludes_zero))
        verdicts = [f"{'better' if gain > 0 else 'worse'} in {name}" for name, gain, clear in gains if clear]
        verdict = " and ".join(verdicts) or "within noise"
        lines.append(
            f"{arm} minus {LORA}: loss {loss.text(sign='+')}, exact match {exact.text(1, 100.0, sign='+')} points: "
            f"{verdict}"
        )
    return lines


def _running_mean(values: Sequence[float]) -> list[float]:
    parts = [values[max(0, end - SMOOTHING) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def draw_comparison(outcomes: Sequence[Outcome], file: Path) -> None:
    """Draw the training losses, their difference from LoRA, and the held-out scores with their intervals.

    Args:
        outcomes: All outcomes.
        file: The PNG to write.
    """
    # Figure and not pyplot: nothing global is set, and no window is opened.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.0), layout="constrained")
    curves, apart, scores = figure.subplots(1, 3)
    arms = [arm for arm in arms_of(outcomes) if arm != BASE]
    reference = _of(outcomes, LORA)[0].losses
    for arm, (colour, line) in zip(arms, STYLES, strict=False):
        losses = _of(outcomes, arm)[0].losses
        steps = range(1, len(losses) + 1)
        curves.plot(steps, _running_mean(losses), color=colour, linestyle=line, label=arm)
        if arm != LORA:
            difference = [mine - its for mine, its in zip(losses, reference, strict=True)]
            apart.plot(steps, _running_mean(difference), color=colour, linestyle=line)
    apart.axhline(0.0, color="grey", linewidth=0.8)
    curves.set(title="Training loss", xlabel="step", ylabel="nats a token")
    apart.set(title=f"Difference from {LORA}", xlabel="step", ylabel="nats a token (below 0: better)")
    shown = arms_of(outcomes)
    for place, arm in enumerate(shown):
        interval = _exact_interval(_of(outcomes, arm))
        colour = STYLES[arms.index(arm)][0] if arm in arms else "tab:grey"
        ends = [[100 * (interval.mean - interval.low)], [100 * (interval.high - interval.mean)]]
        scores.errorbar([100 * interval.mean], [place], xerr=ends, fmt="o", capsize=4, color=colour)
    scores.set_yticks(range(len(shown)), shown)
    scores.set_ylim(len(shown) - 0.5, -0.5)
    scores.set(title="Exact match, held out", xlabel="%, with the 95% interval")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=len(arms))
    figure.savefig(file, dpi=150)
