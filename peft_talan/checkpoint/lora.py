"""Exchange with plain LoRA: export as a LoRA adapter, and a warm start from one."""

from __future__ import annotations

import warnings
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.mapping_func import get_peft_model
from peft.peft_model import PeftModel
from peft.tuners.lora import LoraConfig
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..config import TalanConfig
from .names import low_rank_tensors
from .saved_files import model_files, remove_saved_files

EXPORT_NOTE = """\
---
library_name: peft
tags:
- lora
---

# The LoRA weights of a TALAN adapter

This LoRA adapter is **not equivalent** to the TALAN adapter that it was taken from: the side path, which was trained
together with it, is missing. It loads with PEFT alone, and converters for LoRA take it.
"""


def export_lora(
    model: PeftModel | PreTrainedModel | str | PathLike[str],
    save_directory: str | PathLike[str],
    adapter_name: str = "default",
    overwrite: bool = False,
) -> None:
    """Write the LoRA weights of an adapter as a plain LoRA adapter, which PEFT loads without this package.

    Args:
        model: A model with a TALAN adapter; or a saved adapter, as its folder or hub id: no base model is needed then.
        save_directory: The folder to write.
        adapter_name: The adapter's name in the model. Default `"default"`.
        overwrite: Whether a model and a tokenizer in the folder are removed; otherwise a model is refused. Default
            False.

    Raises:
        ValueError: There is no such TALAN adapter, it has no LoRA weights, or the folder holds a model or is that of
            the adapter.

    Examples:
        >>> export_lora(model, "lora")  # of a model in memory
        >>> export_lora("path/to/adapter", "lora")  # of a saved adapter, without its base model
    """
    saved = isinstance(model, (str, PathLike))
    config = PeftConfig.from_pretrained(str(model)) if saved else getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, TalanConfig):
        raise ValueError(
            f"model={str(model)!r}: expected a TALAN adapter, got another type"
            if saved
            else f"adapter_name={adapter_name!r}: the model has no TALAN adapter of this name"
        )
    if not config.has_lora_weights:
        raise ValueError(f"adapter_name={adapter_name!r}: the adapter has no LoRA weights (r=0 or no target modules)")
    folder = Path(save_directory)
    if not overwrite and (found := model_files(folder)):
        raise ValueError(
            f"save_directory={str(save_directory)!r}: it holds a model ({', '.join(found[:3])}), which transformers "
            "would take for the adapter's base; give another folder"
        )
    if isinstance(model, (str, PathLike)) and folder.exists() and Path(model).exists() and folder.samefile(model):
        raise ValueError(f"save_directory={str(save_directory)!r}: the adapter itself lies there; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "base_model.model." if isinstance(model, PreTrainedModel) else ""
    if isinstance(model, (str, PathLike)):
        saved_tensors = load_peft_weights(str(model), device="cpu")
    else:
        saved_tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {f"{prefix}{name}": tensor.contiguous() for name, tensor in low_rank_tensors(saved_tensors).items()}
    if overwrite:
        remove_saved_files(folder)
    for file in folder.glob("adapter_model.*"):
        file.unlink()
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    options = {option.name: getattr(config, option.name) for option in fields(LoraConfig) if option.init}
    lora_config = LoraConfig(**{**options, "inference_mode": True})
    if lora_config.base_model_name_or_path is None:
        lora_config.base_model_name_or_path = getattr(model, "name_or_path", None)
    lora_config.save_pretrained(str(folder))
    (folder / "README.md").write_text(EXPORT_NOTE, encoding="utf-8")
    warnings.warn(
        f"The LoRA adapter in {folder} is not equivalent to the TALAN adapter {adapter_name!r}: its side path is left "
        "out.",
        stacklevel=2,
    )


def warm_start(
    model: PreTrainedModel, lora: str | PathLike[str], adapter_name: str = "default", **options: Any
) -> PeftModel:
    """Make a TALAN model whose LoRA weights are those of a trained LoRA adapter and whose side path is fresh.

    At the start its outputs equal the LoRA adapter's.

    Args:
        model: The base model.
        lora: The LoRA adapter's folder or its name on the hub.
        adapter_name: The name of the new adapter. Default `"default"`.
        **options: Fields of `TalanConfig`, such as `talan_layers`.

    Returns:
        The model with the adapter.

    Raises:
        ValueError: The tensors of the LoRA adapter do not fit the model, which is left unchanged.

    Examples:
        >>> model = warm_start(base_model, "path/to/lora", talan_layers=[0.5])
    """
    config = TalanConfig.from_lora(lora, **options)
    tensors = load_peft_weights(str(lora), device="cpu")
    adapted = get_peft_model(model, config, adapter_name)
    expected = set(low_rank_tensors(get_peft_model_state_dict(adapted, adapter_name=adapter_name)))
    if expected != set(tensors):
        adapted.unload()
        raise ValueError(
            f"lora={str(lora)!r}: tensors are missing or have no place in {type(model).__name__}, such as "
            f"{min(expected ^ set(tensors))}; load the adapter with PEFT and save it again, and leave the options of "
            "the LoRA weights as they are"
        )
    set_peft_model_state_dict(adapted, tensors, adapter_name)
    return adapted
