"""What comparisons show: bars while they run, then a table, the differences and a picture."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .comparison import BASE, LORA, Job, Outcome, compare
from .display import make_figure, make_table, progress_bars
from .intervals import Interval

ENOUGH_SEEDS, ENOUGH_ROWS = 3, 30
"""With fewer of either, no difference is called better or worse."""

SMOOTHING = 10
"""Steps in the running mean of a loss."""

STYLES = (("tab:blue", "-"), ("tab:orange", "--"), ("tab:green", ":"), ("tab:red", "-."))


def compare_with_bars(
    job: Job, arms: Sequence[str], seeds: Sequence[int], *, processes: int, steps: int, console: Console
) -> list[Outcome]:
    """Run a comparison of `steps` steps per arm and seed, with a bar for each."""
    totals: dict[Hashable, tuple[str, int]] = {(BASE, 0): (BASE, 1)}
    for seed in seeds:
        for arm in arms:
            totals[arm, seed] = (arm if len(seeds) == 1 else f"{arm}, seed {seed}", steps)
    with progress_bars(totals, console) as report:
        return compare(job, arms, seeds, processes=processes, report=report)


def paired_difference(outcomes: Sequence[Outcome], arm: str, other: str, measure: str) -> Interval:
    """The difference of two arms in `loss` or `exact_match`, the second one subtracted.

    It is over the seeds, or over the held-out rows if there is one seed.
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


def by_arm(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of each arm, in order."""
    arms = dict.fromkeys(outcome.arm for outcome in outcomes)
    return {arm: [outcome for outcome in outcomes if outcome.arm == arm] for arm in arms}


def _counts(outcomes: Sequence[Outcome]) -> tuple[int, int]:
    """The numbers of seeds and of held-out rows."""
    return len({outcome.seed for outcome in outcomes if outcome.trainable}), len(outcomes[0].scores.exact)


def _exact_interval(outcomes: Sequence[Outcome]) -> Interval:
    if len(outcomes) > 1:
        return Interval.of_mean([outcome.scores.exact_match for outcome in outcomes])
    return Interval.of_share(sum(outcomes[0].scores.exact), len(outcomes[0].scores.exact))


def comparison_table(outcomes: Sequence[Outcome]) -> Table:
    """The table of a comparison: means with 95% intervals over the seeds, or over the rows if there is one seed."""
    seeds, rows = _counts(outcomes)
    over = f"{seeds} seeds" if seeds > 1 else f"the {rows} held-out rows, one seed"
    title = f"Held out: {rows} rows; 95% intervals over {over}"
    table = make_table(title, "", "trainable", "loss", "exact match", "plain text loss", "s/step")
    for arm, own in by_arm(outcomes).items():
        table.add_row(
            arm,
            f"{own[0].trainable:,}" if own[0].trainable else "-",
            Interval.of_mean([outcome.scores.loss for outcome in own]).text(),
            _exact_interval(own).text(1, 100.0) + " %",
            Interval.of_mean([outcome.text_loss for outcome in own]).text(),
            f"{own[0].seconds:.2f}" if own[0].trainable else "-",
        )
    return table


def difference_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """What every arm differs from LoRA by, one line each.

    It is called better or worse where the interval excludes zero, if there are enough seeds and rows.
    """
    lines = []
    seeds, rows = _counts(outcomes)
    for arm in [arm for arm in by_arm(outcomes) if arm not in (BASE, LORA)]:
        loss, exact = (paired_difference(outcomes, arm, LORA, measure) for measure in ("loss", "exact_match"))
        # A lower loss is better, and a higher exact match.
        gains = (("loss", -loss.mean, loss.excludes_zero), ("exact match", exact.mean, exact.excludes_zero))
        verdicts = [f"{'better' if gain > 0 else 'worse'} in {name}" for name, gain, clear in gains if clear]
        verdict = " and ".join(verdicts) or "within noise"
        if verdicts and (seeds < ENOUGH_SEEDS or rows < ENOUGH_ROWS):
            counts = f"{seeds} seed{'s' if seeds > 1 else ''}, {rows} rows"
            verdict = f"too few to call ({counts}; {ENOUGH_SEEDS} and {ENOUGH_ROWS} are needed)"
        lines.append(
            f"{arm} minus {LORA}: loss {loss.text(sign='+')}, exact match {exact.text(1, 100.0, sign='+')} points: "
            f"{verdict}"
        )
    return lines


def _running_mean(values: Sequence[float]) -> list[float]:
    sums = [0.0, *accumulate(values)]
    starts = [max(0, end - SMOOTHING) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]


def draw_comparison(outcomes: Sequence[Outcome], file: Path) -> None:
    """Draw the training losses, their difference from LoRA, and the held-out scores with their intervals."""
    figure = make_figure(11, 4.0)
    curves, apart, scores = figure.subplots(1, 3)
    arms = by_arm(outcomes)
    styles = dict(zip((arm for arm in arms if arm != BASE), STYLES, strict=False))
    for arm, (colour, line) in styles.items():
        losses = arms[arm][0].losses
        steps = range(1, len(losses) + 1)
        curves.plot(steps, _running_mean(losses), color=colour, linestyle=line, label=arm)
        if arm != LORA:
            difference = [mine - its for mine, its in zip(losses, arms[LORA][0].losses, strict=True)]
            apart.plot(steps, _running_mean(difference), color=colour, linestyle=line)
    apart.axhline(0.0, color="grey", linewidth=0.8)
    curves.set(title="Training loss", xlabel="step", ylabel="nats per token")
    apart.set(title=f"Difference from {LORA}", xlabel="step", ylabel="nats per token (below 0: better)")
    for place, (arm, own) in enumerate(arms.items()):
        interval = _exact_interval(own)
        colour, _ = styles.get(arm, ("tab:grey", ""))
        ends = [[100 * (interval.mean - interval.low)], [100 * (interval.high - interval.mean)]]
        scores.errorbar([100 * interval.mean], [place], xerr=ends, fmt="o", capsize=4, color=colour)
    scores.set_yticks(range(len(arms)), list(arms))
    scores.set_ylim(len(arms) - 0.5, -0.5)
    scores.set(title="Exact match, held out", xlabel="%, with the 95% interval")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=len(styles))
    figure.savefig(file, dpi=150)
