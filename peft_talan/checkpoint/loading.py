"""Checks the checkpoint of an adapter against the model that it is to enter."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from ..config import TalanConfig
from ..functional.initialization import empty_parameters
from .checks import CheckpointSource, check_finite, check_fit, check_side_path
from .names import CHILD_NAME, is_side_path_key


def read_checkpoint(
    adapter_name: str, config: TalanConfig, blocks: Collection[int], hidden_size: int
) -> dict[str, torch.Tensor]:
    """Read the tensors that PEFT will load, and check the side path's before the model is touched.

    Args:
        adapter_name: The adapter's name.
        config: Its configuration, which knows the checkpoint if it was loaded with it.
        blocks: The indices of the blocks with a side path.
        hidden_size: H, the width of the residual stream.

    Returns:
        The tensors of the low-rank half, which has places only once it is injected; none where there is no checkpoint.

    Raises:
        ValueError: The checkpoint can't be read, is not finite, or has not the side path of its configuration.
    """
    source = config.checkpoint_source
    if source is None or source.fields != CheckpointSource.describe(config.to_dict()):
        return {}
    tensors = source.read()
    check_finite(adapter_name, tensors)
    shapes = empty_parameters(config.side_path_options, hidden_size, config.talan_slots, config.talan_dim)
    places = {
        f"{index}.{CHILD_NAME}.lora_talan_{name}.values": tensor for index in blocks for name, tensor in shapes.items()
    }
    # PEFT may still map the names of the modules around the blocks (`key_mapping`), but not a block's index.
    found = {".".join(name.split(".")[-4:]): tensor for name, tensor in tensors.items() if is_side_path_key(name)}
    check_side_path(adapter_name, found, places)
    return {name: tensor for name, tensor in tensors.items() if not is_side_path_key(name)}


def check_places(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that do not fit their places, and side-path tensors that have none.

    Args:
        model: The model with the adapter.
        adapter_name: The adapter's name.
        tensors: The checkpoint, by the names that the adapter's tensors have in the model.

    Raises:
        ValueError: A tensor does not fit, or has no place.
    """
    known = model.state_dict()
    prefix = "base_model.model."
    placed = {}
    for key, tensor in tensors.items():
        name = next((name for name in (key, key.removeprefix(prefix), prefix + key) if name in known), None)
        if name is not None:
            placed[name] = tensor
        elif is_side_path_key(key):
            # PEFT passes over what has no place; here it would be half an adapter without a word.
            raise ValueError(
                f"the checkpoint of adapter {adapter_name!r} has a side-path tensor that its configuration has no "
                f"place for: {key}; load it with the adapter_config.json that it was saved with"
            )
    check_fit(adapter_name, placed, known)
