"""The axes of the side path as options of commands, made from the dataclass that defines them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial, wraps
from typing import Any, get_args, get_type_hints

import typer
from typer import Option

from ..axes import SidePathAxes, check_axes
from .console import Misuse

LAYERS = "talan_layers"
LEFT_OUT = "talan_memory_scope"
"""Models that generate have one memory scope alone."""


def parse_layers(text: str) -> str | list[int] | list[float]:
    """Read which blocks get a side path.

    Args:
        text: `all`, indices such as `10,-1` or fractions of the depth such as `0.33,0.66`.

    Returns:
        What `TalanConfig.talan_layers` takes.

    Raises:
        BadParameter: It is none of these.
    """
    if text == "all":
        return text
    parts = [part.strip() for part in text.split(",")]
    try:
        return [float(part) for part in parts] if any("." in part for part in parts) else [int(part) for part in parts]
    except ValueError:
        raise typer.BadParameter(
            f"--talan-layers {text!r}: give 'all', block indices like 10,-1 or fractions of the depth like 0.33,0.66"
        ) from None


def _parameter(field: Any, kind: Any) -> inspect.Parameter:
    """One axis as an option; its help is the dataclass's own."""
    option = partial(Option, field.default, help=field.metadata["help"])
    if field.name == LAYERS:
        kind = str | None
        default = option(metavar="LIST", show_default="a third of the depth; such as 10,-1 or 0.33,0.66")
    elif choices := get_args(kind):
        kind = str
        default = option(metavar="|".join(choices))
    else:
        default = option()
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def with_axes(command: Callable[..., None]) -> Callable[..., None]:
    """Add the axes to a command's options.

    Args:
        command: Takes them as a dictionary `axes` of those that were given, checked.

    Returns:
        The command with an option for each axis.
    """
    hints = get_type_hints(SidePathAxes)
    axes = [field for field in fields(SidePathAxes) if field.name != LEFT_OUT]
    added = [_parameter(field, hints[field.name]) for field in axes]

    @wraps(command)
    def with_options(**options: Any) -> None:
        given = {p.name: value for p in added if (value := options.pop(p.name)) is not None}
        if LAYERS in given:
            given[LAYERS] = parse_layers(given[LAYERS])
        try:
            check_axes(SidePathAxes(**given))
        except ValueError as error:
            raise Misuse(str(error)) from None
        command(**options, axes=given)

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "axes"]
    with_options.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
    del with_options.__wrapped__
    return with_options
