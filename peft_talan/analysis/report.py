"""Measures a saved adapter on a data file, and writes the tables and the pictures into a folder."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ..axes import check_count, refusal
from ..config import TalanConfig
from ..sft.data import Rows, read_rows
from ..sft.models import base_model_of, load_adapter
from ..sft.prompts import Encoded, encode
from ..sft.scores import pad_batch
from .measure import measure_blocks, measure_propagation, measure_reads, to_rows

TABLES = ("blocks", "propagation", "tokens")
MAPS = 4
"""The number of examples with a map of tokens by slots."""


@dataclass(frozen=True)
class AnalysisFiles:
    """What `analyze` wrote.

    Args:
        tables: The CSV files: `blocks.csv`, `propagation.csv` and `tokens.csv`.
        pictures: The PNG files.
    """

    tables: tuple[Path, ...]
    pictures: tuple[Path, ...]


def _write_table(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    # Side paths can differ in their number of slots: not every row has every column.
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        writer.writerows(rows)
    return file


def analyze(
    adapter: str | PathLike[str],
    data_file: str | PathLike[str] | Rows,
    output_folder: str | PathLike[str],
    *,
    base_model: str | None = None,
    examples: int = 16,
    max_tokens: int = 512,
    batch_size: int = 4,
    device: str = "cpu",
    report: Callable[[str], None] = lambda message: None,
) -> AnalysisFiles:
    """Measure a saved adapter's inner states on the first examples of a file.

    Args:
        adapter: The adapter's folder or name on the hub.
        data_file: A file or a hub data set, as `peft_talan.sft.data.read_rows` takes it, or the rows that it returned.
        output_folder: Where the tables (CSV) and the pictures (PNG) go; it is created if it does not exist.
        base_model: The base model's folder or name. None: what the adapter's configuration says. Default None.
        examples: How many rows are measured. Default 16.
        max_tokens: The number of tokens at which longer rows are cut. Default 512.
        batch_size: Rows of a forward pass. Default 4.
        device: Where the model runs. Default `"cpu"`.
        report: Called with a line about what is being done.

    Returns:
        The files that were written.

    Raises:
        ValueError: A number is below 1, the adapter is not a TALAN adapter, or the data can't be used.
        ModuleNotFoundError: matplotlib is missing; `pip install 'peft-talan[analysis]'`.

    Examples:
        >>> files = analyze("user/adapter", "data.jsonl", "analysis")
        >>> files.pictures
    """
    for name, value in (("examples", examples), ("max_tokens", max_tokens), ("batch_size", batch_size)):
        check_count(name, value)
    # Imported first, so that a missing package is reported before a model is loaded.
    import matplotlib

    from .plots import plot_blocks, plot_propagation, plot_slot_usage, plot_token_slots

    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, TalanConfig):
        raise refusal("adapter", str(adapter), f"is of type {config.peft_type}; give a TALAN adapter")
    rows = data_file if isinstance(data_file, Rows) else read_rows(data_file, most=examples)
    report(f"loading {base_model_of(str(adapter), base_model)} and {adapter}")
    model, tokenizer = load_adapter(str(adapter), base_model, device=device)
    encoded = [encode(tokenizer, row) for row in rows.rows[:examples]]
    cut = [Encoded([], row.tokens[:max_tokens]) for row in encoded]
    batches = [
        {name: part.to(model.device) for name, part in pad_batch(cut[start : start + batch_size], tokenizer).items()}
        for start in range(0, len(cut), batch_size)
    ]
    report(f"measuring {len(encoded)} rows; matplotlib {matplotlib.__version__} draws")
    blocks = measure_blocks(model, batches)
    propagations = measure_propagation(model, batches)
    folder = Path(output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[Path] = []
    for earlier in folder.glob("slots_block_*_example_*.png"):  # of an adapter with other blocks, say
        earlier.unlink()

    def draw(figure: Any, name: str) -> None:
        figure.savefig(folder / f"{name}.png", dpi=150)
        pictures.append(folder / f"{name}.png")

    draw(plot_blocks(blocks), "blocks")
    draw(plot_propagation(propagations), "propagation")
    token_rows: list[dict[str, Any]] = []
    for number, batch in enumerate(batches):
        words = [[str(tokenizer.decode([token])) for token in row] for row in batch["input_ids"].tolist()]
        reads = measure_reads(model, batch)
        for measured in to_rows(reads):
            row = measured.pop("row")
            text = words[row][measured["token"]]
            token_rows.append({"example": number * batch_size + row, "text": text, **measured})
        if number == 0:
            draw(plot_slot_usage(reads), "slot_usage")
            for item in reads:
                for row in range(min(MAPS, len(words))):
                    draw(plot_token_slots(item, words[row], row), f"slots_block_{item.block}_example_{row}")
    tables = zip(TABLES, (to_rows(blocks), to_rows(propagations), token_rows), strict=True)
    return AnalysisFiles(tuple(_write_table(folder / f"{name}.csv", rows) for name, rows in tables), tuple(pictures))
