"""The tensors that a fresh side path starts from."""

from __future__ import annotations

import torch

from .config import TalanConfig

HIDDEN_FACTOR = 2
"""How much wider than its input each hidden layer of the `mlp` mixer is."""


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
