"""What a user pays: the default, long contexts, blocks, lengths of texts, half precision; and the least there is."""

from __future__ import annotations

from pathlib import Path

from conditions import SPREAD
from overhead_lines import NOT_MEASURED, matching, ratio_text, where
from pages import markdown
from runs import Row, read_json, read_lines
from runs import matching as runs_with

from peft_talan.axes import RECALL_AXES, RECALL_DEPTHS

CALLS = {
    "prefill, 128 tokens": {"measure": "prefill", "tokens": 128},
    "decoded token, context 128": {"measure": "decode", "batch": 1, "context": 128},
    "training step, 128 tokens": {"measure": "train", "tokens": 128},
}
CONDITIONS = {"None": "talan", **{layers: f"talan, {layers}" for layers in SPREAD}, "all": "talan, all blocks"}
"""Values of `talan_layers`, and the conditions that have them."""
TRAINING, NOISE = [*CALLS][-1], "lora again"
RECALL = "talan, recall"
RECALL_VALUE = f"`'recall'`, with `{RECALL_AXES['talan_mixer']}` and `{RECALL_AXES['talan_writeback']}`"
"""The condition of the configuration for recall, and how the tables call it."""


def number_of_blocks(layers: str, depth: int) -> int:
    """How many blocks of a model a value of `talan_layers` means."""
    if layers in ("None", "all"):
        return 1 if layers == "None" else depth
    return depth // int(layers.removeprefix("every_"))


def _timed(lines: list[Row], group: str = "blocks") -> dict[str, Row]:
    """The last line of each call that was measured with the conditions of a group side by side."""
    of_model = matching(lines, model="smollm2", dtype="float32", compile=False, group=group)
    found = {name: [line for line in matching(of_model, **key) if "ratios" in line] for name, key in CALLS.items()}
    return {name: lines_of_call[-1] for name, lines_of_call in found.items() if lines_of_call}


def _time(line: Row | None, name: str) -> str:
    return ratio_text(line, name) if line is not None and name in line["ratios"] else "not measured"


def _exact(lines: list[Row], folder: Path) -> tuple[int, dict[str, float], float]:
    """The model's depth, its dispatched operations, and a side path's parameters as a share of LoRA's."""
    stored = read_json(folder / "roofline.json")["models"]["smollm2"]
    counts = {name: count["dispatched"] for name, count in stored["dispatched"].items()}
    shares = matching(lines, measure="parameters", model="smollm2")[-1]["shares"]
    return stored["blocks"], counts, shares["side path"] / shares["lora"]


def _rows(lines: list[Row], folder: Path, choices: list[str]) -> list[list[str]]:
    """What each choice costs beside LoRA: times, memory, operations, parameters; a row for each choice."""
    timed = _timed(lines)
    depth, counts, share = _exact(lines, folder)
    further = (counts["talan, all blocks"] - counts["talan"]) / (depth - 1)
    rows = []
    for layers in choices:
        name, blocks = CONDITIONS[layers], number_of_blocks(layers, depth)
        times = [_time(timed.get(call), name) for call in CALLS]
        memory = timed.get(TRAINING, {}).get("memory", {})
        peak = f"{memory[name]['peak'] / memory['lora']['peak']:.3f}" if name in memory else "not measured"
        operations = f"{(counts['talan'] + (blocks - 1) * further) / counts['lora']:.3f}"
        rows.append([f"`{layers!r}`".replace("'None'", "None"), str(blocks), *times, peak, operations])
        rows[-1] += [f"{1 + blocks * share:.3f}", "-"]
    return rows


def right_at_ten_windows(folder: Path) -> str:
    """The right answers of the runs of `peft-talan train --window` on mixed facts, with the start for recall."""
    stored = read_lines(folder / "memory_ordinary_rows.jsonl")
    told = {"facts": "mixed", "form": "prompt-completion", "arm": "TALAN", "start": "memory", "by_command": True}
    found = runs_with(stored, **told, axes=dict(RECALL_AXES))
    right = sorted({row["right"]["10"] for row in found})
    seeds = len({row["settings"]["seed"] for row in found})
    counts = " to ".join(map(str, dict.fromkeys((right[0], right[-1]))))
    return f"{counts} of {found[0]['settings']['rows']} ({seeds} seed{'s' if seeds > 1 else ''})"


