"""What trains, and how fast: the trainability scope, and parameter groups for an optimizer."""

from __future__ import annotations

from typing import Any, get_args

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..axes import Trainable
from ..config import TalanConfig
from .layer import TalanLayer

WRITEBACK_PARAMETERS: tuple[str, ...] = ("lora_talan_write", "lora_talan_gate")

SCOPE_MARK = "talan_trainable"
"""Stands between the names that PEFT's variants of LoRA keep frozen and those that the scope adds."""


def _frozen_by_scope(module: BaseTunerLayer, scope: Trainable) -> tuple[str, ...]:
    if isinstance(module, TalanLayer):
        if scope == "low_rank":
            return module.adapter_layer_names
        if scope == "writeback":
            return tuple(name for name in module.adapter_layer_names if name not in WRITEBACK_PARAMETERS)
        return ()
    return module.adapter_layer_names if scope in ("side_path", "writeback") else ()


def frozen_tensors(model: nn.Module, adapter_name: str, scope: Trainable) -> dict[str, nn.Parameter]:
    """The parameters of an adapter that a trainability scope freezes, by their names in the model."""
    found = {}
    for place, module in model.named_modules():
        for part in _frozen_by_scope(module, scope) if isinstance(module, (TalanLayer, LoraLayer)) else ():
            for name, parameter in getattr(module, part).named_parameters():
                if name.split(".")[0] == adapter_name:
                    found[f"{place}.{part}.{name}"] = parameter
    return found


def declare_scope(model: nn.Module, adapter_name: str, scope: Trainable) -> None:
    """Declare what a trainability scope freezes, in the way that PEFT applies again at every switch of adapters."""
    for module in model.modules():
        if not isinstance(module, (TalanLayer, LoraLayer)):
            continue
        declared = module.frozen_peft_weight_names.get(adapter_name, ())
        frozen = _frozen_by_scope(module, scope)
        marked = SCOPE_MARK in declared
        # In this order: most layers have nothing to declare, and to gather a layer's adapters takes longer.
        if not (marked or frozen) or adapter_name not in module._get_available_adapters():
            continue
        if marked:
            declared = declared[: declared.index(SCOPE_MARK)]
        names = (*declared, SCOPE_MARK, *frozen) if frozen else declared
        module.frozen_peft_weight_names = {**module.frozen_peft_weight_names, adapter_name: names}
        module._freeze_non_trainable_peft_weights(adapter_name)


def set_trainable(model: nn.Module, scope: Trainable, adapter_name: str = "default") -> None:
    """Change what an adapter trains, for example the side path first, and the LoRA weights with it later.

    The scope goes into the adapter's configuration, so that it is saved with it. An adapter that is not active starts
    to train when it is activated. Create the optimizer again afterwards: it holds the parameters of the earlier scope.

    Args:
        model: A model with a TALAN adapter.
        scope: `joint`, `side_path`, `writeback` (its write-back and gate alone) or `low_rank`.
        adapter_name: The adapter's name. Default `"default"`.

    Raises:
        ValueError: There is no such TALAN adapter, no such scope, or no LoRA weights to train.

    Examples:
        >>> set_trainable(model, "side_path")  # and both later: set_trainable(model, "joint")
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, TalanConfig):
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no TALAN adapter of this name")
    if scope not in get_args(Trainable):
        raise ValueError(f"scope={scope!r}: choose one of {', '.join(map(repr, get_args(Trainable)))}")
    if scope == "low_rank" and not config.has_lora_weights:
        raise ValueError(f"scope={scope!r}: adapter {adapter_name!r} has no LoRA weights; use 'joint' or 'side_path'")
    config.talan_trainable = scope
    declare_scope(model, adapter_name, scope)
    for module in model.modules():
        if isinstance(module, (TalanLayer, LoraLayer)) and adapter_name in module.active_adapters:
            module.set_requires_grad(adapter_name, True)


def talan_param_groups(
    model: nn.Module, lr: float, side_path_lr_scale: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups for an optimizer, the side path with a learning rate of its own.

    Vectors (biases, gates, DoRA's magnitudes) get no weight decay. Trainer and TRL take the groups by
    `optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": talan_param_groups(model, lr)})` or
    `optimizers=(torch.optim.AdamW(talan_param_groups(model, lr)), None)`.

    Args:
        model: A model with an adapter.
        lr: The learning rate.
        side_path_lr_scale: The side path's learning rate divided by `lr`. Default 1.
        weight_decay: Of the matrices. Default 0.

    Returns:
        Up to four groups, each with `params`, `lr` and `weight_decay`; every trainable parameter is in one of them.

    Raises:
        ValueError: A number is negative, or nothing trains.

    Examples:
        >>> optimizer = torch.optim.AdamW(talan_param_groups(model, lr=2e-4, side_path_lr_scale=5.0))
    """
    for name, value in (("lr", lr), ("side_path_lr_scale", side_path_lr_scale), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name}={value!r}: give a number of at least 0")
    in_side_path = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, TalanLayer)
        for parameter in module.parameters()
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in in_side_path, parameter.dim() > 1), []).append(parameter)
    if not groups:
        raise ValueError("model: no parameter requires a gradient; load the adapter with is_trainable=True")
    return [
        {
            "params": parameters,
            "lr": lr * side_path_lr_scale if side_path else lr,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (side_path, decays), parameters in groups.items()
    ]
