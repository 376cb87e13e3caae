"""`peft-talan merge`: an adapter folded into its base model."""

from __future__ import annotations

import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from . import models
from .console import JSON_HELP, Misuse, print_json, stdout_kept_clean


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: The command line.
    """
    app.command(
        "merge",
        epilog="Examples: peft-talan merge user/adapter merged  |  "
        "peft-talan merge user/adapter plain --side-path drop",
    )(merge)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse to write over a folder with files in it.

    Args:
        output: The folder to write.
        overwrite: Whether that was asked for.

    Raises:
        Misuse: The folder has files, or is none.
    """
    if output.exists() and not output.is_dir():
        raise Misuse(f"{output}: expected a folder")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise Misuse(f"{output}: the folder is not empty; give another one, or --overwrite")


def serve_command(folder: Path, side_path: str) -> str:
    """The line that serves a merged model.

    Args:
        folder: The model's folder.
        side_path: `keep` or `drop`.

    Returns:
        The command.
    """
    command = f"vllm serve {shlex.quote(str(folder))}"
    return command if side_path == "drop" else f"{command}  (with peft-talan installed beside vLLM)"


def merge(
    adapter: Annotated[str, Argument(help="The adapter's folder or hub id")],
    output: Annotated[Path, Argument(help="The folder to write")],
    side_path: Annotated[
        str,
        Option(
            metavar="keep|drop",
            help="keep: it stays as an embedded adapter, outputs are the adapter's. "
            "drop: a plain model, the low-rank half alone",
        ),
    ] = "keep",
    model: models.BaseModel = None,
    safe_merge: Annotated[bool, Option(help="Check the merged weights for NaN")] = True,
    overwrite: Annotated[bool, Option("--overwrite", help="Write into a folder with files")] = False,
    dtype: models.Dtype = "auto",
    device: models.Device = None,
    as_json: Annotated[bool, Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Fold the low-rank half into the base model's weights and write a model folder.

    The side path depends on its input and can't become weights: it is kept beside them, or dropped.
    """
    if side_path not in ("keep", "drop"):
        raise Misuse(f"--side-path {side_path}: choose keep or drop")
    check_output(output, overwrite)
    models.check_model_options(adapter, model, dtype, device, kind="TALAN")
    from ..sft.models import base_model_of, is_embedded, load_adapter

    if is_embedded(adapter):
        raise Misuse(f"{adapter}: is a model with an embedded side path; its low-rank half is merged already")
    with stdout_kept_clean(), warnings.catch_warnings():
        # The option's own help says what the warning would.
        warnings.filterwarnings("ignore", message="The side path depends on its input")
        adapted, tokenizer = load_adapter(adapter, model, dtype, device)
        merged = adapted.merge_and_unload(safe_merge=safe_merge, side_path=side_path)
        merged.save_pretrained(output)
        tokenizer.save_pretrained(output)
    if as_json:
        print_json({"output": str(output), "side_path": side_path, "base_model": base_model_of(adapter, model)})
    else:
        print(output)
        print(f"Serve it with vLLM: {serve_command(output, side_path)}", file=sys.stderr)
