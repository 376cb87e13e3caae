"""`peft-talan merge`: an adapter folded into its base model."""

from __future__ import annotations

import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from . import models
from .console import AsJson, Misuse, Overwrite, check_output, print_json, stdout_kept_clean


def merge(
    adapter: models.Adapter,
    output: Annotated[Path, Argument(help="The folder to write")],
    side_path: Annotated[
        str,
        Option(
            metavar="keep|drop",
            help="keep: it stays beside the weights, outputs are the adapter's. "
            "drop: a plain model with the LoRA weights only",
        ),
    ] = "keep",
    model: models.BaseModel = None,
    safe_merge: Annotated[bool, Option(help="Check the merged weights for NaN")] = True,
    overwrite: Overwrite = False,
    dtype: models.Dtype = "auto",
    device: models.Device = None,
    as_json: AsJson = False,
) -> None:
    """Fold the LoRA weights into the base model's weights and write a model folder.

    The side path depends on its input and can't become weights: it is kept beside them, or dropped.
    """
    if side_path not in ("keep", "drop"):
        raise Misuse(f"--side-path {side_path}: choose keep or drop")
    check_output(output, overwrite, adapter)
    if models.check_adapter(adapter, model, "TALAN", merged_too=True) == models.MERGED:
        raise Misuse(f"{adapter}: is a model with a side path; its LoRA weights are merged already")
    models.check_place(dtype, device)
    from ..checkpoint.card import write_card
    from ..checkpoint.saved_files import remove_saved_files
    from ..sft.models import base_model_of, load_adapter
    from ..sft.prompts import PromptForm

    with stdout_kept_clean(), warnings.catch_warnings():
        # The option's own help says what the warning would.
        warnings.filterwarnings("ignore", message="The side path depends on its input")
        base, form = base_model_of(adapter, model), PromptForm.load(adapter)
        check_output(output, True, base)
        adapted, tokenizer = load_adapter(adapter, model, dtype, device)
        merged = adapted.merge_and_unload(safe_merge=safe_merge, side_path=side_path)
        remove_saved_files(output)
        merged.save_pretrained(output)
        tokenizer.save_pretrained(output)
        if form is not None:
            form.save(output)
        if side_path == "keep":
            write_card(output, merged_into=None if Path(base).exists() else base)
    if as_json:
        print_json({"output": str(output), "side_path": side_path, "base_model": base})
    else:
        print(output)
        needs = "" if side_path == "drop" else "  (with peft-talan installed beside vLLM)"
        print(f"Serve it with vLLM: vllm serve {shlex.quote(str(output))}{needs}", file=sys.stderr)
