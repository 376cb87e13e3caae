"""Refuses to load a checkpoint over an adapter of another configuration, which PEFT would go on with in silence."""

from __future__ import annotations

import functools
import json
import warnings
from os import PathLike
from typing import Any

from peft.config import PeftConfig
from peft.peft_model import PeftModel
from peft.utils import PeftType

from ..config import TalanConfig
from .merged_as_adapter import merged_models_refused

IN_TRAINING_ONLY: tuple[str, ...] = ("lora_dropout", "talan_dropout", "talan_grad_scale")
"""Fields that change how an adapter trains, not what it computes."""

WITHOUT_EFFECT: tuple[str, ...] = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_talan_weights",
    "peft_version",
    "revision",
    "talan_blocks",
    "talan_hidden_size",
    "talan_trainable",
    "talan_version",
    "task_type",
)
"""Fields that change nothing once the tensors are loaded, or that the tensors' names and shapes tell."""

LEAVE_THE_BASE: tuple[str | bool | None, ...] = (True, False, None, "gaussian", "orthogonal", "eva")
"""The values of `init_lora_weights` that leave the base weights as they are."""


def _fields(config: PeftConfig) -> dict[str, Any]:
    """The fields that decide what a loaded adapter computes or how it trains, as they would come out of a file."""
    kept = {name: value for name, value in config.to_dict().items() if name not in WITHOUT_EFFECT}
    if kept.get("init_lora_weights") in LEAVE_THE_BASE:
        kept["init_lora_weights"] = True
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


def _saved_config(model_id: str, options: dict[str, Any], required: bool) -> PeftConfig | None:
    """The configuration of a checkpoint; PEFT's own adapters are loaded over without one, too."""
    try:
        return PeftConfig.from_pretrained(model_id, **options)
    except (KeyError, ValueError):
        if required:
            raise
        return None


def _check_same(adapter_name: str, present: PeftConfig, model_id: str, saved: PeftConfig) -> None:
    """Refuse a checkpoint whose configuration is not that of the adapter; of what is for training only, warn."""
    remedy = (
        "give another adapter_name, or make the model with the checkpoint's configuration, "
        f"PeftConfig.from_pretrained({model_id!r})"
    )
    if present.peft_type != saved.peft_type:
        raise ValueError(
            f"adapter_name={adapter_name!r}: the adapter of this name has the type "
            f"{PeftType(present.peft_type).value}, the checkpoint {model_id!r} the type "
            f"{PeftType(saved.peft_type).value}; {remedy}"
        )
    ours, theirs = _fields(present), _fields(saved)
    others = {name: (ours.get(name), value) for name, value in theirs.items() if ours.get(name) != value}
    decisive = [f"{name}={old!r} (checkpoint: {new!r})" for name, (old, new) in others.items()]
    if others.keys() - set(IN_TRAINING_ONLY):
        raise ValueError(
            f"adapter_name={adapter_name!r}: PEFT reads only tensors into an adapter that is there, which would go on "
            f"with {', '.join(decisive)}; {remedy}"
        )
    if others:
        warnings.warn(
            f"adapter_name={adapter_name!r}: the adapter goes on with {', '.join(decisive)}; {remedy}", stacklevel=3
        )


def check_what_is_loaded_over() -> None:
    """Let `PeftModel.load_adapter` compare configurations where the adapter is there already; PEFT has no hook there.

    It does nothing more than before for new adapters, and where neither adapter nor checkpoint is a TALAN adapter.
    """
    load = PeftModel.load_adapter

    @functools.wraps(load)
    def load_adapter(
        self: PeftModel, model_id: str | PathLike[str], adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        present = self.peft_config.get(adapter_name)
        if present is None:
            return load(self, model_id, adapter_name, *args, **kwargs)
        with merged_models_refused("model_id", model_id, kwargs):
            # `PeftModel.from_pretrained` makes the adapter, then calls this, always with a mapping: the configuration
            # that it was given wins over the saved one.
            if kwargs.get("key_mapping") is None:
                options, needed = PeftConfig._split_kwargs(kwargs)[0], isinstance(present, TalanConfig)
                saved = _saved_config(str(model_id), options, needed)
                if saved is not None and TalanConfig in (type(present), type(saved)):
                    _check_same(adapter_name, present, str(model_id), saved)
            return load(self, model_id, adapter_name, *args, **kwargs)

    # mypy takes methods for final; PEFT has no hook where the adapter is there already.
    PeftModel.load_adapter = load_adapter  # type: ignore[method-assign]
