"""The axes of the side path as options of commands; `TalanConfig` checks their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from typer import Option

PANEL = "Axes of the side path"


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


Layers = Annotated[
    str | None,
    Option(metavar="LIST", help="'all', indices like 10,-1 or fractions like 0.33,0.66", rich_help_panel=PANEL),
]
Position = Annotated[str | None, Option(metavar="output|input", help="End of the block", rich_help_panel=PANEL)]
Slots = Annotated[int | None, Option(help="Number of memory slots", rich_help_panel=PANEL)]
Dim = Annotated[int | None, Option(help="Latent width", rich_help_panel=PANEL)]
Mixer = Annotated[str | None, Option(metavar="NAME", help="attention, linear or mlp", rich_help_panel=PANEL)]
Writeback = Annotated[
    str | None, Option(metavar="NAME", help="add, gated, capped or orthogonal", rich_help_panel=PANEL)
]
Cap = Annotated[float | None, Option(help="Largest |change| / |hidden state| of 'capped'", rich_help_panel=PANEL)]
Alpha = Annotated[float | None, Option(help="Strength of the perturbation", rich_help_panel=PANEL)]
Dropout = Annotated[float | None, Option(help="Dropout of the read-out", rich_help_panel=PANEL)]
GradScale = Annotated[float | None, Option(help="Scale of the side path's gradient", rich_help_panel=PANEL)]
Trainable = Annotated[
    str | None, Option(metavar="SCOPE", help="joint, side_path, writeback or low_rank", rich_help_panel=PANEL)
]


def read_axes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Gather the axes that were given.

    Args:
        options: All options of a command by name, None where one was not given.

    Returns:
        Fields of `TalanConfig`.
    """
    given = {name: value for name, value in options.items() if name.startswith("talan_") and value is not None}
    if "talan_layers" in given:
        given["talan_layers"] = parse_layers(given["talan_layers"])
    return given
