"""The names of adapters and of their tensors: those that can't be, and those by which tensors are found."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from ..private_names import _get_tuner_state_dict_key_prefixes

CHILD_NAME = "talan"
"""The name under which a side path becomes a child of its block."""

MAGNITUDE = "lora_magnitude_vector"
"""The container of DoRA's magnitudes."""

FSDP_WRAPPER = "_fsdp_wrapped_module"

WRAPPERS = frozenset({FSDP_WRAPPER, "_checkpoint_wrapped_module", "_orig_mod"})
"""The names of modules inside of torch's wrappers: FSDP, activation checkpointing, `torch.compile`."""

DATA_PARALLEL: tuple[type[nn.Module], ...] = (nn.DataParallel, nn.parallel.DistributedDataParallel)
"""Wrappers whose inner module is called `module`, a name that a model may also give to a part of its own."""


def is_side_path_key(name: str) -> bool:
    """Whether a name in a state dict or a checkpoint is that of a side path's tensor."""
    # Most names have nothing of it.
    return ".lora_talan_" in name and f".{CHILD_NAME}.lora_talan_" in without_wrappers(name)


def low_rank_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take the LoRA weights out of an adapter's tensors, by the names that they have in a plain LoRA adapter."""
    plain = {name.removesuffix(".weight") if f".{MAGNITUDE}." in name else name: name for name in tensors}
    return {name: tensors[saved] for name, saved in plain.items() if not is_side_path_key(saved)}


def check_new_name(adapter_name: str) -> None:
    """Refuse a name that an adapter can't have, as adapters are entries of an `nn.ModuleDict` under their names."""
    if not adapter_name or "." in adapter_name or adapter_name == "__base__" or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r}: choose a name that is not empty, has no dot, and is neither '__base__' "
            "nor the name of an attribute of nn.ModuleDict"
        )


def without_wrappers(name: str) -> str:
    """Take the wrappers that torch puts around modules out of a name."""
    parts = name.split(".")
    return name if WRAPPERS.isdisjoint(parts) else ".".join(part for part in parts if part not in WRAPPERS)


class ModuleNames:
    """The names of a model's modules with wrappers, as PEFT finds an adapter's tensors by them, and without.

    PEFT itself knows FSDP's wrapper around the whole model only.

    Args:
        model: The model, perhaps with wrapped parts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._plain: dict[str, str] = {"": ""}
        data_parallel = set()
        for name, module in model.named_modules():
            parent, _, last = name.rpartition(".")
            wrapped = last in WRAPPERS or (last == "module" and parent in data_parallel)
            before = self._plain.get(parent, parent)
            self._plain[name] = before if wrapped or not name else f"{before}.{last}".removeprefix(".")
            if isinstance(module, DATA_PARALLEL):
                data_parallel.add(name)
        # A wrapper comes before the module in it, which thus has the last word.
        self._wrapped = {plain: name.removeprefix(f"{FSDP_WRAPPER}.") for name, plain in self._plain.items()}

    def plain(self, name: str) -> str:
        """Take wrappers out of a tensor's name."""
        if "module" not in self._plain:
            name = name.removeprefix("module.")  # from a wrapper around the whole model
        place, dot, last = name.rpartition(".")
        return f"{self._plain.get(place, without_wrappers(place))}{dot}{last}"

    def wrapped(self, name: str) -> str:
        """Put wrappers into a tensor's name."""
        place, dot, last = self.plain(name).rpartition(".")
        return f"{self._wrapped.get(place, place)}{dot}{last}"


def check_names(model: nn.Module, adapter_name: str, others: Collection[str]) -> None:
    """Refuse to save an adapter while another one has the name of a module that the adapter lies in.

    PEFT leaves out every tensor whose name holds another adapter's name as one of its parts.
    """
    for place in sorted(_get_tuner_state_dict_key_prefixes(model, adapter_name)):
        confused = set(place.split(".")[:-1]) & set(others)
        if confused:
            raise ValueError(
                f"adapter {adapter_name!r} would be saved without {place}: another adapter has the name "
                f"{confused.pop()!r} of a module; save that one first and delete it"
            )
