"""Checks the checkpoint of an adapter: its file before the model is touched, its values as they are loaded."""

from __future__ import annotations

import math
import pickle
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import nn

from ..config import CheckpointLocation, TalanConfig
from ..functional.initialization import parameter_shapes
from .adapter_file import TensorHead, heads_of
from .names import CHILD_NAME, is_side_path_key


def _name_some(names: Collection[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no NaN and no infinity; one on the meta device, whose values are elsewhere, passes."""
    if tensor.is_meta or tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch has few operations for 8-bit floats
    # One pass and no mask: both ends are NaN if any number is.
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low) and math.isfinite(high)


def check_finite(adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors with NaN or infinite values."""
    broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if broken:
        raise ValueError(
            f"the checkpoint of adapter {adapter_name!r} has NaN or infinite values in {_name_some(broken)}; train or "
            "fetch it again"
        )


def check_fit(
    adapter_name: str, tensors: Mapping[str, torch.Tensor | TensorHead], places: Mapping[str, torch.Tensor]
) -> None:
    """Refuse tensors that differ from their places in shape or in kind of number.

    torch would fill some places before it finds that another one does not fit.
    """
    for name, tensor in tensors.items():
        place = places.get(name)
        if place is None or not place.is_floating_point():
            continue
        if tensor.shape != place.shape:
            raise ValueError(
                f"the checkpoint of adapter {adapter_name!r} has a size mismatch for {name}: shape "
                f"{tuple(tensor.shape)}, where the model has {tuple(place.shape)}; load it with the base model and "
                "the adapter_config.json that it was saved with"
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"the checkpoint of adapter {adapter_name!r} has {tensor.dtype} in {name}, where the model has "
                f"{place.dtype}; save it in a floating-point dtype"
            )


def _safetensors_file(location: CheckpointLocation) -> Path | None:
    """The file that PEFT will read; None if the checkpoint is a pickle."""
    folder = Path(location.model_id, location.options.get("subfolder") or "")
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).exists():
            return folder / name if name == SAFETENSORS_WEIGHTS_NAME else None
    try:
        return Path(hf_hub_download(location.model_id, SAFETENSORS_WEIGHTS_NAME, **location.options))
    except EntryNotFoundError:
        return None


class Header(NamedTuple):
    """What a checkpoint holds, without values.

    Args:
        names: The names of all tensors.
        side_path: The tensors of the side path by name, as far as they have to be read.
    """

    names: Collection[str]
    side_path: Mapping[str, torch.Tensor | TensorHead]


def read_header(location: CheckpointLocation) -> Header:
    """Read what PEFT will load, without its values."""
    try:
        file = _safetensors_file(location)
        if file is not None:
            with safe_open(file, framework="numpy") as opened:
                names = opened.keys()
                return Header(names, heads_of(opened, filter(is_side_path_key, names)))
        # A pickle has no header. PEFT reads it with weights only: no code in it runs.
        tensors: object = load_peft_weights(location.model_id, device="cpu", **location.options)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"the checkpoint in {location.model_id!r} can't be read ({type(error).__name__}: {error}); it is "
            "incomplete or damaged: fetch or save it again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(
            f"the checkpoint in {location.model_id!r} is not a dictionary of tensors; save it again with PEFT"
        )
    return Header(tensors.keys(), {name: tensor for name, tensor in tensors.items() if is_side_path_key(name)})


def check_side_path(
    adapter_name: str,
    config: TalanConfig,
    blocks: Collection[int],
    hidden_size: int,
    tensors: Mapping[str, torch.Tensor | TensorHead],
) -> None:
    """Refuse a checkpoint whose side path is not exactly what its configuration says."""
    shapes = parameter_shapes(config.side_path_options, hidden_size, config.talan_slots, config.talan_dim)
    places = {
        f"{index}.{CHILD_NAME}.lora_talan_{name}.values": torch.empty(shape, device="meta")
        for index in blocks
        for name, shape in shapes.items()
    }
    # PEFT may still map the names of the modules around the blocks (`key_mapping`), but not a block's index.
    tensors = {".".join(name.split(".")[-4:]): tensor for name, tensor in tensors.items()}
    lists = {"no place for": tensors.keys() - places.keys(), "in addition": places.keys() - tensors.keys()}
    for how, names in lists.items():
        if names:
            raise ValueError(
                f"the checkpoint of adapter {adapter_name!r} does not have the side path of its configuration, which "
                f"has {how} {_name_some(names)}; load it with the base model and the adapter_config.json that it was "
                "saved with"
            )
    check_fit(adapter_name, tensors, places)


def _parameters_of(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The parameters of some names, in a fraction of the time of going through the whole adapted model."""
    found: dict[str, torch.Tensor] = {}
    for name in names:
        *path, last = name.split(".")
        owner: nn.Module | None = model
        for part in path:
            owner = None if owner is None else owner._modules.get(part)
        parameter = None if owner is None else owner._parameters.get(last)
        if parameter is not None:
            found[name] = parameter
    return found


def check_places(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that do not fit their places, and side-path tensors that have none."""
    known = _parameters_of(model, tensors)
    if len(known) < len(tensors):
        # Buffers, and names without the wrappers that modules have; it takes ten times as long.
        known = model.state_dict()
    prefix = "base_model.model."
    placed = {key: tensor for key, tensor in tensors.items() if key in known}
    for key, tensor in tensors.items() if len(placed) < len(tensors) else ():
        name = next((name for name in (key, key.removeprefix(prefix), prefix + key) if name in known), None)
        if name is not None:
            placed[name] = tensor
        elif is_side_path_key(key):
            # PEFT ignores a tensor without a place, which would load half an adapter silently.
            raise ValueError(
                f"the checkpoint of adapter {adapter_name!r} has a side-path tensor that its configuration has no "
                f"place for: {key}; load it with the adapter_config.json that it was saved with"
            )
    check_fit(adapter_name, placed, known)


def check_whole_modules(adapter_name: str, tensors: Collection[str], model: nn.Module) -> None:
    """Refuse a checkpoint without the modules and tokens that are trained beside the adapter and saved whole."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            ends = [f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name)]
            missing = [end for end in ends if not any(f".{tensor}".endswith(f".{end}") for tensor in tensors)]
            if missing:
                raise ValueError(
                    f"the checkpoint of adapter {adapter_name!r} lacks {_name_some(missing)}, which modules_to_save "
                    "or trainable_token_indices ask for; load it with the adapter_config.json that it was saved with"
                )
