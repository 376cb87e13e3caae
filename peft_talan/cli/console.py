"""What all commands share: exit codes, errors, results on stdout and everything else on stderr."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

FAILED = 1
MISUSED = 2
INTERRUPTED = 130

JSON_HELP = "Print JSON on stdout instead of text."


class Misuse(typer.TyperException):
    """Options, files or packages that can't be used; the message is one line."""

    exit_code = MISUSED


def one_line(message: str) -> str:
    """Put a message on one line.

    Args:
        message: Any text.

    Returns:
        The text, with single spaces.
    """
    return " ".join(message.split())


def need(extra: str, *packages: str) -> None:
    """Import packages that only some commands need.

    Args:
        extra: The extra of this package that installs them.
        *packages: Their import names.

    Raises:
        Misuse: One is missing.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise Misuse(f"package {error.name!r} is missing; pip install 'peft-talan[{extra}]'") from error


def print_json(result: Any) -> None:
    """Print a result as one JSON value.

    Args:
        result: What JSON can hold.
    """
    print(json.dumps(result, indent=1, ensure_ascii=False))


def print_rows(title: str, rows: Mapping[str, object]) -> None:
    """Print names and values as a table.

    Args:
        title: Of the table.
        rows: The values by name; those that are None are left out.
    """
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, str(value))
    # A pipe has no width of its own: a line stays a line for grep and cut.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200
    Console(width=width, highlight=False).print(table)


@contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Send what libraries print to stderr, so that stdout holds the result alone.

    Yields:
        Nothing.
    """
    with redirect_stdout(sys.stderr):
        yield


def note(message: str) -> None:
    """Print a message that is not a result.

    Args:
        message: One line, on stderr.
    """
    print(f"note: {message}", file=sys.stderr, flush=True)