def _recall_row(lines: list[Row], folder: Path) -> list[str]:
    """What the configuration for recall costs beside LoRA, in turns of its own."""
    timed = _timed(lines, "recall")
    shares = matching(lines, measure="parameters", model="smollm2")[-1]["shares"]
    memory = timed[TRAINING]["memory"]
    # At any context; every 64th token makes a record besides, so the fewest are what a token takes.
    decoded = [
        line["operations"] for line in matching(lines, group="recall", measure="decode") if "operations" in line
    ]
    exact = (
        memory[RECALL]["peak"] / memory["lora"]["peak"],
        min(counts[RECALL]["dispatched"] / counts["lora"]["dispatched"] for counts in decoded),
        shares[RECALL] / shares["lora"],
    )
    times = [_time(timed.get(call), RECALL) for call in CALLS]
    return [
        RECALL_VALUE,
        str(len(RECALL_DEPTHS)),
        *times,
        *(f"{ratio:.3f}" for ratio in exact),
        right_at_ten_windows(folder),
    ]


HEADS = [
    "`talan_layers`",
    "blocks",
    *(f"{name}: time" for name in CALLS),
    "training step: peak memory",
    "decoded token: operations",
    "trainable parameters",
    "right answers at ten windows",
]


def blocks_table(lines: list[Row], folder: Path) -> str:
    """What side paths cost by the number of blocks."""
    timed = _timed(lines)
    if not timed:
        return NOT_MEASURED
    noise, beside_recall = (
        [f"LoRA again (noise){of}", "0", *(_time(of_group.get(call), NOISE) for call in CALLS), *"----"]
        for of, of_group in (("", timed), (", beside `'recall'`", _timed(lines, "recall")))
    )
    recall = _recall_row(lines, folder)
    return markdown(HEADS, [*_rows(lines, folder, list(CONDITIONS)), noise, recall, beside_recall])


def answer(lines: list[Row], folder: Path) -> str:
    """One sentence and a small table: the default, and the configuration for long contexts."""
    timed = _timed(lines)
    if not timed:
        return NOT_MEASURED
    ratios = [line["ratios"][CONDITIONS["None"]] for line in timed.values()]
    noise = [line["ratios"][NOISE] for line in timed.values()]
    names = [call.partition(",")[0] for call in timed]
    takes = [
        f"{name if name == 'prefill' else f'a {name}'} takes {ratio['median']:.3f}"
        for name, ratio in zip(names, ratios, strict=True)
    ]
    said = " and ".join(filter(None, [", ".join(takes[:-1]), takes[-1]]))
    apart = any(ratio["low"] > other["high"] for ratio, other in zip(ratios, noise, strict=True))
    columns = [row[2:] for row in (*_rows(lines, folder, ["None"]), _recall_row(lines, folder))]
    rows = [list(row) for row in zip(HEADS[2:], *columns, strict=True)]
    heads = ["default: `talan_layers=None`", "long context: `talan_layers='recall'`"]
    line = next(iter(timed.values()))
    used = (*timed.values(), *_timed(lines, "recall").values())
    codes = ", ".join(f"`{code}`" for code in sorted({line["code"] for line in used}))
    return (
        f"**With the default side path, {said} times as long as with LoRA alone"
        + f"{'' if apart else ', no more than a second LoRA beside it varies'}.**\n\n"
        + markdown(["LoRA = 1", *heads], rows)
        + f"\n\nSmolLM2-135M, float32, one thread of a processor, {line['machine']['clock']}; the sources that were "
        + f"timed have the digest {codes}."
    )


