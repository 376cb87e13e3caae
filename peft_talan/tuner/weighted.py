"""The side path of an adapter that is a weighted sum of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraModel
from torch import nn

from ..config import TalanConfig
from .layer import TalanLayer

AXES: tuple[str, ...] = (
    "talan_position",
    "talan_slots",
    "talan_dim",
    "talan_mixer",
    "talan_soft_cap",
    "talan_writeback",
    "talan_memory_scope",
)
NOT_SUMMED: tuple[str, ...] = ("use_dora", "modules_to_save", "trainable_token_indices")
"""Options of `LoraConfig` whose trained tensors PEFT leaves out of a weighted sum."""


class SidePathSource(NamedTuple):
    """Where a block's side path comes from.

    Args:
        adapter_name: The adapter that is copied.
        factor: What its write-back is multiplied by.
    """

    adapter_name: str
    factor: float


class WeightedSidePaths(NamedTuple):
    """The side paths of a weighted sum of adapters.

    Args:
        fields: The fields of the new adapter's `TalanConfig`.
        sources: Where the side path of each block comes from, by the block's index.
    """

    fields: dict[str, Any]
    sources: dict[int, SidePathSource]


def _axes(config: TalanConfig, weight: float) -> dict[str, Any]:
    """The axes of a side path whose perturbation is multiplied by a weight; of a capped one, so is the cap."""
    axes = {axis: getattr(config, axis) for axis in AXES}
    return {**axes, "talan_cap": abs(weight) * config.talan_cap} if config.talan_writeback == "capped" else axes


def _check_summands(configs: Mapping[str, TalanConfig], adapters: Sequence[str], weights: Sequence[float]) -> None:
    if not adapters or len(set(adapters)) != len(adapters):
        raise ValueError(f"adapters={adapters!r}: name at least one adapter, and each once")
    if len(adapters) != len(weights):
        raise ValueError(f"weights={weights!r}: give one for each of adapters={adapters!r}")
    for name in adapters:
        if name not in configs:
            raise ValueError(f"adapters={adapters!r}: adapter {name!r} does not exist; there are {sorted(configs)}")
        for option in NOT_SUMMED:
            if getattr(configs[name], option):
                raise ValueError(
                    f"{option}={getattr(configs[name], option)!r} of adapter {name!r}: a weighted sum would leave out "
                    "what was trained for it; use the adapter by itself"
                )


def weigh_side_paths(
    model: nn.Module, configs: Mapping[str, TalanConfig], adapters: Sequence[str], weights: Sequence[float]
) -> WeightedSidePaths:
    """Find the side paths whose perturbations are the weighted sums of those of several adapters.

    A perturbation is linear in W_write, so a weight is a factor of it. The sum of two at one block is not a side path,
    as the softmax goes over the slots of one.
    """
    _check_summands(configs, adapters, weights)
    axes: dict[str, tuple[str, Any]] = {}
    sources: dict[int, SidePathSource] = {}
    for layer in (module for module in model.modules() if isinstance(module, TalanLayer)):
        for name, weight in zip(adapters, weights, strict=True):
            factor = weight * layer.talan_alpha.get(name, 0.0)
            if not factor or not layer.parameters_of(name).write.any():
                continue
            if layer.block_index in sources:
                other = sources[layer.block_index].adapter_name
                raise ValueError(
                    f"adapters={adapters!r}: {other!r} and {name!r} both have a side path at block "
                    f"{layer.block_index}, and the sum of two side paths is none; give one of them the weight 0, or "
                    "activate both with model.base_model.set_adapter([...]), where their perturbations add up"
                )
            for axis, value in _axes(configs[name], weight).items():
                other, value_there = axes.setdefault(axis, (name, value))
                if value_there != value:
                    raise ValueError(
                        f"{axis}={value!r} of adapter {name!r} with weight {weight} is {value_there!r} for {other!r}, "
                        "and an adapter has one for all its blocks; activate both with "
                        "model.base_model.set_adapter([...])"
                    )
            sources[layer.block_index] = SidePathSource(name, factor)
    fields = {axis: value for axis, (_, value) in axes.items()}
    if sources:
        fields.update(talan_layers=sorted(sources), talan_alpha=1.0)
    return WeightedSidePaths({**fields, "init_talan_weights": True}, sources)


@torch.no_grad()
def copy_side_paths(model: nn.Module, sources: Mapping[int, SidePathSource], adapter_name: str) -> None:
    """Fill an adapter's side paths from those of others."""
    for layer in (module for module in model.modules() if isinstance(module, TalanLayer)):
        if adapter_name in layer.talan_options and layer.block_index in sources:
            source, factor = sources[layer.block_index]
            for name in layer.adapter_layer_names:
                container = getattr(layer, name)
                if source in container:
                    scale = factor if name == "lora_talan_write" else 1.0
                    container[adapter_name].values.data = container[source].values * scale


def add_weighted_adapter(
    tuner: LoraModel,
    combine_low_rank: Callable[[list[str], list[float]], None],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
) -> None:
    """Add an adapter that is the weighted sum of others; see `weigh_side_paths` for what has one."""
    configs: dict[str, Any] = tuner.peft_config
    if adapter_name in configs:
        raise ValueError(
            f"adapter_name={adapter_name!r}: an adapter of this name exists; delete it, or choose another name"
        )
    side_paths = weigh_side_paths(tuner.model, configs, adapters, weights)
    low_rank = {name: weight for name, weight in zip(adapters, weights, strict=True) if configs[name].has_lora_weights}
    first = next(iter(low_rank), adapters[0])
    first_config = configs[first]
    # PEFT multiplies the scaling into the matrices, but would apply rsLoRA's to the sum once more.
    config = replace(first_config, use_rslora=False, **side_paths.fields)
    try:
        if low_rank:
            configs[first] = config  # PEFT makes the new configuration from the first one's.
            combine_low_rank(list(low_rank), list(low_rank.values()))
        else:
            configs[adapter_name] = config
            tuner.inject_adapter(tuner.model, adapter_name)
    except Exception:
        if adapter_name in configs:
            tuner.delete_adapter(adapter_name)
        raise
    finally:
        configs[first] = first_config
    copy_side_paths(tuner.model, side_paths.sources, adapter_name)
