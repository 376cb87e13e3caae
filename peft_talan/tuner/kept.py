"""Side paths that belong to the base model: what stays of an adapter that was merged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

from ..checkpoint.names import CHILD_NAME
from ..config import TalanConfig
from .attachment import attached_side_paths
from .blocks import find_decoder
from .layer import TalanLayer
from .side_path_layer import SidePathLayer

KEPT_TENSOR = re.compile(r"(.*\.)?kept_side_path_\d+\.(\w+)\.\d+\.values")
"""Names like `model.layers.3.kept_side_path_0.read.0.values`."""


class KeptSidePaths(SidePathLayer):
    """Holds the side paths that one merge left on a block: frozen, always on, and no adapters to PEFT.

    PEFT and transformers switch, train, save and delete what is a `BaseTunerLayer`, and find an adapter's tensors by
    `lora`, by the name of its type or by its own name in theirs. This layer is none, and its tensors' names have none.

    Args:
        layer: The side paths as they were before the merge, detached from their block.
        configs: The configurations of those that stay, by adapter name.
        stage: The number of earlier merges that left side paths on the model.
    """

    def __init__(self, layer: TalanLayer, configs: Mapping[str, TalanConfig], stage: int) -> None:
        super().__init__(layer.in_features, layer.block_index, layer.depth)
        self.stage = stage
        self.child_name = f"kept_side_path_{stage}"
        self.configs: dict[str, TalanConfig] = {}
        self.adapter_names: dict[str, str] = {}
        for number, (adapter_name, config) in enumerate(configs.items()):
            if adapter_name in layer.talan_options:
                self._take(str(number), layer, adapter_name, config)
        self.train(layer.training)

    def _take(self, name: str, layer: TalanLayer, adapter_name: str, config: TalanConfig) -> None:
        for source, target in zip(layer.adapter_layer_names, self.adapter_layer_names, strict=True):
            container = getattr(layer, source)
            if adapter_name in container:
                # The module itself: accelerate's hooks sit on it.
                getattr(self, target)[name] = container[adapter_name]
        self.configs[name], self.adapter_names[name] = config, adapter_name
        self.talan_options[name] = config.side_path_options
        self.talan_alpha[name] = layer.talan_alpha[adapter_name]
        self.talan_position[name] = layer.talan_position[adapter_name]
        self.talan_strength[name] = layer.talan_strength.get(adapter_name, 1.0)


def kept_side_paths(model: nn.Module) -> Iterator[KeptSidePaths]:
    """Go through the side paths that belong to a model.

    Args:
        model: The model.

    Yields:
        The layers of kept side paths.
    """
    for module in model.modules():
        if isinstance(module, KeptSidePaths):
            yield module


def move_to_base(model: nn.Module, configs: Mapping[str, TalanConfig]) -> None:
    """Make the side paths of some adapters a part of the model; those of all other adapters are removed.

    Args:
        model: The model, unwrapped.
        configs: The configurations of the side paths that stay, by adapter name.
    """
    stage = 1 + max((layer.stage for layer in kept_side_paths(model)), default=-1)
    names = {module: name for name, module in model.named_modules()}
    for block, layer in attached_side_paths(model):
        layer.detach(block)
        kept = KeptSidePaths(layer, configs, stage)
        if not kept.talan_options:
            continue
        kept.attach(block, find_decoder(model, names[block]))
        kept.requires_grad_(False)
        kept.to(kept.placement.dtype)  # the type that a model has which is loaded with an embedded adapter


def kept_tensor_name(name: str) -> str | None:
    """The name that a kept side path's tensor has in the file of an embedded adapter.

    Args:
        name: A name in the model's state dict.

    Returns:
        The name, or None if the tensor is not that of a kept side path.
    """
    found = KEPT_TENSOR.fullmatch(name)
    return None if found is None else f"{found[1]}{CHILD_NAME}.{TalanLayer.tensor_prefix}{found[2]}.values"
