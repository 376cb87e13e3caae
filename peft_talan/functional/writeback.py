"""The rules by which a perturbation changes the residual stream, and the scale of the gradient that enters there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .parameters import NORM_EPSILON


def change_add(
    hidden_states: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor | None, cap: float | torch.Tensor
) -> torch.Tensor:
    """Write the perturbation as it is: `h' - h = delta`."""
    return delta


def required_gate(gate: torch.Tensor | None) -> torch.Tensor:
    """The gate's row, or `ValueError` where there is none."""
    if gate is None:
        raise ValueError("gate=None, but the 'gated' writeback needs its row of shape [hidden_size + 1]")
    return gate


def gate_openings(hidden_states: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """Open one gate per token: `sigmoid(x w_g + b_g)`, x = RMSNorm(h)."""
    gate = required_gate(gate).to(hidden_states.dtype)
    normalised = hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + NORM_EPSILON)
    return torch.sigmoid(normalised @ gate[:-1] + gate[-1])


def change_gated(
    hidden_states: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor | None, cap: float | torch.Tensor
) -> torch.Tensor:
    """Write through one gate per token: `h' - h = gate delta`."""
    return gate_openings(hidden_states, gate).unsqueeze(-1) * delta


def change_capped(
    hidden_states: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor | None, cap: float | torch.Tensor
) -> torch.Tensor:
    """Write inside a trust region: `h' - h = delta min(1, rho |h| / |delta|)`."""
    tiny = torch.finfo(delta.dtype).tiny
    length = torch.linalg.vector_norm(delta, dim=-1, keepdim=True).clamp_min(tiny)
    limit = cap * torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True)
    return delta * (limit / length).clamp_max(1.0)


def change_orthogonal(
    hidden_states: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor | None, cap: float | torch.Tensor
) -> torch.Tensor:
    """Write without a component along h: `h' - h = delta - h (h . delta) / |h|^2`."""
    tiny = torch.finfo(delta.dtype).tiny
    square = hidden_states.square().sum(-1, keepdim=True).clamp_min(tiny)
    return delta - hidden_states * ((hidden_states * delta).sum(-1, keepdim=True) / square)


def change_relative(
    hidden_states: torch.Tensor, delta: torch.Tensor, gate: torch.Tensor | None, cap: float | torch.Tensor
) -> torch.Tensor:
    """Write in units of the stream: `h' - h = rms(h) delta`, so that one learning rate suits all blocks."""
    return delta * (hidden_states.square().mean(-1, keepdim=True) + NORM_EPSILON).sqrt()


WRITEBACK_RULES: dict[str, Callable[..., torch.Tensor]] = {
    "add": change_add,
    "gated": change_gated,
    "capped": change_capped,
    "orthogonal": change_orthogonal,
    "relative": change_relative,
}


class _ScaledGradient(torch.autograd.Function):
    """The identity, with the gradient multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, scale: float) -> torch.Tensor:
        """The tensor itself."""
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor, None]:
        """The scaled gradient."""
        return grad_outputs[0] * ctx.scale, None


def scale_gradient(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    """Pass a tensor on as it is and multiply the gradient that comes back by `scale`."""
    return tensor if scale == 1.0 else _ScaledGradient.apply(tensor, scale)
