"""Side paths on a model's blocks: attaches them, goes through them, takes them off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..private_names import _set_layer_requires_grad
from .blocks import find_decoder
from .layer import TalanLayer
from .residual_streams import find_streams


def attach_side_path(
    tuner: LoraModel, index: int, depth: int, hidden_size: int, block_name: str, adapter_name: str
) -> None:
    """Give a block an adapter's side path, in the state that the model's other tuner layers are in."""
    config: Any = tuner.peft_config[adapter_name]
    block = tuner.model.get_submodule(block_name)
    layer = getattr(block, TalanLayer.child_name, None)
    if layer is None:
        layer = TalanLayer(hidden_size, index, depth)
        layer.train(block.training)
        # A first adapter is on.
        modules = tuner.model.modules() if len(tuner.peft_config) > 1 else ()
        others = [module for module in modules if isinstance(module, BaseTunerLayer)]
        layer.attach(block, find_decoder(tuner.model, block_name), find_streams(tuner.model, block_name))
        layer.set_adapter(tuner.active_adapters)
        layer.enable_adapters(not any(other.disable_adapters for other in others))
    layer.add_side_path(adapter_name, config)
    trains = adapter_name in tuner.active_adapters and not config.inference_mode
    for name in layer.adapter_layer_names:
        container = getattr(layer, name)
        if adapter_name in container:
            _set_layer_requires_grad(container[adapter_name], trains)


def attached_side_paths(model: nn.Module) -> Iterator[tuple[nn.Module, TalanLayer]]:
    """Go through the blocks that have side paths."""
    for module in list(model.modules()):
        # Its own child: wrappers (FSDP, compiled modules) show what lies in the module that they wrap.
        layer = module._modules.get(TalanLayer.child_name)
        if isinstance(layer, TalanLayer):
            yield module, layer


def fresh_side_paths(model: nn.Module, adapter_name: str) -> list[tuple[nn.Module, TalanLayer]]:
    """The blocks with an adapter's side paths, which must not have been trained: their write-back is zero."""
    found = [(block, layer) for block, layer in attached_side_paths(model) if adapter_name in layer.talan_options]
    if not found:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no TALAN adapter of this name")
    if any(layer.parameters_of(adapter_name).write.any() for _, layer in found):
        raise ValueError(
            f"adapter_name={adapter_name!r}: its write-back isn't zero, so another read would change what it does; "
            "give an adapter that is fresh"
        )
    return found


def detach_side_paths(model: nn.Module) -> None:
    """Take every side path off its block."""
    for block, layer in attached_side_paths(model):
        layer.detach(block)
