"""TALAN for PEFT: a sequence-conditioned latent side path in the residual stream, beside a low-rank adapter.

Importing this package registers the tuner with PEFT as soon as PEFT is imported, and imports neither PEFT nor torch
itself: its names do, when they are first used. `get_peft_model(model, TalanConfig(...))` then works as for LoRA.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .autoload import register, wait_for_peft
from .version import __version__

if TYPE_CHECKING:
    from .checkpoint.lora import export_lora, warm_start
    from .config import TalanConfig
    from .tuner.attention_keys import initialize_talan_keys
    from .tuner.layer import TalanLayer
    from .tuner.model import TalanModel
    from .tuner.recall_start import initialize_talan_recall
    from .tuner.registry import register_talan
    from .tuner.strength import set_talan_strength, talan_strength
    from .tuner.token_counts import talan_token_counts
    from .tuner.trainability import set_trainable, talan_param_groups
    from .tuner.whitening import initialize_talan_weights

__all__ = [
    "TalanConfig",
    "TalanLayer",
    "TalanModel",
    "__version__",
    "export_lora",
    "initialize_talan_keys",
    "initialize_talan_recall",
    "initialize_talan_weights",
    "register_talan",
    "set_talan_strength",
    "set_trainable",
    "talan_param_groups",
    "talan_strength",
    "talan_token_counts",
    "warm_start",
]

_MODULES = {
    "TalanConfig": "config",
    "TalanLayer": "tuner.layer",
    "TalanModel": "tuner.model",
    "export_lora": "checkpoint.lora",
    "initialize_talan_keys": "tuner.attention_keys",
    "initialize_talan_recall": "tuner.recall_start",
    "initialize_talan_weights": "tuner.whitening",
    "register_talan": "tuner.registry",
    "set_talan_strength": "tuner.strength",
    "set_trainable": "tuner.trainability",
    "talan_param_groups": "tuner.trainability",
    "talan_strength": "tuner.strength",
    "talan_token_counts": "tuner.token_counts",
    "warm_start": "checkpoint.lora",
}
"""Where each name that is imported on its first use is defined."""

if not TYPE_CHECKING:  # A type checker would take every misspelt name for one that this function returns.

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        register()
        return globals().setdefault(name, getattr(import_module(f"{__name__}.{_MODULES[name]}"), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


wait_for_peft()
