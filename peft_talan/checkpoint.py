"""Finds and checks the tensors of a checkpoint before they leave a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from peft.tuners.tuners_utils import _get_tuner_state_dict_key_prefixes
from torch import nn

SHARDING_WRAPPERS: tuple[str, ...] = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of modules' names that FSDP and its activation checkpointing add, and leave out of their state dicts."""

Value = TypeVar("Value")


def plain_name(name: str) -> str:
    """Take the parts that sharding wrappers add out of a name.

    Args:
        name: Of a module or a tensor.

    Returns:
        The name without them.
    """
    return ".".join(part for part in name.split(".") if part not in SHARDING_WRAPPERS)


def wrapped_names(model: nn.Module, state_dict: dict[str, Value]) -> dict[str, Value]:
    """Name a state dict's entries as the modules of a wrapped model are named, by which PEFT looks for them.

    Args:
        model: The model, whose blocks may be wrapped.
        state_dict: Its entries by plain names.

    Returns:
        The entries by the model's own names.
    """
    modules = {plain_name(name): name for name, _ in model.named_modules()}
    parts = {key: key.rpartition(".") for key in state_dict}
    return {
        f"{modules[parent]}.{leaf}" if modules.get(parent) else key: state_dict[key]
        for key, (parent, _, leaf) in parts.items()
    }


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
