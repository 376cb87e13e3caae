"""`peft-talan analyze`: what an adapter does to the residual stream, on the user's own data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..sft.data import read_rows
from . import models
from .console import AsJson, Overwrite, check_output, need, print_json, stdout_kept_clean
from .options import DATA_HELP
from .sources import check_source


def analyze(
    adapter: models.Adapter,
    data: Annotated[str, Argument(help=DATA_HELP)],
    output: Annotated[Path, Argument(help="The folder for tables and pictures")],
    model: models.BaseModel = None,
    examples: Annotated[int, Option(min=1, help="How many rows are measured")] = 16,
    max_tokens: Annotated[int, Option(min=1, help="Where longer rows are cut, in tokens")] = 512,
    batch_size: Annotated[int, Option(min=1, help="Rows of a forward pass")] = 4,
    device: models.Device = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure what LoRA weights and side path do to the residual stream: tables (CSV) and pictures (PNG)."""
    models.check_adapter(adapter, model, "TALAN")
    check_source("DATA", data, "dataset")
    check_output(output, overwrite)
    need("analysis", "matplotlib")
    rows = read_rows(data, most=examples)
    models.check_place("auto", device)
    from ..analysis import analyze as measure
    from ..sft.models import choose_device

    with stdout_kept_clean():
        files = measure(
            adapter,
            rows,
            output,
            base_model=model,
            max_tokens=max_tokens,
            batch_size=batch_size,
            device=choose_device(device),
            report=print,
        )
    written = {"tables": list(map(str, files.tables)), "pictures": list(map(str, files.pictures))}
    if as_json:
        print_json(written)
    else:
        print(*written["tables"], *written["pictures"], sep="\n")
