"""Tables and plots of the stored results, for the terminal and for docs/performance.md; called by `--report`."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path

from answer_tables import answer, blocks_table, half_precision, lengths_table, limit_table
from overhead_lines import (
    NOT_MEASURED,
    Cell,
    call_of,
    latest,
    matching,
    milliseconds_text,
    ratio_text,
    size,
    where,
)
from pages import columns_table, filled, markdown, show
from paper_tables import drawn, paper_tables, plot_side_path
from runs import Row, read_lines

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "performance.md"
TARGETS: dict[str, float] = {"prefill": 1.005, "decode": 1.005, "train": 1.02, "attach": 1.05, "load": 1.05}
KEPT_TARGET, MEMORY_TARGET = 1.01, 1.01
TALAN = ["talan", "lora again", "talan, 8 blocks", "talan, all blocks"]
KEPT = ["kept", "merged", "lora"]
TITLES = {
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


def timing_table(lines: list[Row], measure: str, group: str, compiled: bool = False) -> str:
    """Times and ratios of one kind of call."""
    found = [line for line in matching(lines, measure=measure, group=group, compile=compiled) if "ratios" in line]
    shown = {"lora": [*TALAN, *KEPT], "dora": ["dora + talan", "dora again"]}[group]
    shown = [name for name in shown if any(name in line["ratios"] for line in found)]
    found = [line for line in found if any(name in line["ratios"] for name in shown)]
    if not found:
        return NOT_MEASURED
    rows = []
    for line in found:
        turns = len(next(iter(line["times"].values())))
        ratios = [ratio_text(line, name) for name in shown]
        rows.append([where(line), *size(line), turns, milliseconds_text(line, group), *ratios])
    sizes = ["batch", "context"] if measure == "decode" else ["T"]
    time = f"{'LoRA' if group == 'lora' else 'DoRA'}, ms"
    return markdown(["model", *sizes, "turns", time, *(TITLES[name] for name in shown)], rows)


def attach_table(lines: list[Row]) -> str:
    """Attaching and loading."""
    columns: dict[str, Cell] = {
        "model": where,
        "what": lambda line: line["key"]["measure"],
        "LoRA, ms": lambda line: milliseconds_text(line, "lora"),
        **{TITLES[name]: partial(ratio_text, name=name) for name in TALAN[:2]},
    }
    return columns_table(columns, (line for line in lines if line["key"]["measure"] in ("attach", "load")))


def memory_table(lines: list[Row]) -> str:
    """Peak and sum of the allocated bytes."""
    rows = []
    for line in lines:
        memory = line.get("memory", {}) if line["key"].get("group") != "lengths" else {}  # It has its own table.
        for name, other in (("talan", "lora"), ("dora + talan", "dora"), ("kept", "base")):
            if name in memory and other in memory:
                ours, theirs = memory[name], memory[other]
                peaks = f"{theirs['peak'] / 2**20:.2f}", f"{ours['peak'] / theirs['peak']:.4f}"
                sums = f"{theirs['allocated'] / 2**20:.1f}", f"{ours['allocated'] / theirs['allocated']:.4f}"
                rows.append([where(line), call_of(line), f"{name} / {other}", *peaks, *sums])
    header = ["model", "call", "conditions", "peak, MiB", "ratio of peaks", "allocated in all, MiB", "ratio"]
    return markdown(header, rows) if rows else NOT_MEASURED


def verdicts(lines: list[Row]) -> str:
    """Each target beside what was measured."""
    rows: list[list[str]] = []

    def add(what: str, target: float, line: Row, name: str, noise: str) -> None:
        if line["key"]["compile"] or name not in line["ratios"]:
            return
        ratio = line["ratios"][name]
        verdict = "met" if ratio["median"] <= target else "missed"
        if ratio["low"] <= target < ratio["high"]:
            verdict = "inconclusive"
        rows.append([what, where(line), f"{target}", ratio_text(line, name), ratio_text(line, noise), verdict])

    for line in lines:
        key, measure = line["key"], line["key"]["measure"]
        if "ratios" not in line or key.get("group", "lora") not in ("lora", "blocks"):
            continue
        call = f"{measure}, T={key['tokens']}" if "tokens" in key else measure
        if measure == "decode":
            call = f"decode, batch {key['batch']}, context {key['context']}"
            add(f"kept, {call}", KEPT_TARGET, line, "kept", "merged")
        add(call, TARGETS[measure], line, "talan", "lora again")
    for line in lines:
        memory = line.get("memory", {})
        if "talan" in memory and "lora" in memory:
            ratio = memory["talan"]["peak"] / memory["lora"]["peak"]
            verdict = "met" if ratio <= MEMORY_TARGET else "missed"
            call = f"peak memory, {call_of(line)}"
            rows.append([call, where(line), f"{MEMORY_TARGET}", f"{ratio:.4f}", "exact", verdict])
    rows.sort(key=lambda row: (row[0].startswith("kept"), row[0]))
    counts = Counter(row[-1] for row in rows)
    text = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("met", "inconclusive", "missed"))
    table = markdown(["what", "model", "target, at most", "measured", "noise", "verdict"], rows)
    return f"Of {len(rows)} targets: {text}.\n\n{table}" if rows else NOT_MEASURED


def left_out(lines: list[Row]) -> str:
    """What was not measured, or with fewer conditions, and why."""
    rows = []
    for line in lines:
        key, names = line["key"], ", ".join(line.get("not_measured", ()))
        if "left_out" in line or names:
            call = f"{'compiled ' if key['compile'] else ''}{key['measure']} {key.get('group', '')}"
            why = line.get("left_out", "time or memory: see the script's limits")
            rows.append([where(line), call, " / ".join(size(line)), "all" if "left_out" in line else names, why])
    return markdown(["model", "call", "T, or batch / context", "left out", "why"], rows) if rows else "Nothing."


def provenance(lines: list[Row]) -> str:
    """The machine and the versions of the code behind the lines."""
    machines = sorted({json.dumps(line["machine"], sort_keys=True) for line in lines})
    texts = [", ".join(f"{name} {value}" for name, value in json.loads(text).items()) for text in machines]
    codes = Counter(line["code"] for line in lines)
    counts = ", ".join(f"{code} ({count} measurements)" for code, count in codes.items())
    return "\n".join(f"- {text}" for text in texts) + f"\n- digest of the package's sources: {counts}"


def compile_facts(lines: list[Row]) -> str:
    """Graphs and graph breaks."""
    columns: dict[str, Cell] = {
        "model": where,
        "call": call_of,
        "conditions": lambda line: str(len(line["times"])),
        "graphs in all": lambda line: line["graphs"],
        "graph breaks": lambda line: line["graph_breaks"],
    }
    found = [line for line in matching(lines, compile=True) if "graphs" in line]
    return columns_table(columns, found) if found else NOT_MEASURED


def plot(lines: list[Row], file: Path) -> None:
    """Every ratio of TALAN to LoRA with its interval, beside the noise of the same run."""
    timed = [line for line in lines if line["key"].get("group") != "lengths" and line["key"]["measure"] in TARGETS]
    found = [line for line in timed if "talan" in line.get("ratios", {})]
    with drawn(file, figsize=(8.5, 0.8 + 0.26 * len(found))) as axes:
        labels = []
        for row, line in enumerate(found):
            key = line["key"]
            compiled, sizes = "compiled, " if key["compile"] else "", " / ".join(size(line)) if "group" in key else ""
            labels.append(f"{compiled}{where(line)}, {key['measure']} {sizes}")
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


def all_tables(results: Path) -> dict[str, str]:
    """The page's tables, by their names, from the stored lines and what is stored beside them."""
    lines = latest(read_lines(results))
    return {
        "answer": answer(lines, results.parent),
        "blocks": blocks_table(lines, results.parent),
        "lengths": lengths_table(lines),
        "half precision": half_precision(lines),
        "limit": limit_table(lines, results.parent),
        "targets": verdicts(lines),
        "attach": attach_table(lines),
        "memory": memory_table(lines),
        "compiled decode": timing_table(lines, "decode", "lora", compiled=True),
        "compiled graphs": compile_facts(lines),
        "left out": left_out(lines),
        "provenance": provenance(lines),
        **paper_tables(results.parent),
    }


def report(results: Path) -> None:
    """Print the tables of the stored lines, and write tables and plots into the docs."""
    tables = all_tables(results)
    show(tables)
    plot(latest(read_lines(results)), results.parent / "overhead.svg")
    plot_side_path(results.parent, results.parent / "side_path.svg")
    for name in ("overhead", "side_path"):
        (DOCS / f"performance_{name}.svg").write_bytes((results.parent / f"{name}.svg").read_bytes())
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")
