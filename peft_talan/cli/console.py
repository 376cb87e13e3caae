"""What all commands share: exit codes, errors, results on stdout and everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.table import Table
from typer import Option

from ..sft.display import make_console

FAILED = 1
MISUSED = 2
INTERRUPTED = 130

AsJson = Annotated[bool, Option("--json", help="Print JSON on stdout instead of text.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Write into a folder with files")]


class Misuse(typer.TyperException):
    """Options, files or packages that can't be used; the message is one line."""

    exit_code = MISUSED


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was given, whatever its value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def need(extra: str, *packages: str) -> None:
    """Refuse to go on without packages of one of this package's extras; none is imported."""
    for package in packages:
        if find_spec(package) is None:
            raise Misuse(f"package {package!r} is missing; pip install 'peft-talan[{extra}]'")


def check_output(output: Path, overwrite: bool, *sources: str) -> None:
    """Refuse a folder that can't be written, one with files unless they may be overwritten, and that of a source."""
    if output.exists() and not output.is_dir():
        raise Misuse(f"{output}: expected a folder")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise Misuse(f"{output}: the folder is not empty; give another one, or --overwrite")
    for source in sources:
        if output.exists() and Path(source).exists() and output.samefile(source):
            raise Misuse(f"{output}: what is written there would replace {source}; give another folder")
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise Misuse(f"{output}: can't be written, as {there} is no folder that you may write to; give another one")


def as_json_text(result: Any) -> str:
    """A result, of dataclasses their fields, as one JSON value."""
    return json.dumps(result, indent=1, ensure_ascii=False, default=vars)


def print_json(result: Any) -> None:
    """Print a result as one JSON value."""
    print(as_json_text(result))


def print_rows(title: str, rows: Mapping[str, object]) -> None:
    """Print names and values as a table; values that are None are left out."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, str(value))
    make_console().print(table)


def stdout_kept_clean() -> redirect_stdout[TextIO]:
    """Send what libraries print to stderr, so that stdout holds the result alone."""
    return redirect_stdout(sys.stderr)


def note(message: str) -> None:
    """Print one line on stderr that is not a result."""
    print(f"note: {message}", file=sys.stderr, flush=True)
