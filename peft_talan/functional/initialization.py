"""The tensors that a fresh side path starts from."""

from __future__ import annotations

import torch

from .parameters import SidePathOptions, read_sizes

HIDDEN_FACTOR = 2
"""How much wider than its input each hidden layer of the `mlp` mixer is."""

INITIAL_GATES = (-4.0, -4.0, -6.0)
"""The logits of the `delta` mixer's gates before training: a token writes and erases 2%, and forgets 0.2%."""


def initial_parameters(
    options: SidePathOptions, hidden_size: int, slots: int, width: int, zero_write: bool = True
) -> dict[str, torch.Tensor]:
    """Draw the tensors of a fresh side path.

    Projections start at a standard deviation of 1 / sqrt(inputs), the slot biases at zero. `W_write` and the second
    layers of the `mlp` mixer start at zero: a fresh adapter is exactly its LoRA weights, and a fresh `mlp` reads
    like `attention`.

    Args:
        options: The axes of the side path.
        hidden_size: H, the width of the residual stream.
        slots: M, the number of memory slots.
        width: d, the latent width.
        zero_write: Whether the tensors named above start at zero; with False nothing does, for tests. Default True.

    Returns:
        The tensors by the name that follows `lora_talan_` in the checkpoint, float32.
    """

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns) / columns**0.5

    def zero(rows: int, columns: int) -> torch.Tensor:
        return torch.zeros(rows, columns) if zero_write else draw(rows, columns)

    rows = sum(read_sizes(options.mixer, slots, width))
    tensors = {"read": draw(rows, hidden_size), "write": zero(hidden_size, width)}
    if options.mixer == "linear":
        tensors["slot_readout"] = draw(slots, width).T.contiguous()
    elif options.mixer == "delta":
        tensors["gate_bias"] = torch.tensor(INITIAL_GATES)
    else:
        tensors["slot_bias"] = zero(1, slots)[0]
    if options.mixer == "mlp":
        tensors["slot_in"] = draw(HIDDEN_FACTOR * slots, slots)
        tensors["slot_out"] = zero(slots, HIDDEN_FACTOR * slots)
        tensors["channel_in"] = draw(HIDDEN_FACTOR * width, width)
        tensors["channel_out"] = zero(width, HIDDEN_FACTOR * width)
    if options.writeback == "gated":
        tensors["gate"] = zero(1, hidden_size + 1)[0]
    return tensors


def empty_parameters(options: SidePathOptions, hidden_size: int, slots: int, width: int) -> dict[str, torch.Tensor]:
    """Lay out the tensors of a side path on the meta device, where they have shapes and no values.

    Args:
        options: The axes of the side path.
        hidden_size: H, the width of the residual stream.
        slots: M, the number of memory slots.
        width: d, the latent width.

    Returns:
        The tensors by name, as those of `initial_parameters`.
    """
    with torch.device("meta"):
        return initial_parameters(options, hidden_size, slots, width)
