"""Makes the support matrix of the documentation from the results."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

OUTCOMES = ("right", "refused", "wrong", "crash", "LoRA fails", "not built")
HEAD = """# Model types

Every causal, image-text, sequence-to-sequence and encoder model type of transformers {transformers}, at tiny size
with random weights: plain LoRA, and a side path on the default block and on the first and last one. The table is made
by

```bash
python -m benchmarks.architectures           # runs what has no result yet
python -m benchmarks.architectures --report  # writes this page
```

The checks: the adapter attaches without help; a fresh one gives LoRA's logits bit by bit; the side path has an effect;
a disabled one gives the base model's logits; later tokens change nothing for earlier ones; a row does not depend on
its neighbour, on padding at its left or right, or on another sample packed into it; generation with a cache, step by
step and padded, gives what a whole forward pass gives; save and load, unload, and a kept merge change nothing; every
tensor gets a gradient, and the same one with gradient checkpointing. Encoders have a bidirectional memory; cache and
packing are left out there.

- **right**: in all checks in which plain LoRA is right. Those in which it is not are named.
- **refused**: `get_peft_model` says why.
- **wrong**, **crash**: a fault of this package, with the checks that show it.
- Types that are not listed have no result yet; checks that were left out are named, too.
- **LoRA fails**, **not built**: there is nothing to compare with: plain LoRA, or the tiny model, does not run.

"""


def read_results(path: Path) -> list[dict[str, Any]]:
    """The last result of each type, in the order of the file; a line that was cut off is none."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["family"], row["type"]] = row
    return list(rows.values())


def summary(row: dict[str, Any], wanted: set[str]) -> tuple[str, str]:
    """A type's outcome, and the detail that the page shows with it.

    Args:
        row: The type's result.
        wanted: The checks that its family has.

    Returns:
        Both.
    """
    if "base" in row:
        return row["base"], _first_sentence(row["message"])
    checks = row["checks"]
    refusals = [cell["message"] for cell in checks["attach"].values() if cell["outcome"] == "refused"]
    if refusals:
        return "refused", _first_sentence(refusals[0])
    for outcome in ("crash", "wrong", "refused"):
        names = [name for name, cells in checks.items() if any(c["outcome"] == outcome for c in cells.values())]
        if names:
            return ("crash" if outcome == "refused" else outcome), ", ".join(names)
    failing = [name for name, cells in checks.items() if "lora" in cells]
    details = [f"LoRA is not right in: {', '.join(failing)}"] if failing else []
    left_out = sorted(wanted - checks.keys())
    return "right", "; ".join([*details, f"not run: {', '.join(left_out)}"] if left_out else details)


def _first_sentence(message: str) -> str:
    text = message.rsplit(" (", 1)[0].replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 160 else f"{text[:157]}..."


def page(rows: list[dict[str, Any]]) -> str:
    """The page of the documentation.

    Args:
        rows: Of `read_results`.

    Returns:
        Its text.
    """
    families = list(dict.fromkeys(row["family"] for row in rows))
    summaries: dict[str, list[tuple[str, str, str]]] = {}
    for family in families:
        own = sorted((row for row in rows if row["family"] == family), key=lambda row: row["type"])
        wanted = {name for row in own for name in row.get("checks", ())}
        summaries[family] = [(row["type"], *summary(row, wanted)) for row in own]
    text = HEAD.format(transformers=rows[-1]["transformers"])
    text += f"| family | {' | '.join(OUTCOMES)} |\n|---|{'---:|' * len(OUTCOMES)}\n"
    for family, types in summaries.items():
        counts = Counter(outcome for _, outcome, _ in types)
        text += f"| {family} | {' | '.join(str(counts[outcome]) for outcome in OUTCOMES)} |\n"
    for family, types in summaries.items():
        text += f"\n## {family.capitalize()} models\n\n| type | outcome | detail |\n|---|---|---|\n"
        for model_type, outcome, detail in types:
            text += f"| `{model_type}` | {outcome} | {detail.replace('_', ' ') if outcome == 'right' else detail} |\n"
    return text
