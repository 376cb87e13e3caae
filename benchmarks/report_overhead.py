"""Tables and plots of the stored results, for the terminal and for docs/performance.md; called by `--report`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from conditions import NAMES, SHAPES
from measure import interval_text
from pages import columns_table, filled, markdown, show
from paper_tables import drawn, paper_tables, plot_side_path
from runs import Row, read_json, read_lines

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
NOT_MEASURED = "Not measured."
Cell = Callable[[Row], str]


def latest(lines: Iterable[Row]) -> list[Row]:
    """The last line of each measurement, in the order of their keys."""
    by_key = {json.dumps(line["key"], sort_keys=True): line for line in lines}
    order = list(NAMES)

    def place(line: Row) -> tuple[Any, ...]:
        key = line["key"]
        sizes = (key.get("batch", 0), key.get("context", 0), key.get("tokens", 0))
        return (order.index(key["model"]), key["dtype"] != "float32", key.get("group", ""), *sizes)

    return sorted(by_key.values(), key=place)


def ratio_text(line: Row, name: str) -> str:
    """A ratio with its interval."""
    ratio = line["ratios"].get(name)
    return interval_text(ratio, 3) if ratio else "-"


def milliseconds_text(line: Row, name: str) -> str:
    value = line["milliseconds"].get(name)
    return f"{value:.1f}" if value is not None else "-"


def where(line: Row) -> str:
    """Model and dtype."""
    cut = f", first {line['key']['blocks']} blocks" if "blocks" in line["key"] else ""
    return f"{NAMES[line['key']['model']]}{cut}, {line['key']['dtype']}"


def size(line: Row) -> list[str]:
    """The columns that say how large the call was."""
    key = line["key"]
    return [str(key["batch"]), str(key["context"])] if "batch" in key else [str(key["tokens"])]


def call_of(line: Row) -> str:
    return f"{line['key']['measure']} {' / '.join(size(line))}"


def matching(lines: Iterable[Row], **key: Any) -> list[Row]:
    """The lines whose keys have these values."""
    return [line for line in lines if key.items() <= line["key"].items()]


def timing_table(lines: list[Row], measure: str, group: str, compiled: bool = False, names: Sequence[str] = ()) -> str:
    """Times and ratios of one kind of call; `names`: of the conditions to show, all by default."""
    found = [line for line in matching(lines, measure=measure, group=group, compile=compiled) if "ratios" in line]
    shown = names or {"lora": [*TALAN, *KEPT], "dora": ["dora + talan", "dora again"]}[group]
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
        memory = line.get("memory", {})
        for name, other in (("talan", "lora"), ("dora + talan", "dora"), ("kept", "base")):
            if name in memory and other in memory:
                ours, theirs = memory[name], memory[other]
                peaks = f"{theirs['peak'] / 2**20:.2f}", f"{ours['peak'] / theirs['peak']:.4f}"
                sums = f"{theirs['allocated'] / 2**20:.1f}", f"{ours['allocated'] / theirs['allocated']:.4f}"
                rows.append([where(line), call_of(line), f"{name} / {other}", *peaks, *sums])
    header = ["model", "call", "conditions", "peak, MiB", "ratio of peaks", "allocated in all, MiB", "ratio"]
    return markdown(header, rows) if rows else NOT_MEASURED


def answer(lines: list[Row], folder: Path) -> str:
    """What a user pays beside LoRA, with a side path in one block, in eight and in all: a sentence and a table."""
    stored = read_json(folder / "roofline.json")["models"]["smollm2"]
    columns = {"talan": 1, "talan, 8 blocks": 8, "talan, all blocks": stored["blocks"]}
    keys: dict[str, dict[str, Any]] = {
        "prefill, 512 tokens": {"measure": "prefill", "tokens": 512},
        "decoded token, context 128": {"measure": "decode", "batch": 1, "context": 128},
        "training step, 512 tokens": {"measure": "train", "tokens": 512},
    }
    of_model = matching(lines, model="smollm2", dtype="float32", compile=False)
    found = {name: matching(of_model, group="lora", **key) for name, key in keys.items()}
    shares = [line["shares"] for line in matching(of_model, measure="parameters")]
    if not shares or not all(found.values()):
        return NOT_MEASURED
    calls = {name: lines_of_call[-1] for name, lines_of_call in found.items()}
    rows = [[f"{name}: time", *(ratio_text(call, column) for column in columns)] for name, call in calls.items()]
    last = [*keys][-1]
    memory = calls[last].get("memory", {})
    peaks = {column: memory[column]["peak"] / memory["lora"]["peak"] for column in columns if column in memory}
    rows.append([f"{last}: peak memory", *(f"{peaks[column]:.3f}" if column in peaks else "-" for column in columns)])
    counts = {name: count["dispatched"] for name, count in stored["dispatched"].items()}
    further = (counts["talan, all blocks"] - counts["talan"]) / (stored["blocks"] - 1)
    totals = [counts["talan"] + (blocks - 1) * further for blocks in columns.values()]
    rows.append(["decoded token: operations", *(f"{total / counts['lora']:.3f}" for total in totals)])
    more = shares[-1]["side path"] / shares[-1]["lora"]
    rows.append(["trainable parameters", *(f"{1 + blocks * more:.3f}" for blocks in columns.values())])
    rows = [[cell if cell != "-" else "not measured" for cell in row] for row in rows]
    ratios = [call["ratios"]["talan"] for call in calls.values()]
    prefill, decode, train = (f"{ratio['median']:.3f}" for ratio in ratios)
    within_noise = all(ratio["low"] <= 1.0 <= ratio["high"] for ratio in ratios)
    codes = ", ".join(f"`{code}`" for code in sorted({call["code"] for call in calls.values()}))
    return (
        f"**With the default side path, prefill takes {prefill}, a decoded token {decode} and a training step {train} "
        f"times as long as with LoRA alone{', which this machine can not tell from 1' if within_noise else ''}.**\n\n"
        + markdown(["LoRA = 1", "one block (default)", "8 blocks", f"all {stored['blocks']} blocks"], rows)
        + "\n\nSmolLM2-135M, float32, one thread of a processor; the sources that were timed have the digest "
        + f"{codes}."
    )


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
        if "ratios" not in line or key.get("group") == "dora":
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


def prefill_bounds(lines: list[Row], folder: Path) -> str:
    """The most that a side path can add to longer prefills: its own time beside LoRA's of 512 tokens, scaled."""
    grid = read_json(folder / "side_path_cost.json").get("grid", [])
    widths = {"smollm2": 576, **{name: config.hidden_size for name, config in SHAPES.items()}}
    rows = []
    for line in matching(lines, measure="prefill", tokens=512, compile=False):
        of_model = [point for point in grid if point["hidden_size"] == widths[line["key"]["model"]]]
        for point in of_model if "lora" in line.get("times", {}) else []:
            least = line["milliseconds"]["lora"] * point["tokens"] / 512
            share = f"<= {1 + point['milliseconds'] / least:.4f}"
            rows.append([where(line), point["tokens"], f"{point['milliseconds']:.1f}", f"{least:.0f}", share])
    header = ["model", "T", "side path alone, ms", "LoRA at least, ms", "TALAN / LoRA"]
    return markdown(header, rows) if rows else NOT_MEASURED


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
    found = [line for line in lines if "talan" in line.get("ratios", {}) and line["key"]["measure"] in TARGETS]
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
        "targets": verdicts(lines),
        "decode": timing_table(lines, "decode", "lora", names=TALAN),
        "decode kept": timing_table(lines, "decode", "lora", names=KEPT),
        "decode dora": timing_table(lines, "decode", "dora"),
        "prefill": timing_table(lines, "prefill", "lora"),
        "prefill bounds": prefill_bounds(lines, results.parent),
        "prefill dora": timing_table(lines, "prefill", "dora"),
        "train": timing_table(lines, "train", "lora"),
        "train dora": timing_table(lines, "train", "dora"),
        "attach": attach_table(lines),
        "memory": memory_table(lines),
        "compiled decode": timing_table(lines, "decode", "lora", compiled=True),
        "compiled prefill": timing_table(lines, "prefill", "lora", compiled=True),
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
