"""Pictures of what `measure` measures, with matplotlib (the extra `analysis`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..axes import refusal
from ..sft.display import make_figure
from .measure import BlockMeasures, Propagation, SidePathReads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LONGEST_LABEL = 12


def _axes(title: str, below: str, beside: str, width: float = 6.4) -> tuple[Figure, Axes]:
    figure = make_figure(width, 4.0)
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    return figure, axes


def _finish(figure: Figure, axes: Axes) -> None:
    """Place the legend off the data, and number blocks and slots by whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(loc="outside lower center", ncols=2)


def plot_blocks(blocks: Sequence[BlockMeasures]) -> Figure:
    """Draw, block by block, the residual stream and the changes that LoRA weights and side path make to it.

    Args:
        blocks: Returned by `measure_blocks`.

    Returns:
        The figure; `figure.savefig(file)` writes it.

    Examples:
        >>> plot_blocks(measure_blocks(model, inputs)).savefig("blocks.png")
    """
    figure, axes = _axes("Changes of the residual stream", "block", "mean norm")
    indices = [measure.block for measure in blocks]
    for name, label in (
        ("hidden_norm", "the stream"),
        ("low_rank_norm", "changed by the LoRA weights"),
        ("side_path_norm", "changed by the side path"),
    ):
        values = [getattr(measure, name) for measure in blocks]
        # A logarithmic axis has no place for zero: blocks before the first side path.
        shown = [(index, value) for index, value in zip(indices, values, strict=True) if value > 0]
        axes.plot([index for index, _ in shown], [value for _, value in shown], marker="o", label=label)
    written = [(measure.block, measure.written_norm) for measure in blocks if measure.written_norm]
    axes.plot([block for block, _ in written], [length for _, length in written], "k*", ms=12, label="written there")
    axes.set_yscale("log")
    _finish(figure, axes)
    return figure


def plot_propagation(propagations: Sequence[Propagation]) -> Figure:
    """Draw how the perturbation of each side path grows or fades through the later blocks.

    Args:
        propagations: Returned by `measure_propagation`.

    Returns:
        The figure.

    Examples:
        >>> plot_propagation(measure_propagation(model, inputs)).savefig("propagation.png")
    """
    figure, axes = _axes("Amplification of a perturbation", "block", "|difference| / |written|")
    for source in sorted({item.source for item in propagations}):
        own = [item for item in propagations if item.source == source and item.amplification is not None]
        places, values = [item.block for item in own], [item.amplification or 0.0 for item in own]
        axes.plot(places, values, "o-", label=f"written at block {source}")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    _finish(figure, axes)
    return figure


def plot_slot_usage(reads: Sequence[SidePathReads]) -> Figure:
    """Draw the mean share of each slot in what tokens read.

    Args:
        reads: Returned by `measure_reads`.

    Returns:
        The figure.

    Examples:
        >>> plot_slot_usage(measure_reads(model, inputs)).savefig("slots.png")
    """
    figure, axes = _axes("Slot usage", "slot", "mean share")
    width = 0.8 / max(1, len(reads))
    for place, item in enumerate(reads):
        usage = item.slot_usage.tolist()
        places = [slot + place * width for slot in range(len(usage))]
        axes.bar(places, usage, width=width, label=f"block {item.block}, {item.adapter_name}")
    _finish(figure, axes)
    return figure


def plot_token_slots(reads: SidePathReads, tokens: Sequence[str] | None = None, row: int = 0) -> Figure:
    """Draw the map of tokens by slots: from which slots each token of a row reads.

    Args:
        reads: One item of `measure_reads`.
        tokens: The texts of the row's tokens, padding included. None: their numbers.
        row: The row of the batch. Default 0.

    Returns:
        The figure.

    Raises:
        ValueError: There is no such row, or the number of texts is not the row's number of tokens.

    Examples:
        >>> plot_token_slots(measure_reads(model, inputs)[0], tokens).savefig("tokens.png")
    """
    rows, length = reads.valid.shape
    if not 0 <= row < rows:
        raise refusal("row", row, f"the batch has {rows} rows")
    if tokens is not None and len(tokens) != length:
        raise ValueError(f"tokens: {len(tokens)} texts for {length} tokens; give one per token, padding included")
    real = reads.valid[row].nonzero().flatten().tolist()
    shares = reads.measures.slot_shares[row, real].float().T.tolist()
    title = f"Slots read at block {reads.block}, {reads.adapter_name}"
    figure, axes = _axes(title, "token", "slot", width=max(6.4, 0.22 * len(real)))
    image = axes.imshow(shares, aspect="auto", vmin=0.0, cmap="viridis")
    figure.colorbar(image, ax=axes, label="share")
    if tokens is not None:
        texts = [tokens[place].replace("$", r"\$")[:LONGEST_LABEL] for place in real]
        axes.set_xticks(range(len(real)), texts, rotation=90, fontsize=7)
    return figure
