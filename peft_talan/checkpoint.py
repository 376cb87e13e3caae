"""Checks the tensors of a checkpoint before they leave a model."""

from __future__ import annotations

from collections.abc import Collection

from peft.tuners.tuners_utils import _get_tuner_state_dict_key_prefixes
from torch import nn


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
