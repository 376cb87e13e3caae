"""The arguments that say which adapter and model run and where, for all commands that run one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .console import Misuse
from .inspect_adapter import MergedModel, read_config
from .sources import check_source

MERGED = "merged model"
BASE_MODEL = "base_model"
"""The folder, in that of the adapter, of the model that `train --window` gave a window."""
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

Adapter = Annotated[str, Argument(help="The adapter's folder or hub id")]
BaseModel = Annotated[
    str | None,
    Option("--model", help="Base model, hub id or folder", show_default="what the adapter was trained on"),
]
Dtype = Annotated[str, Option(help=f"Dtype of the base model: {', '.join(DTYPES)}")]
Device = Annotated[str | None, Option(help="Such as cpu or cuda:0", show_default="a GPU if there is one")]


def check_adapter(adapter: str, model: str | None, kind: str | None = None, *, merged_too: bool = False) -> str:
    """Refuse an adapter that is not of a type (None: of any), or without a base model; return its type.

    That of a merged model, which has its side path and no adapter, is `MERGED`.
    """
    try:
        config = read_config(adapter, kind=kind)
    except MergedModel:
        if merged_too:
            return MERGED
        raise
    if model is not None:
        check_source("--model", model, "model")
    elif not (base := str(config.get("base_model_name_or_path") or "")):
        raise Misuse(f"{adapter}: the adapter does not say which base model it was trained on; give --model")
    elif not Path(base).exists() and (beside := Path(adapter, BASE_MODEL)).is_dir():
        raise Misuse(
            f"{adapter}: its base model {base} is there no more; if the folder was moved, give --model {beside}"
        )
    else:
        check_source(f"{adapter}: its base model", base, "model")
    return str(config["peft_type"])


def check_place(dtype: str, device: str | None) -> None:
    """Refuse an unknown dtype, and a device that torch can't compute on."""
    if dtype not in DTYPES:
        raise Misuse(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if device is None:
        return
    # torch alone takes a second; the rest is imported once this is known to work.
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Misuse(f"--device {device}: torch {torch.__version__} can't compute there: {reason}") from None
