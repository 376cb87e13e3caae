"""Checks a checkpoint against the places that its configuration gives it in a model."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from .checkpoint import CheckpointSource, check_finite, check_fit, check_side_path
from .config import TalanConfig
from .initialization import initial_parameters
from .layer import TalanLayer

SIDE_PATH_ENDING = f"{TalanLayer.child_name}.lora_talan_"


def is_side_path_key(key: str) -> bool:
    """Whether a tensor of this name belongs to a side path."""
    return f".{SIDE_PATH_ENDING}" in key


def read_checkpoint(
    adapter_name: str, config: TalanConfig, blocks: Collection[int], hidden_size: int
) -> dict[str, torch.Tensor]:
    """Read and check the tensors that PEFT will load, if the configuration was loaded with them.

    Args:
        adapter_name: The adapter's name.
        config: Its configuration.
        blocks: The indices of the blocks with a side path.
        hidden_size: H, the width of the residual stream.

    Returns:
        The tensors by name; none where the configuration comes from elsewhere.

    Raises:
        ValueError: The file can't be read, a value is not finite, or its side path is another one.
    """
    source = config.checkpoint_source
    if source is None or source.fields != CheckpointSource.describe(config.to_dict()):
        return {}
    tensors = source.read()
    check_finite(adapter_name, tensors)
    with torch.device("meta"):
        shapes = initial_parameters(config, hidden_size)
    places = {f"{index}.{SIDE_PATH_ENDING}{name}": tensor for index in blocks for name, tensor in shapes.items()}
    # The names of the modules around the blocks may still be mapped; the block's index may not.
    found = {".".join(name.split(".")[-3:]): tensor for name, tensor in tensors.items() if is_side_path_key(name)}
    check_side_path(adapter_name, found, places)
    return tensors


def check_places(adapter_name: str, tensors: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Refuse tensors that do not fit their places in a model, and side paths that have none.

    Args:
        adapter_name: The adapter's name.
        tensors: The checkpoint, by the names that the tensors have in the model.
        model: The model with the adapter.

    Raises:
        ValueError: A tensor does not fit, or a side path has no place.
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
