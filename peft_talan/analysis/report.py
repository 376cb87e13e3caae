"""Measures a saved adapter on a data file, and writes the tables and the pictures into a folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..config import TalanConfig
from .measure import measure_blocks, measure_propagation, measure_reads, to_rows
from .streams import Inputs

TABLES = ("blocks", "propagation", "tokens")
MAPS = 4
"""So many examples get a map of tokens by slots."""


@dataclass(frozen=True)
class AnalysisFiles:
    """What `analyze` wrote.

    Args:
        tables: The CSV files: `blocks.csv`, `propagation.csv` and `tokens.csv`.
        pictures: The PNG files.
    """

    tables: tuple[Path, ...]
    pictures: tuple[Path, ...]


def _text_of(fields: Any, chat: Callable[[list[dict[str, str]]], str] | None) -> str:
    if isinstance(fields, dict):
        if isinstance(fields.get("text"), str):
            return str(fields["text"])
        if all(isinstance(fields.get(name), str) for name in ("prompt", "completion")):
            messages = [
                {"role": "user", "content": fields["prompt"]},
                {"role": "assistant", "content": fields["completion"]},
            ]
            return chat(messages) if chat else f"{fields['prompt']}\n{fields['completion']}"
        turns = fields.get("messages")
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
            return chat(turns) if chat else "\n".join(str(turn.get("content")) for turn in turns)
    raise ValueError("a line must be an object with 'text', with 'prompt' and 'completion', or with 'messages'")


def read_texts(
    data_file: str | PathLike[str], most: int, chat: Callable[[list[dict[str, str]]], str] | None = None
) -> list[str]:
    """Read the first texts of a JSONL file.

    Args:
        data_file: Each line an object with `text`, with `prompt` and `completion`, or with `messages`.
        most: How many lines at most.
        chat: Turns messages into a text; None: their contents, one a line. Default None.

    Returns:
        The texts.

    Raises:
        ValueError: The file can't be read, is empty, or a line of it can't be used; the message names both.
    """
    try:
        lines = Path(data_file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data_file={str(data_file)!r}: can't be read: {error}") from error
    texts: list[str] = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and len(texts) < most:
            try:
                texts.append(_text_of(json.loads(line), chat))
            except ValueError as error:
                raise ValueError(f"{data_file}:{number}: {error}") from error
    if not texts:
        raise ValueError(f"data_file={str(data_file)!r}: it has no lines; give JSON objects, one a line")
    return texts


def _write_table(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    # Side paths can differ in their number of slots, so that not every row has every column.
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        writer.writerows(rows)
    return file


def _padded(encoded: Sequence[list[int]], device: str) -> Inputs:
    longest = max(len(tokens) for tokens in encoded)
    # Padding is masked, so that any token will do.
    rows = [tokens + [0] * (longest - len(tokens)) for tokens in encoded]
    masks = [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in encoded]
    return {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": torch.tensor(masks, device=device),
    }


def analyze(
    adapter: str | PathLike[str],
    data_file: str | PathLike[str],
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
        data_file: A JSONL file; each line has `text`, `prompt` and `completion`, or `messages`.
        output_folder: Where the tables (CSV) and the pictures (PNG) go; it is made where it is missing.
        base_model: The base model's folder or name. None: what the adapter's configuration says. Default None.
        examples: How many lines are measured. Default 16.
        max_tokens: Where longer examples are cut. Default 512.
        batch_size: Examples a forward pass. Default 4.
        device: Where the model runs. Default `"cpu"`.
        report: Called with a line about what is being done.

    Returns:
        The files that were written.

    Raises:
        ValueError: A number is below 1, the adapter is no TALAN adapter, or the data can't be used.
        ModuleNotFoundError: matplotlib is missing; `pip install 'peft-talan[analysis]'`.
    """
    for name, value in (("examples", examples), ("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value!r}: give a whole number of at least 1")
    # Imported first: a missing package is told of before a model is loaded.
    import matplotlib

    from .plots import plot_blocks, plot_propagation, plot_slot_usage, plot_token_slots

    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, TalanConfig):
        raise ValueError(f"adapter={str(adapter)!r}: is of type {config.peft_type}; give a TALAN adapter")
    source = base_model or config.base_model_name_or_path
    if not source:
        raise ValueError("base_model=None: the adapter's configuration names none; give its folder or name")
    tokenizer = AutoTokenizer.from_pretrained(source)

    def chat(turns: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))

    texts = read_texts(data_file, examples, chat if tokenizer.chat_template else None)
    report(f"loading {source} and {adapter}")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), str(adapter)).to(device).eval()
    encoded = [tokenizer(text)["input_ids"][:max_tokens] for text in texts]
    batches = [_padded(encoded[start : start + batch_size], device) for start in range(0, len(texts), batch_size)]
    report(f"measuring {len(texts)} examples; matplotlib {matplotlib.__version__} draws")
    blocks = measure_blocks(model, batches)
    propagations = measure_propagation(model, batches)
    folder = Path(output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[Path] = []

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
