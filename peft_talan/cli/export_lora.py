"""`peft-talan export-lora`: an adapter's low-rank half as a plain LoRA adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .console import JSON_HELP, print_json
from .inspect_adapter import describe, read_config
from .merge import check_output


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: The command line.
    """
    app.command("export-lora", epilog="Example: peft-talan export-lora user/adapter plain-lora")(export)


def export(
    adapter: Annotated[str, Argument(help="The adapter's folder or hub id")],
    output: Annotated[Path, Argument(help="The folder to write")],
    overwrite: Annotated[bool, Option("--overwrite", help="Write into a folder with files")] = False,
    as_json: Annotated[bool, Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Write the low-rank half as a plain LoRA adapter, for PEFT and converters that know LoRA alone.

    It is not equivalent to the adapter: the side path is left out. The base model is not needed.
    """
    read_config(adapter)
    check_output(output, overwrite)
    from ..checkpoint.lora import export_lora

    with warnings.catch_warnings():
        # The command's own help says what the warning would.
        warnings.filterwarnings("ignore", message="The LoRA adapter in .* is not equivalent")
        export_lora(adapter, output)
    if as_json:
        print_json({"output": str(output), "left_out": describe(adapter)["side_path"]})
    else:
        print(output)
