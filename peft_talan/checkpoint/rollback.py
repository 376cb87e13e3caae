"""Takes back what a failed call changed in a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

CONTAINERS: frozenset[type] = frozenset((dict, OrderedDict, list, set))
"""What modules and configurations keep other things in."""


class _Remembered:
    """An object's class, its attributes, and what its containers held."""

    __slots__ = ("attributes", "contents", "owner", "owner_class")

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.owner_class = type(owner)
        self.attributes = dict(vars(owner))
        # Most are empty dictionaries of hooks. Every model that gets an adapter is gone through here.
        self.contents = {
            name: value.copy() for name, value in self.attributes.items() if type(value) in CONTAINERS and value
        }

    def restore(self) -> None:
        self.owner.__class__ = self.owner_class
        vars(self.owner).clear()
        vars(self.owner).update(self.attributes)
        # In place: the handles of hooks know the very dictionaries that they are in.
        for name, container in self.attributes.items():
            if type(container) in CONTAINERS:
                container.clear()
                add = container.extend if isinstance(container, list) else container.update
                add(self.contents.get(name, ()))


class Snapshot:
    """The state of a model before a call, which can be restored: modules, hooks, attributes and what trains.

    Args:
        model: The model.
        *others: More objects whose attributes come back, such as the configuration.

    Attributes:
        modules: The model's modules.
    """

    def __init__(self, model: nn.Module, *others: object) -> None:
        self.modules = list(model.modules())
        self._owners = [_Remembered(one) for one in (*self.modules, *others)]
        # `model.parameters()` would go through the modules once more.
        found = (parameter for module in self.modules for parameter in module._parameters.values())
        self._parameters = [(one, one.data, one.requires_grad) for one in found if one is not None]

    def restore(self) -> None:
        """Bring the state back."""
        for owner in self._owners:
            owner.restore()
        for parameter, data, requires_grad in self._parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)


@contextmanager
def attributes_unchanged_on_error(owner: object) -> Iterator[None]:
    """Restore an object's attributes if the body fails."""
    remembered = _Remembered(owner)
    try:
        yield
    except BaseException:
        remembered.restore()
        raise


@contextmanager
def unchanged_on_error(model: nn.Module, *others: object) -> Iterator[None]:
    """Restore a model if the body fails: modules, hooks, attributes, parameters and what trains."""
    before = Snapshot(model, *others)
    try:
        yield
    except BaseException:
        before.restore()
        raise
