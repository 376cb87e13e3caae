"""Tables and plots that rest on formulas, counts and the side path alone: roofline, growth, long context."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAUNCH_MICROSECONDS = 5.0
"""On paper: what one eager launch costs the host of a GPU, Python and dispatcher included."""
GRAPH_MICROSECONDS = 2.0
"""On paper: one tiny kernel inside a CUDA graph."""
BANDWIDTH = 3.35e12
"""On paper: bytes a second of one H100 SXM; the models' weights are in bfloat16."""
OPERATIONS_TARGET = 1.008
FUSED_KERNELS = 8
"""On paper: kernels of a compiled side path, two matrix products, two batched ones and what fuses around them."""


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _ratio(counts: dict[str, Any], name: str, other: str) -> str:
    return f"{counts[name]['dispatched'] / counts[other]['dispatched']:.4f}"


def _roofline(models: dict[str, Any], names: dict[str, str], table: Callable[..., str]) -> dict[str, str]:
    shares, work, operations, gpu = [], [], [], []
    for key, row in models.items():
        name, counts = names[key], row["dispatched"]
        for half, share in row["trainable"].items():
            verdicts = ["yes" if share["side_path"] <= 0.002 else "NO", "yes" if share["both_halves"] < 0.01 else "NO"]
            shares.append(
                [name, half, f"{share['side_path']:.3%}", f"{share['both_halves']:.3%}", " / ".join(verdicts)]
            )
        work.append(
            [
                name,
                f"{row['hidden_size']}",
                f"{row['blocks']}",
                f"{row['side_path_operations_decode'] / 1000000.0:.3f}",
                f"{row['block_operations'] / 1000000.0:.1f}",
                f"{row['operations_share']:.4%}",
                f"{row['side_path_bytes'] / 1000000.0:.2f}",
                f"{row['block_bytes'] / 1000000.0:.1f}",
                f"{row['bytes_share']:.4%}",
            ]
        )
        kept = f"{counts['kept']['dispatched'] / counts['base']['dispatched']:.4f}"
        for half, suffix in (("r=16, all linear layers", ""), ("PEFT's defaults (r=8, q and v)", ", q and v")):
            lora, talan = counts[f"lora{suffix}"], counts[f"talan{suffix}"]
            ratios = [talan[kind] / lora[kind] for kind in ("dispatched", "no_views", "profiler")]
            extra = f"+{talan['dispatched'] - lora['dispatched']}"
            verdict = "met" if ratios[0] <= OPERATIONS_TARGET else "missed"
            texts = [f"{ratio:.4f}" for ratio in ratios]
            bare = _ratio(counts, f"talan{suffix}, no mask", f"lora{suffix}, no mask")
            step = _ratio(counts, f"talan{suffix}, training", f"lora{suffix}, training")
            operations.append([name, half, str(lora["dispatched"]), extra, *texts, verdict, bare, step, kept])
        memory_seconds = row["token_bytes"] / BANDWIDTH
        kernels, more = counts["lora"]["no_views"], counts["talan"]["no_views"] - counts["lora"]["no_views"]
        eager = max(memory_seconds, kernels * LAUNCH_MICROSECONDS * 1e-6)
        graph = max(memory_seconds, kernels * GRAPH_MICROSECONDS * 1e-6)
        gpu.append(
            [
                name,
                f"{1000.0 * memory_seconds:.2f}",
                f"{1000.0 * eager:.1f}",
                f"{1 + more * LAUNCH_MICROSECONDS * 1e-06 / eager:.4f}",
                f"{1 + more * GRAPH_MICROSECONDS * 1e-06 / graph:.4f}",
                f"{1 + FUSED_KERNELS * GRAPH_MICROSECONDS * 1e-06 / memory_seconds:.4f}",
            ]
        )
    return {
        "parameters": table(["model", "low-rank half", "side path", "both halves", "<= 0.2% / < 1%"], shares),
        "roofline": table(
            [
                "model",
                "H",
                "blocks",
                "side path, MFLOP",
                "one block, MFLOP",
                "share of the model's",
                "side path, MB",
                "one block, MB",
                "share of the model's",
            ],
            work,
        ),
        "operations": table(
            [
                "model",
                "low-rank half",
                "LoRA",
                "TALAN",
                "TALAN / LoRA",
                "without views",
                "profiler",
                "<= 1.008",
                "no mask",
                "training step",
                "kept / base",
            ],
            operations,
        ),
        "gpu": table(
            [
                "model",
                "memory-bound, ms",
                "eager LoRA, ms",
                "eager, TALAN / LoRA",
                "CUDA graph, TALAN / LoRA",
                "compiled with a CUDA graph, kept / base",
            ],
            gpu,
        ),
    }


