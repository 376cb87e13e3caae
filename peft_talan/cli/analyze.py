"""`peft-talan analyze`: what an adapter does to the residual stream, on the user's own data."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .console import JSON_HELP, Misuse, need, print_json, stdout_kept_clean
from .inspect_adapter import read_config


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: The command line.
    """
    app.command("analyze", epilog="Example: peft-talan analyze user/adapter data.jsonl analysis")(analyze)


def analyze(
    adapter: Annotated[str, Argument(help="The adapter's folder or hub id")],
    data: Annotated[Path, Argument(help="JSONL file of messages, prompt/completion or text")],
    output: Annotated[Path, Argument(help="The folder for tables and plots")],
    as_json: Annotated[bool, Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Measure what both halves of an adapter do to the residual stream, and plot it."""
    read_config(adapter)
    if not data.is_file():
        raise Misuse(f"{data}: there is no such file")
    need("analysis", "matplotlib")
    with stdout_kept_clean():
        try:
            module = importlib.import_module("peft_talan.analyze")
        except ModuleNotFoundError as error:
            if error.name != "peft_talan.analyze":
                raise
            raise Misuse("this version has no analysis on data yet; see the page on analysis in the docs") from None
        result = module.analyze(adapter, data, output)
    if as_json:
        print_json({"output": str(output), "result": result if isinstance(result, (dict, list)) else None})
    else:
        print(output)
