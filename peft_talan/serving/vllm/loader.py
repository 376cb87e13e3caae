"""Builds vLLM's model with its side paths and loads their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from peft.utils import load_peft_weights
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import PPMissingLayer

from ...checkpoint.checks import check_finite, check_side_path
from ...checkpoint.names import CHILD_NAME, is_side_path_key
from ...config import TalanConfig
from ...tuner.blocks import resolve_layers
from .blocks import StreamPlace, find_attention, find_blocks
from .checks import check_engine, check_scheduler
from .side_path import ADAPTER_NAME, OPERATOR, PagedSidePath
from .strength import STRENGTHS, PageStrengths, server_strength

logger = init_logger("vllm.peft_talan")


def model_with_side_paths(create: Callable[[], nn.Module], vllm_config: Any, model_config: Any) -> nn.Module:
    """Build a model, give its blocks the side paths of the adapter that it embeds, and load these.

    Args:
        create: Builds vLLM's model.
        vllm_config: vLLM's configuration.
        model_config: The model's own configuration.

    Returns:
        The model; its weights are still to be loaded.

    Raises:
        ValueError: The adapter, the model or an option of vLLM can't work.
    """
    config = check_engine(vllm_config)
    check_scheduler(vllm_config)
    depth = model_config.hf_text_config.num_hidden_layers
    indices = resolve_layers(config, depth)
    _keep_graphs_apart(vllm_config, config, indices)
    model: Any = create()
    name, blocks = find_blocks(model, depth, config.talan_blocks)
    hidden_size, server, device = model_config.get_hidden_size(), server_strength(vllm_config), torch.empty(0).device
    strengths = PageStrengths(config.talan_alpha, server, vllm_config.cache_config, device)
    known_by_name = vllm_config.compilation_config.static_forward_context
    known_by_name[STRENGTHS] = strengths
    layers = {}
    for index in indices:
        block = blocks[index]
        if not isinstance(block, PPMissingLayer):
            layers[index] = _attach(f"{name}.{index}", block, index, hidden_size, config, strengths)
    for layer in layers.values():
        known_by_name[layer.layer_name] = layer
        record_metadata_for_reloading(layer)
    if vllm_config.load_config.load_format != "dummy":
        _load(layers, config, indices, hidden_size)
    model.load_weights = partial(_load_weights, model, layers, model.load_weights)
    logger.info("TALAN side paths at the %ss of blocks %s", config.talan_position, ", ".join(map(str, layers)))
    return model


def _keep_graphs_apart(vllm_config: Any, config: TalanConfig, indices: list[int]) -> None:
    """Cut the compiled graphs around the operator, and let them be found again for the same side paths only."""
    operators = vllm_config.compilation_config.splitting_ops
    if operators and OPERATOR not in operators:
        operators.append(OPERATOR)
    # vLLM's cache of compiled graphs goes by a hash of the configuration.
    vllm_config.additional_config["peft_talan"] = {"blocks": indices, "position": config.talan_position}


def _attach(
    name: str, block: nn.Module, index: int, hidden_size: int, config: TalanConfig, strengths: PageStrengths
) -> PagedSidePath:
    layer = PagedSidePath(hidden_size, index, config, strengths, find_attention(name, block))
    place = StreamPlace.of(name, block)
    block.add_module(CHILD_NAME, layer)
    if layer.position == "input":
        block.register_forward_pre_hook(
            lambda _, args, kwargs: place.change_input(layer, args, kwargs), with_kwargs=True
        )
    else:
        block.register_forward_hook(lambda _, __, output: place.change_output(layer, output))
    return layer


def _load(layers: dict[int, PagedSidePath], config: TalanConfig, indices: list[int], hidden_size: int) -> None:
    """Read the side paths from the adapter's own file, which vLLM ignores where an index names the other files."""
    location = config.checkpoint_to_load()
    if location is None:
        raise ValueError(
            "config: it was not loaded from a folder, so there are no tensors; use TalanConfig.from_pretrained"
        )
    tensors = load_peft_weights(location.model_id, device="cpu", **location.options)
    check_finite(ADAPTER_NAME, tensors)
    check_side_path(ADAPTER_NAME, config, indices, hidden_size, tensors)
    for name, tensor in tensors.items():
        _load_tensor(layers, name, tensor)


def _load_tensor(layers: dict[int, PagedSidePath], name: str, tensor: torch.Tensor) -> None:
    """Load a tensor of a side path, unless its block is another pipeline stage's."""
    index, _, part, _ = name.split(".")[-4:]
    if int(index) in layers:
        place = getattr(layers[int(index)], part)[ADAPTER_NAME].values
        # Where vLLM reloads a model, its own loader stands at the parameter.
        getattr(place, "weight_loader", default_weight_loader)(place, tensor)


def _load_weights(
    model: nn.Module,
    layers: dict[int, PagedSidePath],
    load_others: Callable[..., set[str] | None],
    weights: Iterable[tuple[str, torch.Tensor]],
    *args: Any,
    **kwargs: Any,
) -> set[str] | None:
    """Stand for the model's `load_weights`: side-path tensors go to their layers, all others where they went."""

    def others() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if is_side_path_key(name):
                _load_tensor(layers, name, tensor)
            else:
                yield name, tensor

    loaded = load_others(others(), *args, **kwargs)
    if loaded is None:
        return None
    return loaded | {name for name, _ in model.named_parameters() if is_side_path_key(name)}
