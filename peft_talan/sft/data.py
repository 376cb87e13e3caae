"""Reads rows of data from a file, a folder or the hub; every program reads them here."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from random import Random
from typing import Any

from .formats import REMEDY, Form, checked, form_of, is_conversational, system_of, unusual_rows

TABLES = {".csv": ",", ".tsv": "\t"}
LOADERS = {".parquet": "parquet", ".arrow": "arrow"}
"""The loaders of the `datasets` library by the file's ending; files of other endings are read as JSON."""


class DataError(ValueError):
    """Data that can't be used; the message names the file and the line."""


@dataclass(frozen=True)
class Rows:
    """Checked rows of one format.

    Args:
        source: The file, the folder or the hub id.
        rows: The rows, each with the columns of the format.
        places: Where each row stands, such as `data.jsonl:6`.
    """

    source: str
    rows: list[dict[str, Any]]
    places: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def form(self) -> Form:
        """The format of every row."""
        return form_of(self.rows[0])

    @property
    def conversational(self) -> bool:
        """Whether the rows hold messages, which go through the chat template."""
        return is_conversational(self.rows[0])

    @property
    def system(self) -> str | None:
        """The system message with which every conversation begins, if there is one."""
        systems = set(map(system_of, self.rows))
        return systems.pop() if len(systems) == 1 else None

    def shared(self, column: str) -> Any:
        """What every row has in a column, if it is the same."""
        first = self.rows[0].get(column)
        return first if all(row.get(column) == first for row in self.rows) else None

    @property
    def notes(self) -> list[str]:
        """What is seldom meant, one line for each kind of row, with counts."""
        return unusual_rows(self.rows, self.places)

    def split(self, held_out: int, seed: int | None) -> tuple[Rows, Rows]:
        """Hold out some rows, of those shuffled with a seed, or the first ones; return what is left, and them."""
        if not 0 < held_out < len(self):
            raise DataError(f"{self.source}: {held_out} of {len(self)} rows can't be held out; give more rows")
        order = list(range(len(self)))
        if seed is not None:
            Random(seed).shuffle(order)

        def select(indices: list[int]) -> Rows:
            return Rows(self.source, [self.rows[i] for i in indices], [self.places[i] for i in indices])

        return select(order[held_out:]), select(order[:held_out])


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a file of one JSON array, or of one JSON object per line."""
    with path.open("rb") as file:
        is_array = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        file.seek(0)
        for number, raw in enumerate([file.read()] if is_array else file, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
                value: Any = json.loads(text) if text.strip() else None
            except UnicodeDecodeError as error:
                place = f"{path}:{number}"
                raise DataError(f"{place}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                place, remedy = f"{path}:{number + error.lineno - 1}", "" if is_array else "; give one object per line"
                raise DataError(f"{place}: not JSON ({error.msg}, column {error.colno}){remedy}") from None
            if is_array:
                yield from ((f"{path}, item {item}", row) for item, row in enumerate(value, start=1))
            elif text.strip():
                yield f"{path}:{number}", value


def _table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Not with the `datasets` library, which turns "75" into a number and "NA" into None, and names no line.
    with path.open(encoding="utf-8-sig", newline="") as file:
        delimiter = TABLES[path.suffix.lower()]
        reader = csv.DictReader(file, delimiter=delimiter)
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if any(row.get(None) or ()):  # the key of what is left over
                    remedy = f"put a text that holds {delimiter!r} in double quotes"
                    raise DataError(f"{place}: more cells than the header has names; {remedy}")
                yield place, row
        except UnicodeDecodeError as error:
            place = f"{path}:{reader.line_num + 1}"
            raise DataError(f"{place}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}") from None


def _loaded_rows(source: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    """Rows that the `datasets` library reads."""
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    path = Path(source)
    try:
        if path.is_file():
            rows = load_dataset(LOADERS[path.suffix.lower()], data_files=source, split="train")
        elif (path / "state.json").is_file():
            rows = load_from_disk(source)
        else:
            rows = load_dataset(source, config, split=split)
    except DatasetGenerationError as error:
        raise DataError(f"{source}: can't be read: {error.__cause__ or error}") from error
    except (DatasetNotFoundError, OSError, ValueError) as error:
        raise DataError(f"{source}: can't be loaded: {error}") from error
    yield from ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))


def read_rows(
    source: str | PathLike[str], *, config: str | None = None, split: str = "train", most: int | None = None
) -> Rows:
    """Read and check rows of data.

    Args:
        source: A JSONL or JSON file; a csv, tsv, parquet or arrow file; a folder of files; or a data set's hub id.
            The formats are those of `peft_talan.sft.formats`.
        config: The name of a hub data set's configuration. Default None.
        split: The split of a folder or a hub data set. Default `"train"`.
        most: How many rows to read at most. Default None: all.

    Returns:
        The rows.

    Raises:
        DataError: The data can't be read, has no rows, or a row can't be used; the message names file and line.

    Examples:
        >>> rows = read_rows("sums.jsonl")  # {"prompt": "1 + 2 = ", "completion": "3"}, one per line
        >>> rows.form, len(rows), rows.places[0]
        ('prompt-completion', 600, 'sums.jsonl:1')
    """
    path = Path(source)
    if not path.is_file() or path.suffix.lower() in LOADERS:
        raw_rows = _loaded_rows(str(source), config, split)
    else:
        raw_rows = _table_rows(path) if path.suffix.lower() in TABLES else _json_rows(path)
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    try:
        for place, row in islice(raw_rows, most):
            try:
                if not isinstance(row, dict):
                    raise ValueError(f"a row must be a JSON object, not {type(row).__name__}; {REMEDY}")
                rows.append(checked(row, form_of((rows or [row])[0])))
                places.append(place)
                if is_conversational(rows[-1]) != is_conversational(rows[0]):
                    raise ValueError("the first row holds texts, this one messages, or the reverse; use one format")
            except ValueError as error:
                raise DataError(f"{place}: {error}") from None
    except OSError as error:
        raise DataError(f"{source}: can't be read: {error.strerror or error}") from None
    if not rows:
        raise DataError(f"{source}:1: the data has no rows; {REMEDY}")
    return Rows(str(source), rows, places)
