"""Tensor parallelism by transformers: the same side path on every process, and LoRA's true widths."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from .attachment import attached_side_paths
from .layer import TalanLayer

SPLITS_TOKENS = "sequence_parallel"
"""The style of transformers that shares the tokens of one sequence out among the processes."""


def _tensor_parallel_mesh(model: nn.Module) -> Any:
    """The processes that the model's matrices are split over, or None if there is one process."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or "tp" not in (mesh.mesh_dim_names or ("tp",)):
        return None
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    return mesh if mesh.size() > 1 else None


def check_plan(model: nn.Module) -> None:
    """Refuse a plan under which a process does not see the whole sequence."""
    if _tensor_parallel_mesh(model) is None:
        return
    splitting = [name for name, style in (getattr(model, "tp_plan", None) or {}).items() if style == SPLITS_TOKENS]
    if splitting:
        raise ValueError(
            f"tp_plan: {splitting[0]!r} has the style {SPLITS_TOKENS!r}, under which a process sees a part of the "
            "sequence only, but the latent memory needs all of it; take such entries out of the plan"
        )


def synchronize(model: nn.Module, adapter_name: str) -> None:
    """Make a new adapter fit a model that several processes share by tensor parallelism.

    Each process draws its own random weights, so the first one's side path is given to all; PEFT does it for LoRA.
    The `in_features` of a split low-rank input matrix become its own width, which transformers reads.
    """
    mesh = _tensor_parallel_mesh(model)
    if mesh is None:
        return
    group = mesh.get_group()
    first = torch.distributed.get_global_rank(group, 0)
    for _, layer in attached_side_paths(model):
        for parameter in _parameters(layer, adapter_name):
            if not parameter.is_meta:
                torch.distributed.broadcast(parameter.data, src=first, group=group)
    for module in model.modules():
        if not isinstance(module, LoraLayer) or adapter_name not in module.lora_A:
            continue
        inner = module.lora_A[adapter_name]
        if isinstance(inner, nn.Linear):
            inner.in_features = inner.weight.shape[1]


def _parameters(layer: TalanLayer, adapter_name: str) -> list[nn.Parameter]:
    containers = [getattr(layer, name) for name in layer.adapter_layer_names]
    return [container[adapter_name].values for container in containers if adapter_name in container]
