"""Loads an adapter on its base model, for the commands that run it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from .console import Misuse
from .inspect_adapter import read_config

BaseModel = Annotated[
    str | None, Option("--model", help="Base model, hub id or folder [default: what the adapter was trained on]")
]
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
Dtype = Annotated[str, Option(help=f"Dtype of the base model: {', '.join(DTYPES)}")]
Device = Annotated[str | None, Option(help="Such as cpu or cuda:0 [default: a GPU where there is one]")]


def load_base(adapter: str, model: str | None, dtype: str, device: str | None) -> tuple[Any, str]:
    """Load the base model of an adapter.

    Args:
        adapter: The adapter's folder or hub id.
        model: The base model; None: what the adapter was trained on.
        dtype: One of `DTYPES`.
        device: None: a GPU where there is one.

    Returns:
        The model, and where it came from.

    Raises:
        Misuse: There is no name of a base model, or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise Misuse(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    config = read_config(adapter)
    name = model or config.get("base_model_name_or_path")
    if not name:
        raise Misuse(f"{adapter}: the adapter does not say which base model it was trained on; give --model")
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return base.to(choose_device(device)), name


def choose_device(device: str | None) -> str:
    """Choose where a model runs.

    Args:
        device: What was asked for; None: a GPU where there is one.

    Returns:
        The device.
    """
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def is_embedded(adapter: str) -> bool:
    """Whether an adapter lies in the folder of the model that it belongs to, as `merge_and_unload` leaves it.

    Args:
        adapter: The adapter's folder or hub id.

    Returns:
        True where loading the model loads the adapter, too.
    """
    return (Path(adapter) / "config.json").is_file() or read_config(adapter).get("base_model_name_or_path") == adapter


def load_adapter(adapter: str, model: str | None, dtype: str, device: str | None) -> tuple[Any, str]:
    """Load an adapter on its base model, for inference.

    Args:
        adapter: The adapter's folder or hub id.
        model: The base model; None: what the adapter was trained on.
        dtype: One of `DTYPES`.
        device: None: a GPU where there is one.

    Returns:
        The model in evaluation mode, and where its base came from.

    Raises:
        Misuse: There is no name of a base model, or the dtype is unknown.
    """
    from peft import PeftModel

    import peft_talan  # noqa: F401 - where autoload is off, this registers the tuner

    if is_embedded(adapter) and model is None:
        return load_base(adapter, adapter, dtype, device)
    base, name = load_base(adapter, model, dtype, device)
    return PeftModel.from_pretrained(base, adapter).eval(), name


def load_tokenizer(adapter: str, base: str) -> Any:
    """Load the tokenizer that was saved with an adapter, or its base model's.

    Args:
        adapter: The adapter's folder or hub id.
        base: The base model's name.

    Returns:
        The tokenizer.
    """
    from transformers import AutoTokenizer

    saved_here = (Path(adapter) / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(adapter if saved_here else base)
