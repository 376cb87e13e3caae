"""Tables and plots that rest on formulas, counts and the side path alone: roofline, growth, long context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conditions import NAMES
from pages import markdown
from runs import Row, read_json

LAUNCH = 5e-6
"""On paper: seconds that one eager launch costs the host of a GPU, Python and dispatcher included."""
GRAPH_KERNEL = 2e-6
"""On paper: seconds of one tiny kernel inside a CUDA graph."""
BANDWIDTH = 3.35e12
"""On paper: bytes per second of one H100 SXM; the models' weights are in bfloat16."""
OPERATIONS_TARGET = 1.008
FUSED_KERNELS = 8
"""On paper: kernels of a compiled side path, two matrix products, two batched ones and what fuses around them."""
Model = tuple[str, Row]
"""A model's name and what is known about it."""


def _ratio(counts: Row, name: str, other: str, kind: str = "dispatched") -> str:
    return f"{counts[name][kind] / counts[other][kind]:.4f}"


def _parameters(models: list[Model]) -> str:
    rows = []
    for name, row in models:
        for kind, share in row["trainable"].items():
            fits = ["yes" if share["side_path"] <= 0.002 else "NO", "yes" if share["both_halves"] < 0.01 else "NO"]
            rows.append([name, kind, f"{share['side_path']:.3%}", f"{share['both_halves']:.3%}", " / ".join(fits)])
    return markdown(["model", "low-rank adapter", "side path", "both together", "<= 0.2% / < 1%"], rows)


def _roofline(models: list[Model]) -> str:
    rows = [
        [
            name,
            row["hidden_size"],
            row["blocks"],
            f"{row['side_path_operations_decode'] / 1e6:.3f}",
            f"{row['block_operations'] / 1e6:.1f}",
            f"{row['operations_share']:.4%}",
            f"{row['side_path_bytes'] / 1e6:.2f}",
            f"{row['block_bytes'] / 1e6:.1f}",
            f"{row['bytes_share']:.4%}",
        ]
        for name, row in models
    ]
    share = "share of the model's"
    work, traffic = (["side path, " + unit, "one block, " + unit, share] for unit in ("MFLOP", "MB"))
    return markdown(["model", "H", "blocks", *work, *traffic], rows)


def _operations(models: list[Model]) -> str:
    rows = []
    for name, row in models:
        counts = row["dispatched"]
        for kind, suffix in (("r=16, all linear layers", ""), ("PEFT's defaults (r=8, q and v)", ", q and v")):
            lora, talan = f"lora{suffix}", f"talan{suffix}"
            number, more = counts[lora]["dispatched"], counts[talan]["dispatched"] - counts[lora]["dispatched"]
            ratios = [_ratio(counts, talan, lora, kind) for kind in ("dispatched", "no_views", "profiler")]
            verdict = "met" if (number + more) / number <= OPERATIONS_TARGET else "missed"
            others = [_ratio(counts, talan + what, lora + what) for what in (", no mask", ", training")]
            rows.append([name, kind, number, f"+{more}", *ratios, verdict, *others, _ratio(counts, "kept", "base")])
    heads = ("model", "low-rank adapter", "LoRA", "TALAN", "TALAN / LoRA", "without views", "profiler", "<= 1.008")
    return markdown([*heads, "no mask", "training step", "kept / base"], rows)


def _gpu(models: list[Model]) -> str:
    rows = []
    for name, row in models:
        memory, counts = row["token_bytes"] / BANDWIDTH, row["dispatched"]
        kernels, more = counts["lora"]["no_views"], counts["talan"]["no_views"] - counts["lora"]["no_views"]
        eager, graph = max(memory, kernels * LAUNCH), max(memory, kernels * GRAPH_KERNEL)
        surplus = (more * LAUNCH / eager, more * GRAPH_KERNEL / graph, FUSED_KERNELS * GRAPH_KERNEL / memory)
        rows.append([name, f"{1e3 * memory:.2f}", f"{1e3 * eager:.1f}", *(f"{1 + share:.4f}" for share in surplus)])
    heads = ("model", "memory-bound, ms", "eager LoRA, ms", "eager, TALAN / LoRA", "CUDA graph, TALAN / LoRA")
    return markdown([*heads, "compiled with a CUDA graph, kept / base"], rows)


