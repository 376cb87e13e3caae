"""Tables and plots of the stored results, for the terminal and for docs/performance.md; called by `--report`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conditions import SHAPES
from measure import read_lines
from pages import filled
from paper_tables import paper_tables, plot_side_path

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "performance.md"
TARGETS: dict[str, float] = {"prefill": 1.005, "decode": 1.005, "train": 1.02, "attach": 1.05, "load": 1.05}
KEPT_TARGET, MEMORY_TARGET = 1.01, 1.01
TALAN = ["talan", "lora again", "talan, 8 blocks", "talan, all blocks"]
KEPT = ["kept", "merged", "lora"]
NAMES = {
    "smollm2": "SmolLM2-135M",
    "qwen3-0.6b": "Qwen3-0.6B shape",
    "qwen3-1.7b": "Qwen3-1.7B shape",
    "llama-3.2-1b": "Llama-3.2-1B shape",
    "llama-3.1-8b": "Llama-3.1-8B shape",
    "llama-3.1-70b": "Llama-3.1-70B shape",
}
Line = dict[str, Any]


def latest(lines: Iterable[Line]) -> list[Line]:
    """The last line of each measurement, in the order of their keys."""
    by_key = {json.dumps(line["key"], sort_keys=True): line for line in lines}
    order = {name: place for place, name in enumerate(NAMES)}

    def place(line: Line) -> tuple[Any, ...]:
        key = line["key"]
        sizes = (key.get("batch", 0), key.get("context", 0), key.get("tokens", 0))
        return (order[key["model"]], key["dtype"] != "float32", key.get("group", ""), *sizes)

    return sorted(by_key.values(), key=place)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def ratio_text(line: Line, name: str) -> str:
    """A ratio with its interval."""
    ratio = line["ratios"].get(name)
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio else "-"


def milliseconds_text(line: Line, name: str) -> str:
    """A median."""
    value = line["milliseconds"].get(name)
    return f"{value:.1f}" if value is not None else "-"


def where(line: Line) -> str:
    """Model and dtype."""
    cut = f", first {line['key']['blocks']} blocks" if "blocks" in line["key"] else ""
    return f"{NAMES[line['key']['model']]}{cut}, {line['key']['dtype']}"


def size(line: Line) -> list[str]:
    """The columns that say how large the call was."""
    key = line["key"]
    return [str(key["batch"]), str(key["context"])] if "batch" in key else [str(key["tokens"])]


def timing_table(lines: list[Line], measure: str, group: str, compiled: bool, names: list[str] | None = None) -> str:
    """Times and ratios of one kind of call; `names`: of the conditions to show, all by default."""
    found = [
        line
        for line in lines
        if line["key"]["measure"] == measure
        and line["key"].get("group") == group
        and line["key"]["compile"] == compiled
        and "ratios" in line
    ]
    if not found:
        return "Not measured."
    columns = names or {"lora": [*TALAN, *KEPT], "dora": ["dora + talan", "dora again"]}[group]
    columns = [name for name in columns if any(name in line["ratios"] for line in found)]
    found = [line for line in found if any(name in line["ratios"] for name in columns)]
    titles = {
        "talan": "TALAN / LoRA",
        "lora again": "LoRA / LoRA (noise)",
        "talan, 8 blocks": "TALAN, 8 blocks / LoRA",
        "talan, all blocks": "TALAN, all blocks / LoRA",
        "kept": "kept / base",
        "merged": "merged LoRA / base (noise)",
        "lora": "LoRA / base",
        "dora + talan": "DoRA + TALAN / DoRA",
        "dora again": "DoRA / DoRA (noise)",
    }
    sizes = ["batch", "context"] if measure == "decode" else ["T"]
    header = ["model", *sizes, "turns", f"{'LoRA' if group == 'lora' else 'DoRA'}, ms"]
    rows = []
    for line in found:
        turns = str(len(next(iter(line["times"].values()))))
        cells = [where(line), *size(line), turns, milliseconds_text(line, group)]
        rows.append(cells + [ratio_text(line, name) for name in columns])
    return markdown(header + [titles[name] for name in columns], rows)


def attach_table(lines: list[Line]) -> str:
    """Attaching and loading."""
    found = [line for line in lines if line["key"]["measure"] in ("attach", "load")]
    rows = [
        [
            where(line),
            line["key"]["measure"],
            milliseconds_text(line, "lora"),
            ratio_text(line, "talan"),
            ratio_text(line, "lora again"),
        ]
        for line in found
    ]
    return markdown(["model", "what", "LoRA, ms", "TALAN / LoRA", "LoRA / LoRA (noise)"], rows)


def memory_table(lines: list[Line]) -> str:
    """Peak and sum of the allocated bytes."""
    rows = []
    for line in lines:
        memory = line.get("memory", {})
        for name, other in (("talan", "lora"), ("dora + talan", "dora"), ("kept", "base")):
            if name in memory and other in memory:
                ours, theirs = memory[name], memory[other]
                call = f"{line['key']['measure']} {' / '.join(size(line))}"
                peaks = f"{theirs['peak'] / 2**20:.2f}"
                rows.append(
                    [
                        where(line),
                        call,
                        f"{name} / {other}",
                        peaks,
                        f"{ours['peak'] / theirs['peak']:.4f}",
                        f"{theirs['allocated'] / 2**20:.1f}",
                        f"{ours['allocated'] / theirs['allocated']:.4f}",
                    ]
                )
    header = ["model", "call", "conditions", "peak, MiB", "ratio of peaks", "allocated in all, MiB", "ratio"]
    return markdown(header, rows) if rows else "Not measured."


def answer(lines: list[Line], folder: Path) -> str:
    """What a user pays beside LoRA, with a side path in one block, in eight and in all: a sentence and a table."""
    stored = json.loads((folder / "roofline.json").read_text(encoding="utf-8"))["models"]["smollm2"]
    columns = {"talan": 1, "talan, 8 blocks": 8, "talan, all blocks": stored["blocks"]}
    keys: dict[str, dict[str, Any]] = {
        "prefill, 512 tokens": {"measure": "prefill", "tokens": 512},
        "decoded token, context 128": {"measure": "decode", "batch": 1, "context": 128},
        "training step, 512 tokens": {"measure": "train", "tokens": 512},
    }
    shared = {"model": "smollm2", "dtype": "float32", "compile": False}
    calls: dict[str, Line] = {}
    shares: dict[str, float] | None = None
    for line in lines:
        for name, key in keys.items():
            if {**shared, "group": "lora", **key}.items() <= line["key"].items():
                calls[name] = line
        if {**shared, "measure": "parameters"}.items() <= line["key"].items():
            shares = line["shares"]
    if shares is None or set(calls) < set(keys):
        return "Not measured."
    rows = [[f"{name}: time", *(ratio_text(calls[name], column) for column in columns)] for name in keys]
    last = [*keys][-1]
    memory = calls[last].get("memory", {})
    peaks = {column: memory[column]["peak"] / memory["lora"]["peak"] for column in columns if column in memory}
    rows.append([f"{last}: peak memory", *(f"{peaks[column]:.3f}" if column in peaks else "-" for column in columns)])
    counts = {name: count["dispatched"] for name, count in stored["dispatched"].items()}
    further = (counts["talan, all blocks"] - counts["talan"]) / (stored["blocks"] - 1)
    totals = [counts["talan"] + (blocks - 1) * further for blocks in columns.values()]
    rows.append(["decoded token: operations", *(f"{total / counts['lora']:.3f}" for total in totals)])
    more = shares["side path"] / shares["lora"]
    rows.append(["trainable parameters", *(f"{1 + blocks * more:.3f}" for blocks in columns.values())])
    rows = [[cell if cell != "-" else "not measured" for cell in row] for row in rows]
    ratios = [calls[name]["ratios"]["talan"] for name in keys]
    prefill, decode, train = (f"{ratio['median']:.3f}" for ratio in ratios)
    told_apart = any(not ratio["low"] <= 1.0 <= ratio["high"] for ratio in ratios)
    sentence = (
        f"**With the default side path, prefill takes {prefill}, a decoded token {decode} and a training step {train} "
        f"times as long as with LoRA alone{'' if told_apart else ', which this machine can not tell from 1'}.**"
    )
    codes = sorted({line["code"] for line in calls.values()})
    return (
        sentence
        + "\n\n"
        + markdown(["LoRA = 1", "one block (default)", "8 blocks", f"all {stored['blocks']} blocks"], rows)
        + "\n\nSmolLM2-135M, float32, one thread of a processor; the sources that were timed have the digest "
        + ", ".join(f"`{code}`" for code in codes)
        + "."
    )


def verdicts(lines: list[Line]) -> str:
    """Each target beside what was measured."""
    rows: list[list[str]] = []

    def add(what: str, target: float, line: Line, name: str, noise: str) -> None:
        if line["key"]["compile"] or name not in line["ratios"]:
            return
        ratio = line["ratios"][name]
        verdict = "met" if ratio["median"] <= target else "missed"
        if ratio["low"] <= target < ratio["high"]:
            verdict = "inconclusive"
        rows.append([what, where(line), f"{target}", ratio_text(line, name), ratio_text(line, noise), verdict])

    for line in lines:
        key = line["key"]
        if "ratios" not in line or key.get("group") == "dora":
            continue
        if key["measure"] == "decode":
            call = f"decode, batch {key['batch']}, context {key['context']}"
            add(call, TARGETS["decode"], line, "talan", "lora again")
            add(f"kept, {call}", KEPT_TARGET, line, "kept", "merged")
        else:
            sizes = f", T={key['tokens']}" if "tokens" in key else ""
            add(f"{key['measure']}{sizes}", TARGETS[key["measure"]], line, "talan", "lora again")
    for line in lines:
        memory = line.get("memory", {})
        if "talan" in memory and "lora" in memory:
            ratio = memory["talan"]["peak"] / memory["lora"]["peak"]
            verdict = "met" if ratio <= MEMORY_TARGET else "missed"
            call = f"peak memory, {line['key']['measure']} {' / '.join(size(line))}"
            rows.append([call, where(line), f"{MEMORY_TARGET}", f"{ratio:.4f}", "exact", verdict])
    rows.sort(key=lambda row: (row[0].startswith("kept"), row[0]))
    found = [row[-1] for row in rows]
    counts = ", ".join(f"{found.count(verdict)} {verdict}" for verdict in ("met", "inconclusive", "missed"))
    table = markdown(["what", "model", "target, at most", "measured", "noise", "verdict"], rows)
    return f"Of {len(rows)} targets: {counts}.\n\n{table}" if rows else "Not measured."


def left_out(lines: list[Line]) -> str:
    """What was not measured, or with fewer conditions, and why."""
    rows = []
    for line in lines:
        key = line["key"]
        call = f"{'compiled ' if key['compile'] else ''}{key['measure']} {key.get('group', '')}"
        if "left_out" in line:
            rows.append([where(line), call, " / ".join(size(line)), "all", line["left_out"]])
        elif line.get("not_measured"):
            names = ", ".join(line["not_measured"])
            rows.append([where(line), call, " / ".join(size(line)), names, "time or memory: see the script's limits"])
    return markdown(["model", "call", "T, or batch / context", "left out", "why"], rows) if rows else "Nothing."


def provenance(lines: list[Line]) -> str:
    """The machine and the versions of the code behind the lines."""
    machines = {json.dumps(line["machine"], sort_keys=True) for line in lines}
    codes: dict[str, int] = {}
    for line in lines:
        codes[line["code"]] = codes.get(line["code"], 0) + 1
    texts = []
    for text in sorted(machines):
        facts = json.loads(text)
        texts.append(", ".join(f"{name} {value}" for name, value in facts.items()))
    counts = ", ".join(f"{code} ({count} measurements)" for code, count in codes.items())
    return "\n".join(f"- {text}" for text in texts) + f"\n- digest of the package's sources: {counts}"


def prefill_bounds(lines: list[Line], folder: Path) -> str:
    """The most that a side path can add to longer prefills: its own time beside LoRA's of 512 tokens, scaled."""
    stored = folder / "side_path_cost.json"
    cost = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {"grid": []}
    widths = {"smollm2": 576, **{name: config.hidden_size for name, config in SHAPES.items()}}
    rows = []
    for line in lines:
        key = line["key"]
        if (
            key["measure"] != "prefill"
            or key["tokens"] != 512
            or key["compile"]
            or "lora" not in line.get("times", {})
        ):
            continue
        for point in cost["grid"]:
            if point["hidden_size"] == widths[key["model"]]:
                least = line["milliseconds"]["lora"] * point["tokens"] / 512
                share = f"<= {1 + point['milliseconds'] / least:.4f}"
                rows.append([where(line), str(point["tokens"]), f"{point['milliseconds']:.1f}", f"{least:.0f}", share])
    header = ["model", "T", "side path alone, ms", "LoRA at least, ms", "TALAN / LoRA"]
    return markdown(header, rows) if rows else "Not measured."


