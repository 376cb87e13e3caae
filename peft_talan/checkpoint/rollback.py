"""Takes back what a failed call changed in a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class _Remembered:
    """An object's class, its attributes, and what its containers held."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.owner_class = type(owner)
        self.attributes = dict(vars(owner))
        self.contents = [
            (container, container.copy())
            for container in self.attributes.values()
            if isinstance(container, (dict, list, set))
        ]

    def restore(self) -> None:
        self.owner.__class__ = self.owner_class
        vars(self.owner).clear()
        vars(self.owner).update(self.attributes)
        # In place: the handles of hooks know the very dictionaries that they are in.
        for container, content in self.contents:
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)


@contextmanager
def attributes_unchanged_on_error(*owners: object) -> Iterator[None]:
    """Leave some objects' attributes as they were where the body fails.

    Args:
        *owners: The objects; of modules, what lies inside of them is not looked at.

    Yields:
        Nothing; an error is raised again once the attributes are restored.
    """
    remembered = [_Remembered(one) for one in owners]
    try:
        yield
    except BaseException:
        for one in remembered:
            one.restore()
        raise


@contextmanager
def unchanged_on_error(model: nn.Module, *others: object) -> Iterator[None]:
    """Leave a model as it was where the body fails: modules, hooks, attributes, parameters and what trains.

    Args:
        model: The model.
        *others: More objects whose attributes come back, such as the configuration.

    Yields:
        Nothing; an error is raised again once the model is restored.
    """
    parameters = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with attributes_unchanged_on_error(*model.modules(), *others):
            yield
    except BaseException:
        for parameter, data, requires_grad in parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        raise
