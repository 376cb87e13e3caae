"""Builds vLLM's model with its side paths: loaders for the option `load_format`.

A merged side path's tensors are parameters by the names that they have in the folder, so vLLM loads, reloads and
checks them as all others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader import (
    BaseModelLoader,
    DefaultModelLoader,
    DummyModelLoader,
    register_model_loader,
)
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from ...checkpoint.checks import check_finite
from ...checkpoint.merged_config import MergedSidePath
from ...tuner.merged import config_of, merged_layers
from .adapter_kinds import Room, room_of
from .adapter_layer import AdapterSidePaths
from .blocks import StreamPlace, find_attention, find_blocks
from .checks import LOAD_FORMATS, LOAD_PREFIX, check_configured, check_engine
from .side_path import OPERATOR, AroundBlock, PagedSidePaths
from .strength import PageStrengths, server_strength

logger = init_logger("vllm.peft_talan")


class _Loader(BaseModelLoader):
    """Creates a model with its side paths; another base class reads their tensors."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(replace(load_config, load_format=load_config.load_format.removeprefix(LOAD_PREFIX)))

    def create_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        side_paths = check_engine(vllm_config)
        check_configured(vllm_config)
        _keep_graphs_apart(vllm_config, side_paths)
        model: nn.Module = super().create_model(vllm_config, model_config, prefix)
        device, server = torch.empty(0).device, server_strength(vllm_config)
        strengths = PageStrengths(server, vllm_config.cache_config, device)
        if side_paths:
            _create_side_paths(model, vllm_config, side_paths, strengths)
        for number, room in enumerate(room_of(vllm_config)):
            _create_adapters(model, vllm_config, number, room, strengths)
        return model

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        super().load_weights(model, model_config)
        for layer in merged_layers(model):
            for side_path in layer.side_paths.values():
                check_finite(side_path.adapter_name, dict(layer.named_parameters()))


class SidePathLoader(_Loader, DefaultModelLoader):
    """vLLM's loader of folders and repositories, for models with a side path."""


class DummySidePathLoader(_Loader, DummyModelLoader):
    """vLLM's loader of random weights, which is for profiling, for models with a side path."""


for _load_format in LOAD_FORMATS:
    _loader = DummySidePathLoader if _load_format == "dummy" else SidePathLoader
    register_model_loader(LOAD_PREFIX + _load_format)(_loader)


def layers_of(model: nn.Module) -> dict[str, AroundBlock]:
    """The layers of a model's side paths, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AroundBlock)}


def _keep_graphs_apart(vllm_config: Any, side_paths: list[MergedSidePath]) -> None:
    """Cut the compiled graphs around the operator, and let them be found again for the same side paths only."""
    operators = vllm_config.compilation_config.splitting_ops
    if operators and OPERATOR not in operators:
        operators.append(OPERATOR)
    # vLLM's cache of compiled graphs goes by a hash of the configuration.
    vllm_config.additional_config["peft_talan"] = [side_path.to_json() for side_path in side_paths]


def _create_side_paths(
    model: nn.Module, vllm_config: Any, side_paths: list[MergedSidePath], strengths: PageStrengths
) -> None:
    """Attach merged side paths to their blocks, those of earlier merges first, with values still to be loaded."""
    depth = vllm_config.model_config.hf_text_config.num_hidden_layers
    name, blocks = find_blocks(model, depth, side_paths[0].blocks[0].rpartition(".")[0])
    for layer in list(merged_layers(blocks)):
        # vLLM's Transformers backend builds the model of transformers, with side paths that know no pages.
        layer.detach(blocks[layer.block_index])
    layers: dict[tuple[int, int], PagedSidePaths] = {}
    for side_path in side_paths:
        for index in (int(block.rpartition(".")[2]) for block in side_path.blocks):
            place = (side_path.stage, index)
            if place not in layers:
                attention = find_attention(f"{name}.{index}", blocks[index])
                layers[place] = PagedSidePaths(
                    side_path.hidden_size, index, depth, side_path.stage, attention, strengths
                )
            layers[place].add_side_path(layers[place].describe(side_path), config_of(side_path))
    for (_, index), layer in layers.items():
        layer.requires_grad_(False)
        for parameter in layer.parameters():
            parameter.data.fill_(torch.nan)  # what no file fills is found
        _attach(layer, f"{name}.{index}", blocks[index], vllm_config)
        record_metadata_for_reloading(layer)
    logger.info("TALAN side paths at the blocks %s", ", ".join(sorted({str(index) for _, index in layers})))


def _create_adapters(model: nn.Module, vllm_config: Any, number: int, room: Room, strengths: PageStrengths) -> None:
    """Attach empty places for the side paths of adapters to their blocks, after those of the model."""
    config = vllm_config.model_config
    name, blocks = find_blocks(model, config.hf_text_config.num_hidden_layers, room.block_list)
    for index in room.blocks:
        attention = find_attention(f"{name}.{index}", blocks[index])
        hidden_size, slots = config.get_hidden_size(), vllm_config.lora_config.max_loras
        layer = AdapterSidePaths(room.kind, number, hidden_size, index, slots, attention, strengths)
        _attach(layer, f"{name}.{index}", blocks[index], vllm_config)
    logger.info("room for TALAN adapters at the blocks %s: %s", ", ".join(map(str, room.blocks)), room.kind)


def _attach(layer: AroundBlock, name: str, block: nn.Module, vllm_config: Any) -> None:
    layer.attach_to(block, StreamPlace.of(name, block))
    # Compiled graphs find a layer again by this name.
    vllm_config.compilation_config.static_forward_context[layer.layer_name] = layer
