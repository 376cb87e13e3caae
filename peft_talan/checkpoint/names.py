"""The names of adapters and of their tensors: those that can't be, and those by which tensors are found."""

from __future__ import annotations

from collections.abc import Collection

import torch
from peft.tuners.tuners_utils import _get_tuner_state_dict_key_prefixes
from torch import nn

CHILD_NAME = "talan"
"""The name under which a side path becomes a child of its block."""

WRAPPERS: tuple[str, ...] = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a module's name that torch leaves out of the names in a state dict."""


def is_side_path_key(name: str) -> bool:
    """Whether a name in a state dict or a checkpoint is that of a side path's tensor.

    Args:
        name: The name.

    Returns:
        True for a side path's tensor, False for every other.
    """
    return f".{CHILD_NAME}.lora_talan_" in name


def check_new_name(adapter_name: str) -> None:
    """Refuse a name that an adapter can't have, as adapters are entries of an `nn.ModuleDict` under their names.

    Args:
        adapter_name: The name of an adapter that is to be made.

    Raises:
        ValueError: The name is empty, has a dot, is one of PyTorch's own, or stands for no adapter in mixed batches.
    """
    if not adapter_name or "." in adapter_name or adapter_name == "__base__" or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r}: choose a name that is not empty, has no dot, and is neither '__base__' "
            "nor the name of an attribute of nn.ModuleDict"
        )


def without_wrappers(name: str) -> str:
    """Take the wrappers that torch puts around modules out of a name.

    Args:
        name: The name of a module or a tensor.

    Returns:
        The name that a state dict has for it.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def with_wrappers(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name the tensors of a state dict as the modules are named that hold them, by which PEFT finds an adapter's.

    PEFT itself looks for a wrapper around the whole model only.

    Args:
        model: The model, perhaps with wrapped parts.
        state_dict: Its tensors, by names without wrappers.

    Returns:
        The same tensors; as PEFT has it, the name of a wrapper around the whole model is left out.
    """
    whole = f"{WRAPPERS[0]}."
    # A wrapper comes before the module in it, which thus has the last word.
    names = {without_wrappers(name): name.removeprefix(whole) for name, _ in model.named_modules()} | {"": ""}
    places = ((name.rpartition("."), tensor) for name, tensor in state_dict.items())
    return {f"{names.get(place, place)}{dot}{last}": tensor for (place, dot, last), tensor in places}


def check_names(model: nn.Module, adapter_name: str, others: Collection[str]) -> None:
    """Refuse to save an adapter while another one has the name of a module that the adapter lies in.

    PEFT leaves out every tensor whose name holds another adapter's name as one of its parts.

    Args:
        model: The model with the adapters.
        adapter_name: The adapter to save.
        others: The names of the other adapters.

    Raises:
        ValueError: Another adapter has such a name.
    """
    for place in sorted(_get_tuner_state_dict_key_prefixes(model, adapter_name)):
        confused = set(place.split(".")[:-1]) & set(others)
        if confused:
            raise ValueError(
                f"adapter {adapter_name!r} would be saved without {place}: another adapter has the name "
                f"{confused.pop()!r} of a module; save that one first and delete it"
            )
