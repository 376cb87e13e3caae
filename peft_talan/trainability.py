"""Which tensors of an adapter train."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import nn

from .config import Trainable
from .layer import TalanLayer

WRITEBACK_PARAMETERS: tuple[str, ...] = ("lora_talan_write", "lora_talan_gate")


def _frozen_names(module: TalanLayer | LoraLayer, scope: Trainable) -> tuple[str, ...]:
    if isinstance(module, LoraLayer):
        return module.adapter_layer_names if scope in ("side_path", "writeback") else ()
    if scope == "writeback":
        return tuple(name for name in module.adapter_layer_names if name not in WRITEBACK_PARAMETERS)
    return module.adapter_layer_names if scope == "low_rank" else ()


def freeze_by_scope(model: nn.Module, adapter_name: str, scope: Trainable) -> None:
    """Declare what the trainability scope keeps frozen, in the way that PEFT re-applies at every switch.

    Args:
        model: The base model with the adapter.
        adapter_name: The adapter's name.
        scope: The adapter's trainability scope.
    """
    for module in model.modules():
        if isinstance(module, (TalanLayer, LoraLayer)) and adapter_name in module._get_available_adapters():
            frozen = _frozen_names(module, scope)
            if frozen:
                declared = module.frozen_peft_weight_names.get(adapter_name, ())
                names = tuple(dict.fromkeys((*declared, *frozen)))
                module.frozen_peft_weight_names = {**module.frozen_peft_weight_names, adapter_name: names}
                module._freeze_non_trainable_peft_weights(adapter_name)
