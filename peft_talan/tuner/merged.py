"""Side paths that belong to the base model: what stays of adapters that were merged.

The weights of a merged model have the LoRA weights in them, the side path lies beside them as ordinary parameters, and
`config.json` says what it is, so whatever saves, loads, copies, shards and trains the model's weights does the same to
it. It is no adapter without LoRA weights: PEFT and transformers switch, train, save and delete whatever is a
`BaseTunerLayer`, and take each tensor for an adapter's whose name has `lora`, the adapter's type or its name in it. A
second adapter of any kind (LoRA, IA3, LoKr, prompt tuning) has to leave the side path alone, so it is a plain module,
and its tensors' names have none of these words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoint.merged_config import FIELD, MergedSidePath, axes_of_merged, child_name
from ..config import TalanConfig
from ..version import __version__
from .attachment import attached_side_paths
from .blocks import find_decoder
from .layer import TalanLayer
from .residual_streams import find_streams
from .side_path_layer import SidePathLayer


def config_of(side_path: MergedSidePath) -> TalanConfig:
    """The configuration of an adapter that is this side path alone."""
    return TalanConfig(r=0, inference_mode=True, talan_version=side_path.talan_version, **side_path.axes)


class MergedSidePaths(SidePathLayer):
    """Holds the side paths that one merge left on a block: always on, and no adapters to PEFT.

    Args:
        hidden_size: H, the width of the residual stream.
        block_index: The block's index.
        depth: The number of the model's blocks.
        stage: Which merge left them, counted from 0.
    """

    def __init__(self, hidden_size: int, block_index: int, depth: int, stage: int) -> None:
        super().__init__(hidden_size, block_index, depth)
        self.stage = stage
        self.child_name = child_name(stage)
        self.side_paths: dict[str, MergedSidePath] = {}
        # Whether the tensors were made on the meta device, for a file to fill them.
        self.awaits_values = False

    @property
    def _is_hf_initialized(self) -> bool:
        """Whether transformers may leave the tensors as they are: it asks when it has read a file, and marks these."""
        if self.awaits_values:
            for name, tensor in self.named_parameters():
                if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                    raise ValueError(
                        f"the model's config.json has a side path at block {self.block_index} whose tensor "
                        f"{self.child_name}.{name} is not in its weights; save the merged model again, or take the "
                        f"field {FIELD!r} out of config.json to load it without"
                    )
        return True

    def describe(self, side_path: MergedSidePath) -> str:
        """Take a side path's description; the result is its name in this layer, under which its tensors follow."""
        name, config = str(side_path.number), config_of(side_path)
        self.side_paths[name] = side_path
        self.talan_options[name] = config.side_path_options
        self.talan_alpha[name] = float(config.talan_alpha)
        self.talan_position[name] = config.talan_position
        return name


def merged_layers(model: nn.Module) -> Iterator[MergedSidePaths]:
    """Go through the side paths that belong to a model."""
    for module in model.modules():
        if isinstance(module, MergedSidePaths):
            yield module


def move_to_base(model: nn.Module, configs: Mapping[str, TalanConfig]) -> None:
    """Make the side paths of some adapters a part of the model; those of all other adapters are removed."""
    earlier = list(merged_layers(model))
    stage = 1 + max((layer.stage for layer in earlier), default=-1)
    first = 1 + max((int(name) for layer in earlier for name in layer.side_paths), default=-1)
    names = {module: name for name, module in model.named_modules()}
    attached = list(attached_side_paths(model))
    side_paths: list[MergedSidePath] = []
    for adapter_name, config in configs.items():
        blocks = tuple(names[block] for block, layer in attached if adapter_name in layer.talan_options)
        number, axes = first + len(side_paths), axes_of_merged(config)
        hidden_size = attached[0][1].in_features
        side_paths.append(MergedSidePath(number, stage, adapter_name, blocks, hidden_size, __version__, axes))
    for block, layer in attached:
        layer.detach(block)
        here = [side_path for side_path in side_paths if names[block] in side_path.blocks]
        if here:
            merged = MergedSidePaths(layer.in_features, layer.block_index, layer.depth, stage)
            for side_path in here:
                _take(merged, merged.describe(side_path), layer, side_path.adapter_name)
            merged.train(layer.training)
            merged.attach(block, find_decoder(model, names[block]), find_streams(model, names[block]))
            merged.requires_grad_(False)
            merged.to(merged.placement.dtype)  # what the model's own tensors have, as in a model that is loaded
    _write_to_configs(model, side_paths)