def lengths_table(lines: list[Row]) -> str:
    """Times and peak memory of whole texts, by their length."""
    names = {"None": "talan", "'every_4'": "talan, every_4", "'all'": "talan, all blocks"}
    found = [line for line in matching(lines, group="lengths") if "ratios" in line]
    rows = []
    for line in sorted(found, key=lambda line: (line["key"]["measure"], line["key"]["tokens"])):
        call = "prefill" if line["key"]["measure"] == "prefill" else "training step, checkpointed"
        peaks = {name: allocated["peak"] for name, allocated in line["memory"].items()}
        turns = len(line["times"]["lora"])
        times = [ratio_text(line, name) for name in (*names.values(), NOISE)]
        if turns == 1:  # One turn has no interval.
            times = [time.partition(" ")[0] for time in times]
        ratios = [f"{peaks[name] / peaks['lora']:.4f}" if name in peaks else "-" for name in names.values()]
        least = f"{line['milliseconds']['lora'] / 1e3:.2f}", f"{peaks['lora'] / 2**20:.0f}"
        rows.append([call, str(line["key"]["tokens"]), str(turns), least[0], *times, least[1], *ratios])
    of_times, of_peaks = ([f"`{layers}`: {what}" for layers in names] for what in ("time", "peak"))
    heads = ["call", "tokens", "turns", "LoRA, s", *of_times, "LoRA again: time", "LoRA: peak, MiB", *of_peaks]
    return markdown(heads, rows) if rows else NOT_MEASURED


def half_precision(lines: list[Row]) -> str:
    """Models in bfloat16, by the dtype of their adapters."""
    names = {"talan": "one block / LoRA", "talan, all blocks": "all blocks / LoRA", NOISE: "LoRA / LoRA (noise)"}
    found = [line for line in matching(lines, model="qwen3-small", dtype="bfloat16") if "ratios" in line]
    rows = []
    for line in found:
        key = line["key"]
        call = f"training step, {key['tokens']} tokens" if key["measure"] == "train" else "decoded token"
        time = f"{line['milliseconds']['lora']:.1f}"
        rows.append([where(line), call, time, *(ratio_text(line, name) for name in names)])
    return markdown(["model", "call", "LoRA, ms", *names.values()], rows) if rows else NOT_MEASURED


def limit_table(lines: list[Row], folder: Path) -> str:
    """What one side path can't do without beside what it takes, on this machine and on paper."""
    stored, timed = read_json(folder / "limit.json"), _timed(lines)
    in_model = timed.get("decoded token, context 128")
    if not stored or in_model is None:
        return NOT_MEASURED
    here, there = stored["rates"], stored["h200"]
    depth, _, _ = _exact(lines, folder)
    times = in_model["times"]
    apart = sorted(a - b for a, b in zip(times["talan, all blocks"], times["lora"], strict=True))
    calls = dict(stored["calls"])
    inside = {**calls["decoded token"], "milliseconds": apart[len(apart) // 2] / depth}
    rows = []
    for name, call in {**calls, "decoded token, in the model": inside}.items():
        least, paper = (
            1e6 * max(call["operations"] / rates["operations a second"], call["bytes"] / rates["bytes a second"])
            for rates in (here, there)
        )
        took = 1e3 * call["milliseconds"]
        cells = [f"{call['operations'] / 1e6:.3f}", f"{call['bytes'] / 1e3:.0f}", f"{least:.0f}", f"{took:.0f}"]
        rows.append([name, *cells, f"{took / least:.1f}", str(call["kernels"]), f"{paper:.2f}", "1"])
    heads = ["call", "MFLOP needed", "kB needed", "limit here, us", "measured here, us", "measured / limit"]
    rates = f"{here['bytes a second'] / 1e9:.1f} GB/s and {here['operations a second'] / 1e9:.0f} GFLOP/s"
    return (
        markdown([*heads, "kernels", "limit of an H200 on paper, us", "kernels needed"], rows)
        + f"\n\nOne side path, H=576, float32; this machine's rates were {rates}."
    )
