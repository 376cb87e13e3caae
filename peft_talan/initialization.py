"""The tensors that a fresh side path starts from."""

from __future__ import annotations

import torch
from torch import nn

from .config import TalanConfig

HIDDEN_FACTOR = 2
"""How much wider than its input each hidden layer of the `mlp` mixer is."""


SMALLEST_LIMIT = 2**20
"""How many numbers a side path may hold beside any model, however small."""


def check_size(config: TalanConfig, model: nn.Module, hidden_size: int, blocks: int) -> None:
    """Refuse halves that would hold more numbers than the model itself, before any memory is asked for.

    Args:
        config: The adapter's configuration.
        model: The base model.
        hidden_size: H, the width of the residual stream.
        blocks: The number of side paths.

    Raises:
        ValueError: A half would be larger than the model.
    """
    limit = max(SMALLEST_LIMIT, sum(parameter.numel() for parameter in model.parameters()))
    numbers = blocks * sum(tensor.numel() for tensor in empty_parameters(config, hidden_size).values())
    if numbers > limit:
        raise ValueError(
            f"talan_dim={config.talan_dim}, talan_slots={config.talan_slots}: the side path would hold {numbers:,} "
            f"numbers, more than the model and than {SMALLEST_LIMIT:,}; it is meant to be small: the defaults are "
            "talan_dim=32, talan_slots=8"
        )
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    if config.has_low_rank_half and rank * hidden_size > limit:
        raise ValueError(
            f"r={config.r}, rank_pattern={config.rank_pattern}: one matrix of rank {rank} would hold "
            f"{rank * hidden_size:,} numbers, more than the model and than {SMALLEST_LIMIT:,}; give a rank such as 8"
        )


def initial_parameters(config: TalanConfig, hidden_size: int) -> dict[str, torch.Tensor]:
    """Draw the tensors of a fresh side path.

    Projections start at a standard deviation of 1 / sqrt(inputs), the slot biases at zero. `W_write` and the second
    layers of the `mlp` mixer start at zero: a fresh adapter is exactly its low-rank half, and a fresh `mlp` reads
    like `attention`. With `init_talan_weights=False` nothing starts at zero.

    Args:
        config: The adapter's configuration.
        hidden_size: H, the width of the residual stream.

    Returns:
        The tensors by the name that follows `lora_talan_` in the checkpoint, float32.
    """
    slots, width = config.talan_slots, config.talan_dim

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns) / columns**0.5

    def zero(rows: int, columns: int) -> torch.Tensor:
        return torch.zeros(rows, columns) if config.init_talan_weights else draw(rows, columns)

    tensors = {"read": draw(2 * width + slots, hidden_size), "write": zero(hidden_size, width)}
    if config.talan_mixer == "linear":
        tensors["slot_readout"] = draw(slots, width).T.contiguous()
    else:
        tensors["slot_bias"] = zero(1, slots)[0]
    if config.talan_mixer == "mlp":
        tensors["slot_in"] = draw(HIDDEN_FACTOR * slots, slots)
        tensors["slot_out"] = zero(slots, HIDDEN_FACTOR * slots)
        tensors["channel_in"] = draw(HIDDEN_FACTOR * width, width)
        tensors["channel_out"] = zero(width, HIDDEN_FACTOR * width)
    if config.talan_writeback == "gated":
        tensors["gate"] = zero(1, hidden_size + 1)[0]
    return tensors


def empty_parameters(config: TalanConfig, hidden_size: int) -> dict[str, torch.Tensor]:
    """Lay out the tensors of a side path on the meta device, where they have shapes and no values.

    Args:
        config: The adapter's configuration.
        hidden_size: H, the width of the residual stream.

    Returns:
        The tensors by name, as `initial_parameters` gives them.
    """
    with torch.device("meta"):
        return initial_parameters(config, hidden_size)
