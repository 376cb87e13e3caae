"""Makes the support matrix of the documentation from the results."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..pages import markdown
from ..runs import Row, read_lines

OUTCOMES = ("right", "refused", "wrong", "crash", "LoRA fails", "not built")
HEAD = """# Model types

Causal, image-text, sequence-to-sequence and encoder model types of transformers {transformers}, at tiny size with
random weights: plain LoRA, and a side path on the default block and on the first and last one. {results} of {types}
types have a result so far; the others are not listed. The table is made by

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

- **right**: in all checks in which plain LoRA is right. Those in which it is not, and those not run, are named.
- **refused**: `get_peft_model` says why.
- **wrong**, **crash**: a fault of this package, with the checks that show it.
- **LoRA fails**, **not built**: there is nothing to compare with: plain LoRA, or the tiny model, does not run.

What is read and written where blocks pass on something else than one hidden state of each token:
[Models with several residual streams](../concepts/side_path.md#models-with-several-residual-streams).

"""


def read_results(path: Path) -> list[Row]:
    """The last result of each type, in the order of the file."""
    return list({(row["family"], row["type"]): row for row in read_lines(path)}.values())


def summary(row: Row, expected: set[str]) -> tuple[str, str]:
    """A type's outcome, and the detail that the page shows with it; `expected`: the checks that its family has."""
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
    left_out = sorted(expected - checks.keys())
    details += [f"not run: {', '.join(left_out)}"] if left_out else []
    return "right", "; ".join(details).replace("_", " ")


def _first_sentence(message: str) -> str:
    text = message.rsplit(" (", 1)[0].replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 160 else f"{text[:157]}..."


def page(rows: list[Row], types: int) -> str:
    """The page of the documentation; `types`: the number of all types."""
    summaries: dict[str, list[tuple[str, str, str]]] = {}
    for family in dict.fromkeys(row["family"] for row in rows):
        of_family = sorted((row for row in rows if row["family"] == family), key=lambda row: row["type"])
        expected = {name for row in of_family for name in row.get("checks", ())}
        summaries[family] = [(f"`{row['type']}`", *summary(row, expected)) for row in of_family]
    counts = {family: Counter(outcome for _, outcome, _ in found) for family, found in summaries.items()}
    lines = [[family, *(found[outcome] for outcome in OUTCOMES)] for family, found in counts.items()]
    text = HEAD.format(transformers=rows[-1]["transformers"], results=len(rows), types=types)
    text += markdown(["family", *OUTCOMES], lines, "---:") + "\n"
    for family, found in summaries.items():
        text += f"\n## {family.capitalize()} models\n\n{markdown(['type', 'outcome', 'detail'], found)}\n"
    return text