def compile_facts(lines: list[Line]) -> str:
    """Graphs and graph breaks."""
    found = [line for line in lines if line["key"]["compile"] and "graphs" in line]
    rows = [
        [
            where(line),
            f"{line['key']['measure']} {' / '.join(size(line))}",
            str(len(line["times"])),
            str(line["graphs"]),
            str(line["graph_breaks"]),
        ]
        for line in found
    ]
    return (
        markdown(["model", "call", "conditions", "graphs in all", "graph breaks"], rows) if rows else "Not measured."
    )


def plot(lines: list[Line], file: Path) -> None:
    """Every ratio of TALAN to LoRA with its interval, beside the noise of the same run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "peft_talan"
    found = [line for line in lines if "talan" in line.get("ratios", {}) and line["key"]["measure"] in TARGETS]
    figure, axes = pyplot.subplots(figsize=(8.5, 0.8 + 0.26 * len(found)))
    labels = []
    for row, line in enumerate(found):
        key = line["key"]
        labels.append(
            f"{'compiled, ' if key['compile'] else ''}{where(line)}, {key['measure']} "
            + (" / ".join(size(line)) if "group" in key else "")
        )
        for name, colour, shift in (("talan", "tab:blue", -0.12), ("lora again", "tab:grey", 0.18)):
            ratio = line["ratios"].get(name)
            if ratio:
                axes.plot([ratio["low"], ratio["high"]], [row + shift] * 2, color=colour, linewidth=1.5)
                axes.plot(ratio["median"], row + shift, "o", color=colour, markersize=3.5)
        axes.plot([TARGETS[key["measure"]]] * 2, [row - 0.4, row + 0.4], color="tab:red", linewidth=1)
    axes.axvline(1.0, color="black", linewidth=0.6)
    axes.set(xlim=(0.97, 1.06), xlabel="time / LoRA's (blue: TALAN, grey: LoRA again, red: target)")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def all_tables(results: Path) -> dict[str, str]:
    """The page's tables, by their names, from the stored lines and what is stored beside them."""
    lines = latest(read_lines(results))
    return {
        "answer": answer(lines, results.parent),
        "targets": verdicts(lines),
        "decode": timing_table(lines, "decode", "lora", compiled=False, names=TALAN),
        "decode kept": timing_table(lines, "decode", "lora", compiled=False, names=KEPT),
        "decode dora": timing_table(lines, "decode", "dora", compiled=False),
        "prefill": timing_table(lines, "prefill", "lora", compiled=False),
        "prefill bounds": prefill_bounds(lines, results.parent),
        "prefill dora": timing_table(lines, "prefill", "dora", compiled=False),
        "train": timing_table(lines, "train", "lora", compiled=False),
        "train dora": timing_table(lines, "train", "dora", compiled=False),
        "attach": attach_table(lines),
        "memory": memory_table(lines),
        "compiled decode": timing_table(lines, "decode", "lora", compiled=True),
        "compiled prefill": timing_table(lines, "prefill", "lora", compiled=True),
        "compiled graphs": compile_facts(lines),
        "left out": left_out(lines),
        "provenance": provenance(lines),
        **paper_tables(results.parent, NAMES, markdown),
    }


def report(results: Path) -> None:
    """Print the tables, and write tables and plots into the docs.

    Args:
        results: The stored lines.
    """
    tables = all_tables(results)
    for name, table in tables.items():
        print(f"\n{name}\n{table}")
    plot(latest(read_lines(results)), results.parent / "overhead.svg")
    plot_side_path(results.parent, results.parent / "side_path.svg")
    for name in ("overhead", "side_path"):
        if (results.parent / f"{name}.svg").exists():
            (DOCS / f"performance_{name}.svg").write_bytes((results.parent / f"{name}.svg").read_bytes())
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")
