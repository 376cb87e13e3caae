"""The tensors that a fresh side path starts from."""

from __future__ import annotations

import torch

from .parameters import SidePathOptions, read_sizes

HIDDEN_FACTOR = 2
"""How much wider than its input each hidden layer of the `mlp` mixer is."""

INITIAL_GATES = (-4.0, -4.0, -6.0)
"""The logits of the `delta` mixer's gates before training: a token writes and erases 2%, and forgets 0.2%."""


STARTS_AT_ZERO: tuple[str, ...] = ("write", "slot_bias", "slot_out", "channel_out", "gate")
"""A fresh adapter is exactly its LoRA weights, and a fresh `mlp` reads like `attention`."""


def parameter_shapes(options: SidePathOptions, hidden_size: int, slots: int, width: int) -> dict[str, torch.Size]:
    """Lay out the tensors of a side path.

    Args:
        options: The axes of the side path.
        hidden_size: H, the width of the residual stream.
        slots: M, the number of memory slots.
        width: d, the latent width.

    Returns:
        The shapes by the names that follow `lora_talan_` in the checkpoint.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "read": (sum(read_sizes(options.mixer, slots, width)), hidden_size),
        "write": (hidden_size, width),
    }
    if options.mixer == "linear":
        shapes["slot_readout"] = (width, slots)
    elif options.mixer == "delta":
        shapes["gate_bias"] = (len(INITIAL_GATES),)
    else:
        shapes["slot_bias"] = (slots,)
    if options.mixer == "mlp":
        shapes["slot_in"] = (HIDDEN_FACTOR * slots, slots)
        shapes["slot_out"] = (slots, HIDDEN_FACTOR * slots)
        shapes["channel_in"] = (HIDDEN_FACTOR * width, width)
        shapes["channel_out"] = (width, HIDDEN_FACTOR * width)
    if options.writeback == "gated":
        shapes["gate"] = (hidden_size + 1,)
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def initial_parameters(
    options: SidePathOptions, hidden_size: int, slots: int, width: int, zero_write: bool = True
) -> dict[str, torch.Tensor]:
    """Draw the tensors of a fresh side path: projections with a standard deviation of 1 / sqrt(inputs).

    Args:
        options: The axes of the side path.
        hidden_size: H, the width of the residual stream.
        slots: M, the number of memory slots.
        width: d, the latent width.
        zero_write: Whether those of `STARTS_AT_ZERO` do; with False nothing starts at zero, for tests. Default True.

    Returns:
        The tensors by name, as in `parameter_shapes`, float32.
    """
    tensors = {}
    for name, shape in parameter_shapes(options, hidden_size, slots, width).items():
        if name == "gate_bias":
            tensors[name] = torch.tensor(INITIAL_GATES)
        elif name == "slot_readout":
            tensors[name] = (torch.randn(slots, width) / width**0.5).T.contiguous()
        elif zero_write and name in STARTS_AT_ZERO:
            tensors[name] = torch.zeros(shape)
        else:
            tensors[name] = torch.randn(shape) / shape[-1] ** 0.5
    return tensors
