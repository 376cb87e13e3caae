"""The picture of the demo's two loss curves."""

from __future__ import annotations

from pathlib import Path

SMOOTHING = 10
"""Steps in the running mean."""


def plot_losses(losses: dict[str, list[float]], file: Path) -> None:
    """Draw the training losses, each step faintly and their running mean.

    Args:
        losses: By adapter, one a step, nats.
        file: The PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (arm, values), colour in zip(losses.items(), ("tab:blue", "tab:orange"), strict=False):
        steps = range(1, len(values) + 1)
        means = [sum(values[max(0, i - SMOOTHING) : i]) / (i - max(0, i - SMOOTHING)) for i in steps]
        axes.plot(steps, values, color=colour, alpha=0.25)
        axes.plot(steps, means, color=colour, label=arm)
    axes.set(xlabel="step", ylabel="training loss (nats a token)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
