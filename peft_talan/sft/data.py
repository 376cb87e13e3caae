"""Reads rows of data from a file, a folder or the hub; every program reads them here."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from random import Random
from typing import Any

from .formats import REMEDY, Form, Tally, checked, form_of, is_conversational

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
        form: The format of every row.
        rows: The rows, each with the columns of the format.
        places: Where each row stands, such as `data.jsonl:6`.
        system: The system message with which every conversation begins, if there is one.
        notes: What is seldom meant, a line each, with counts.
    """

    source: str
    form: Form
    rows: list[dict[str, Any]]
    places: list[str]
    system: str | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def conversational(self) -> bool:
        """Whether the rows hold messages, which go through the chat template."""
        return is_conversational(self.rows[0])

    def select(self, indices: Sequence[int]) -> Rows:
        """Take some of the rows.

        Args:
            indices: Their positions.

        Returns:
            These rows, in this order.
        """
        rows, places = [self.rows[i] for i in indices], [self.places[i] for i in indices]
        return Rows(self.source, self.form, rows, places, self.system)

    def split(self, held_out: int, seed: int) -> tuple[Rows, Rows]:
        """Shuffle, and hold some rows out.

        Args:
            held_out: How many to hold out.
            seed: Of the shuffle.

        Returns:
            The rows to train on, and those held out.

        Raises:
            DataError: No row would be left to train on.
        """
        if not 0 < held_out < len(self):
            raise DataError(f"{self.source}: {held_out} of {len(self)} rows can't be held out; give more rows")
        order = list(range(len(self)))
        Random(seed).shuffle(order)
        return self.select(order[held_out:]), self.select(order[:held_out])


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        start = file.read(4096)
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _array_rows(path)
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield place, json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{place}: not JSON ({error.msg}, column {error.colno}); give one object a line"
                ) from None


def _array_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:1: not UTF-8 text (byte {error.start + 1}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno})") from None
    yield from ((f"{path}, item {number}", row) for number, row in enumerate(rows, start=1))


def _table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Not with the `datasets` library: the cells are texts, and it would make numbers of "75" and nothing of "NA".
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
            found = load_dataset(LOADERS[path.suffix.lower()], data_files=source, split="train")
        elif (path / "state.json").is_file():
            found = load_from_disk(source)
        else:
            found = load_dataset(source, config, split=split)
    except DatasetGenerationError as error:
        raise DataError(f"{source}: can't be read: {error.__cause__ or error}") from error
    except (DatasetNotFoundError, OSError, ValueError) as error:
        raise DataError(f"{source}: can't be loaded: {error}") from error
    yield from ((f"{source}, row {number}", row) for number, row in enumerate(found, start=1))


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
        >>> rows = read_rows("sums.jsonl")  # {"prompt": "1 + 2 = ", "completion": "3"}, one a line
        >>> rows.form, len(rows), rows.places[0]
        ('prompt-completion', 600, 'sums.jsonl:1')
    """
    path = Path(source)
    ending = path.suffix.lower()
    if not path.is_file() or ending in LOADERS:
        found = _loaded_rows(str(source), config, split)
    else:
        found = _table_rows(path) if ending in TABLES else _json_rows(path)
    form: Form | None = None
    conversational = False
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    tally = Tally()
    try:
        for place, row in found:
            if len(rows) == most:
                break
            try:
                if not isinstance(row, dict):
                    raise ValueError(f"a row must be a JSON object, not {type(row).__name__}; {REMEDY}")
                form = form or form_of(row)
                checked_row = checked(row, form)
                if rows and is_conversational(checked_row) != conversational:
                    raise ValueError("the first row holds texts, this one messages, or the reverse; use one format")
            except ValueError as error:
                raise DataError(f"{place}: {error}") from None
            conversational = is_conversational(checked_row)
            tally.add(checked_row, place)
            rows.append(checked_row)
            places.append(place)
    except OSError as error:
        raise DataError(f"{source}: can't be read: {error.strerror or error}") from None
    if form is None:
        raise DataError(f"{source}:1: the data has no rows; {REMEDY}")
    return Rows(str(source), form, rows, places, tally.system, tally.notes())
