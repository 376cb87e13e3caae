"""Builds vLLM's model with its side paths and loads their tensors: loaders for the option `load_format`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from peft.utils import load_peft_weights
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader import (
    BaseModelLoader,
    DefaultModelLoader,
    DummyModelLoader,
    register_model_loader,
)
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from ...checkpoint.checks import check_finite, check_side_path
from ...checkpoint.names import CHILD_NAME, is_side_path_key
from ...config import TalanConfig
from ...tuner.blocks import resolve_layers
from .blocks import StreamPlace, find_attention, find_blocks
from .checks import LOAD_FORMATS, LOAD_PREFIX, check_configured, check_engine, read_config
from .side_path import ADAPTER_NAME, OPERATOR, PagedSidePath
from .strength import PageStrengths, server_strength

logger = init_logger("vllm.peft_talan")


class _SidePathCreator(BaseModelLoader):  # type: ignore[misc]
    """Creates a model with its side paths; where tensors come from is another base class's matter."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(replace(load_config, load_format=load_config.load_format.removeprefix(LOAD_PREFIX)))

    def create_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """Create the model, as vLLM does, and its side paths.

        Args:
            vllm_config: vLLM's configuration.
            model_config: The model's own configuration.
            prefix: As in vLLM.

        Returns:
            The model; its weights are still to be loaded.

        Raises:
            ValueError: The adapter, the model or an option of vLLM can't work.
        """
        config = check_engine(vllm_config)
        check_configured(vllm_config)
        indices = resolve_layers(config, model_config.hf_text_config.num_hidden_layers)
        _keep_graphs_apart(vllm_config, config, indices)
        model: nn.Module = super().create_model(vllm_config, model_config, prefix)
        _create_side_paths(model, vllm_config, config, indices)
        logger.info("TALAN side paths at the %ss of blocks %s", config.talan_position, ", ".join(map(str, indices)))
        return model


class SidePathLoader(_SidePathCreator, DefaultModelLoader):  # type: ignore[misc]
    """vLLM's loader of folders and repositories, for models that embed a side path."""

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Load the side path, and read all other tensors, as vLLM does, when it loads a model and when it reloads one.

        Args:
            model_config: The model's own configuration.
            model: The model.

        Yields:
            The names and the tensors.
        """
        _load_side_paths(model, model_config)
        for name, tensor in super().get_all_weights(model_config, model):
            if not is_side_path_key(name):
                yield name, tensor


class DummySidePathLoader(_SidePathCreator, DummyModelLoader):  # type: ignore[misc]
    """vLLM's loader of random weights, which is for profiling, for models that embed a side path."""


for _load_format in LOAD_FORMATS:
    register_model_loader(LOAD_PREFIX + _load_format)(
        DummySidePathLoader if _load_format == "dummy" else SidePathLoader
    )


def side_paths_of(model: nn.Module) -> dict[int, PagedSidePath]:
    """Find a model's side paths.

    Args:
        model: vLLM's model.

    Returns:
        The side paths by block.
    """
    return {module.block_index: module for module in model.modules() if isinstance(module, PagedSidePath)}


def _keep_graphs_apart(vllm_config: Any, config: TalanConfig, indices: list[int]) -> None:
    """Cut the compiled graphs around the operator, and let them be found again for the same side paths only."""
    operators = vllm_config.compilation_config.splitting_ops
    if operators and OPERATOR not in operators:
        operators.append(OPERATOR)
    # vLLM's cache of compiled graphs goes by a hash of the configuration.
    vllm_config.additional_config["peft_talan"] = {"blocks": indices, "position": config.talan_position}


def _create_side_paths(model: nn.Module, vllm_config: Any, config: TalanConfig, indices: list[int]) -> None:
    """Attach an empty side path to each of its blocks."""
    depth = vllm_config.model_config.hf_text_config.num_hidden_layers
    name, blocks = find_blocks(model, depth, config.talan_blocks)
    hidden_size, device = vllm_config.model_config.get_hidden_size(), torch.empty(0).device
    strengths = PageStrengths(config.talan_alpha, server_strength(vllm_config), vllm_config.cache_config, device)
    for index in indices:
        attention = find_attention(f"{name}.{index}", blocks[index])
        layer = PagedSidePath(hidden_size, index, config, strengths, attention)
        _attach(f"{name}.{index}", blocks[index], layer)
        # By these names compiled graphs find a layer again.
        vllm_config.compilation_config.static_forward_context[layer.layer_name] = layer
        record_metadata_for_reloading(layer)


def _attach(name: str, block: nn.Module, layer: PagedSidePath) -> None:
    """Let a side path act at one end of its block."""
    place = StreamPlace.of(name, block)
    block.add_module(CHILD_NAME, layer)
    if layer.config.talan_position == "input":
        block.register_forward_pre_hook(
            lambda _, args, kwargs: place.change_input(layer, args, kwargs), with_kwargs=True
        )
    else:
        block.register_forward_hook(lambda _, __, output: place.change_output(layer, output))


def _load_side_paths(model: nn.Module, model_config: Any) -> None:
    """Read the side paths from the adapter's own file, which vLLM ignores where an index names the other files."""
    layers, config = side_paths_of(model), read_config(model_config)
    one = next(iter(layers.values()))
    names = [field.name for field in fields(config) if field.name.startswith("talan_")]
    changed = [name for name in names if getattr(config, name) != getattr(one.config, name)]
    if changed:
        raise ValueError(
            f"model={model_config.model!r}: {', '.join(changed)} of its adapter differ from those that the engine was "
            "started with; start another engine for it"
        )
    location = config.checkpoint_to_load()
    if location is None:
        raise ValueError(
            "config: it was not loaded from a folder, so there are no tensors; use TalanConfig.from_pretrained"
        )
    tensors = load_peft_weights(location.model_id, device="cpu", **location.options)
    check_finite(ADAPTER_NAME, tensors)
    check_side_path(ADAPTER_NAME, config, layers, one.hidden_size, tensors)
    for name, tensor in tensors.items():
        index, _, part, _ = name.split(".")[-4:]
        place = getattr(layers[int(index)], part.removeprefix("lora_talan_"))
        # Where vLLM reloads a model, its own loader stands at the tensor.
        getattr(place, "weight_loader", default_weight_loader)(place, tensor)
