"""Checks the tensors of a checkpoint before they enter a model."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import nn

NOT_OF_A_CHECKPOINT: tuple[str, ...] = (
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "modules_to_save",
)
"""Fields of a configuration that PEFT sets or extends when it loads an adapter."""


def _name_some(names: Collection[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no NaN and no infinity; one on the meta device, whose values are elsewhere, passes.

    Args:
        tensor: Any shape and dtype.

    Returns:
        True where every number is finite.
    """
    if tensor.is_meta or tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch has few operations for 8-bit floats
    # One pass and no mask: both ends are NaN where any number is.
    return all(math.isfinite(end) for end in torch.aminmax(tensor.detach()))


def check_finite(adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors with NaN or infinite values.

    Args:
        adapter_name: The adapter's name.
        tensors: The checkpoint.

    Raises:
        ValueError: A value is not finite.
    """
    broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if broken:
        raise ValueError(
            f"the checkpoint of adapter {adapter_name!r} has NaN or infinite values in {_name_some(broken)}; train or "
            "fetch it again"
        )


def check_fit(adapter_name: str, tensors: Mapping[str, torch.Tensor], places: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that differ from their places in shape or in kind of number.

    torch would fill some places before it finds that another one does not fit.

    Args:
        adapter_name: The adapter's name.
        tensors: The checkpoint; names that are not among the places are passed over.
        places: The model's tensors.

    Raises:
        ValueError: A tensor does not fit.
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


def check_side_path(
    adapter_name: str, tensors: Mapping[str, torch.Tensor], places: Mapping[str, torch.Tensor]
) -> None:
    """Refuse a checkpoint whose side path is not exactly what its configuration says.

    Args:
        adapter_name: The adapter's name.
        tensors: The side path's tensors in the checkpoint, by the end of their name, such as
            `3.talan.lora_talan_read.values`.
        places: What the configuration gives, likewise.

    Raises:
        ValueError: A tensor is missing, has no place, or does not fit.
    """
    lists = {"no place for": tensors.keys() - places.keys(), "in addition": places.keys() - tensors.keys()}
    for how, names in lists.items():
        if names:
            raise ValueError(
                f"the checkpoint of adapter {adapter_name!r} does not have the side path of its configuration, which "
                f"has {how} {_name_some(names)}; load it with the base model and the adapter_config.json that it was "
                "saved with"
            )
    check_fit(adapter_name, tensors, places)


def check_whole_modules(adapter_name: str, tensors: Collection[str], model: nn.Module) -> None:
    """Refuse a checkpoint without the modules and tokens that are trained beside the adapter and saved whole.

    Args:
        adapter_name: The adapter's name.
        tensors: The names in the checkpoint.
        model: The model with the adapter.

    Raises:
        ValueError: A tensor is missing.
    """
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            ends = [f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name)]
            missing = [end for end in ends if not any(f".{tensor}".endswith(f".{end}") for tensor in tensors)]
            if missing:
                raise ValueError(
                    f"the checkpoint of adapter {adapter_name!r} lacks {_name_some(missing)}, which modules_to_save "
                    "or trainable_token_indices ask for; load it with the adapter_config.json that it was saved with"
                )


@dataclass(frozen=True)
class CheckpointSource:
    """Where a configuration was loaded from, and with it the tensors that PEFT will load next.

    Args:
        model_id: A folder, or a repository on the hub.
        options: What `hf_hub_download` takes: revision, subfolder, token ...
        fields: The configuration's fields as they were loaded.
    """

    model_id: str
    options: Mapping[str, Any]
    fields: str

    @staticmethod
    def describe(fields: Mapping[str, Any]) -> str:
        """Describe the fields of a configuration that PEFT leaves alone when it loads the adapter."""
        kept = {name: value for name, value in fields.items() if name not in NOT_OF_A_CHECKPOINT}
        return json.dumps(kept, sort_keys=True, default=str)

    def read(self) -> dict[str, torch.Tensor]:
        """Read the tensors as PEFT will, weights only.

        Returns:
            The tensors by name.

        Raises:
            ValueError: The file can't be read, or holds something else.
        """
        options = {name: value for name, value in self.options.items() if value is not None}
        try:
            tensors: object = load_peft_weights(self.model_id, device="cpu", **options)
        except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise ValueError(
                f"the checkpoint in {self.model_id!r} can't be read ({type(error).__name__}: {error}); it is "
                "incomplete or damaged: fetch or save it again"
            ) from error
        if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise ValueError(
                f"the checkpoint in {self.model_id!r} is no dictionary of tensors; save it again with PEFT"
            )
        return tensors