def _growth(stored: Row) -> str:
    rows = []
    for kind, title in (("passes", f"{stored['prefill']} tokens"), ("one_token", "one token")):
        for what, points in stored[kind].items():
            values = ", ".join(f"{point[what]}: {point['milliseconds']:.3f}" for point in points)
            rows.append([title, what, values])
    return markdown(["pass", "axis", "ms at each value"], rows)


def _side_path_lengths(rows: list[Row]) -> str:
    measured = {"us a token": "microseconds_a_token", "peak bytes a token": "peak_bytes_a_token"}
    columns = [(call, title) for call in ("prefill", "training step") for title in measured]
    cells = [[row["tokens"], *(f"{row[call][measured[title]]:.4g}" for call, title in columns)] for row in rows]
    return markdown(["tokens", *(f"{call}, {title}" for call, title in columns)], cells)


def _drift(rows: list[Row]) -> str:
    errors = [[f"{row[kind]:.1e}" for kind in ("memory_error", "mean_error", "written_error")] for row in rows]
    lines = [[row["tokens"], *cells] for row, cells in zip(rows, errors, strict=True)]
    return markdown(["decoded tokens", "memory", "slot means", "what is written"], lines)


@contextmanager
def drawn(file: Path, *grid: int, figsize: tuple[float, float]) -> Iterator[Any]:
    """The axes of a picture that is written as SVG afterwards, equal axes as equal bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "peft_talan"
    figure, axes = pyplot.subplots(*grid, figsize=figsize)
    yield axes
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def plot_side_path(folder: Path, file: Path) -> None:
    """Draw time, bytes and drift of one side path alone; what is not stored stays empty."""
    long_context = read_json(folder / "long_context.json")
    with drawn(file, 1, 3, figsize=(11, 3.2)) as axes:
        rows = long_context.get("lengths", {}).get("rows", [])
        shown = {"microseconds_a_token": "us a token", "peak_bytes_a_token": "peak bytes a token"}
        for what, (measure, title) in zip(axes[:2], shown.items(), strict=True):
            for call in ("prefill", "training step"):
                what.semilogx([r["tokens"] for r in rows], [r[call][measure] for r in rows], "o-", label=call)
            what.set(xlabel="tokens", title=f"one side path, {title}", ylim=(0, None))
            what.legend()
        along = long_context.get("drift", {}).get("along_the_way", [])
        labels = {"memory_error": "memory", "mean_error": "slot means", "written_error": "written back"}
        for name, label in labels.items():
            axes[2].loglog([r["tokens"] for r in along], [r[name] for r in along], "o-", markersize=3, label=label)
        axes[2].set(xlabel="decoded tokens", title="relative error after single steps")
        axes[2].legend()


def paper_tables(folder: Path) -> dict[str, str]:
    """All tables of this file that have stored results, by their names in the page."""
    tables = {}
    if roofline := read_json(folder / "roofline.json"):
        models = [(NAMES[key], row) for key, row in roofline["models"].items()]
        makers = {"parameters": _parameters, "roofline": _roofline, "operations": _operations, "gpu": _gpu}
        tables = {name: make(models) for name, make in makers.items()}
    if cost := read_json(folder / "side_path_cost.json"):
        tables["growth"] = _growth(cost)
    long_context = read_json(folder / "long_context.json")
    if "lengths" in long_context:
        tables["side path lengths"] = _side_path_lengths(long_context["lengths"]["rows"])
    if "drift" in long_context:
        tables["drift"] = _drift(long_context["drift"]["along_the_way"])
    return tables