def _growth(stored: dict[str, Any], table: Callable[..., str]) -> str:
    rows = []
    for kind, title in (("passes", f"{stored['prefill']} tokens"), ("one_token", "one token")):
        for what, points in stored[kind].items():
            values = ", ".join(f"{point[what]}: {point['milliseconds']:.3f}" for point in points)
            rows.append([title if what != "tokens" else "T tokens", what, values])
    return table(["pass", "axis", "ms at each value"], rows)


def plot_side_path(folder: Path, file: Path) -> None:
    """Draw time, bytes and drift of one side path alone; what is not stored stays empty.

    Args:
        folder: Of the results.
        file: The SVG to write.
    """
    cost, long_context = _read(folder / "side_path_cost.json"), _read(folder / "long_context.json")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "peft_talan"
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2))
    points = cost.get("passes", {}).get("tokens", [])
    axes[0].loglog([p["tokens"] for p in points], [p["milliseconds"] for p in points], "o-")
    axes[0].set(xlabel="tokens of a pass", ylabel="ms", title="time of one side path")
    rows = long_context.get("prefill", {}).get("rows", [])
    axes[1].semilogx([r["tokens"] for r in rows], [r["peak_bytes_a_token_beyond_the_output"] for r in rows], "o-")
    axes[1].set(
        xlabel="tokens of a pass", ylabel="bytes a token", title="peak beyond input and output", ylim=(0, None)
    )
    along = long_context.get("drift", {}).get("along_the_way", [])
    for name, label in (("memory_error", "memory"), ("mean_error", "slot means"), ("written_error", "written back")):
        axes[2].loglog([r["tokens"] for r in along], [r[name] for r in along], "o-", markersize=3, label=label)
    axes[2].set(xlabel="decoded tokens", title="relative error after single steps")
    axes[2].legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def paper_tables(folder: Path, names: dict[str, str], table: Callable[..., str]) -> dict[str, str]:
    """All tables of this file that have stored results, by their names in the page.

    Args:
        folder: Of the results.
        names: The models' names in the tables.
        table: Makes a table of a header and rows.

    Returns:
        The tables.
    """
    roofline, cost = _read(folder / "roofline.json"), _read(folder / "side_path_cost.json")
    long_context = _read(folder / "long_context.json")
    tables = _roofline(roofline["models"], names, table) if roofline else {}
    if cost:
        tables["growth"] = _growth(cost, table)
    if "prefill" in long_context:
        tables["long prefill"] = table(
            ["tokens", "seconds", "peak, MiB", "of it beyond the output, bytes a token"],
            [
                [
                    str(row["tokens"]),
                    f"{row['seconds']:.3f}",
                    f"{row['peak_bytes'] / 2**20:.1f}",
                    f"{row['peak_bytes_a_token_beyond_the_output']:.0f}",
                ]
                for row in long_context["prefill"]["rows"]
            ],
        )
    if "drift" in long_context:
        kinds = ("memory_error", "mean_error", "written_error")
        tables["drift"] = table(
            ["decoded tokens", "memory", "slot means", "what is written"],
            [
                [str(row["tokens"]), *(f"{row[kind]:.1e}" for kind in kinds)]
                for row in long_context["drift"]["along_the_way"]
            ],
        )
    return tables