def _take(merged: MergedSidePaths, name: str, layer: TalanLayer, adapter_name: str) -> None:
    for source, target in zip(layer.adapter_layer_names, merged.adapter_layer_names, strict=True):
        container = getattr(layer, source)
        if adapter_name in container:
            # The module itself: accelerate's hooks sit on it.
            getattr(merged, target)[name] = container[adapter_name]
    merged.talan_strength[name] = layer.talan_strength.get(adapter_name, 1.0)


def _write_to_configs(model: nn.Module, side_paths: list[MergedSidePath]) -> None:
    """Describe side paths in the configuration that is saved with their blocks; models outside share none of it."""
    for place, root in model.named_modules():
        inside = f"{place}." if place else ""
        here = [side_path for side_path in side_paths if side_path.blocks[0].startswith(inside)]
        if not isinstance(root, PreTrainedModel) or not here:
            continue
        _copy_config(root)
        for side_path in here:
            blocks = [block.removeprefix(inside) for block in side_path.blocks]
            owner, config = _config_with(root, blocks[0])
            relative = [block.removeprefix(f"{owner}.") if owner else block for block in blocks]
            entry = {**side_path.to_json(), "blocks": relative}
            setattr(config, FIELD, [*(getattr(config, FIELD, None) or ()), entry])
            for guarded in (root.config, config):
                guarded.fusion_config = {**(getattr(guarded, "fusion_config", None) or {}), FIELD: False}
        side_paths = [side_path for side_path in side_paths if side_path not in here]


def _copy_config(model: PreTrainedModel) -> None:
    """Give a model a configuration of its own, wherever its modules hold it or a part of it."""
    copies: dict[int, Any] = {}
    deepcopy(model.config, copies)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                vars(module)[name] = copies[id(value)]


def _config_with(root: PreTrainedModel, block_name: str) -> tuple[str, Any]:
    """The innermost part of a model's saved configuration that belongs to one module with this block, and its name."""
    saved = [root.config]
    for config in saved:
        parts = (getattr(config, name, None) for name in config.sub_configs)
        saved += [part for part in parts if isinstance(part, PreTrainedConfig)]
    path = block_name.split(".")
    around = [root.get_submodule(".".join(path[:end])) for end in range(len(path) - 1, -1, -1)]
    for config in (module.config for module in around if isinstance(module, PreTrainedModel)):
        holders = [
            name for name, one in root.named_modules() if isinstance(one, PreTrainedModel) and one.config is config
        ]
        outermost, *others = holders
        apart = outermost and not all(name.startswith(f"{outermost}.") for name in others)
        if any(config is one for one in saved) and not apart:
            return outermost, config
    return "", root.config


def attach_described(model: PreTrainedModel) -> None:
    """Give a model that was just built the side paths of its configuration, before their values are loaded."""
    side_paths = [MergedSidePath.from_json(entry) for entry in getattr(model.config, FIELD)]
    layers: dict[tuple[int, str], MergedSidePaths] = {}
    for side_path in sorted(side_paths, key=lambda one: (one.stage, one.number)):
        for described in side_path.blocks:
            name = _find(model, described)
            if name is None:
                continue
            place, block = (side_path.stage, name), model.get_submodule(name)
            if place not in layers:
                if hasattr(block, child_name(side_path.stage)):
                    continue  # from an inner model's construction
                parent, _, index = name.rpartition(".")
                blocks: Any = model.get_submodule(parent)
                layers[place] = MergedSidePaths(side_path.hidden_size, int(index), len(blocks), side_path.stage)
                layers[place].attach(block, find_decoder(model, name), find_streams(model, name))
            layer, device = layers[place], next(block.parameters()).device
            layer.awaits_values = device.type == "meta"
            # Without that, they are fresh, and have no effect.
            with torch.device(device):
                layer.add_side_path(layer.describe(side_path), config_of(side_path))


def _find(model: PreTrainedModel, block_name: str) -> str | None:
    """The name that a block has in this model, which may be the described one without its head."""
    for name in (block_name, block_name.removeprefix(f"{model.base_model_prefix}.")):
        try:
            model.get_submodule(name)
        except AttributeError:
            continue
        return name
    return None
