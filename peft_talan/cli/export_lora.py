"""`peft-talan export-lora`: the LoRA weights of an adapter as a plain LoRA adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

from typer import Argument

from .console import AsJson, Overwrite, check_output, print_json
from .inspect_adapter import describe, read_config
from .models import Adapter


def export_lora(
    adapter: Adapter,
    output: Annotated[Path, Argument(help="The folder to write")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the LoRA weights as a plain LoRA adapter, for PEFT and converters that know LoRA alone.

    It is not equivalent to the adapter: the side path is left out. The base model is not needed.
    """
    read_config(adapter)
    check_output(output, overwrite, adapter)
    left_out = describe(adapter)["side_path"]
    from ..checkpoint import lora

    with warnings.catch_warnings():
        # The command's own help says what the warning would.
        warnings.filterwarnings("ignore", message="The LoRA adapter in .* is not equivalent")
        lora.export_lora(adapter, output, overwrite=overwrite)
    if as_json:
        print_json({"output": str(output), "left_out": left_out})
    else:
        print(output)
