"""The weights of a block's attention, in the terms of what a side path reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from .layer import TalanLayer


@dataclass
class AttentionCopy:
    """The attention that reads what a side path reads: of the block itself at its input, of the next at its output."""

    index: int
    values: torch.Tensor
    """[key_heads * head_dim, hidden_size], for x."""
    output: torch.Tensor
    """[hidden_size, heads * head_dim]."""
    head_dim: int

    def factors(self, reading: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`sum_h p_h W_O W_V` of the heads h as two thin factors."""
        heads = self.output.unflatten(1, (-1, self.head_dim)) * reading[:, None]
        # The heads that share values add up.
        shared = heads.unflatten(1, (self.values.shape[0] // self.head_dim, -1)).sum(2)
        return shared.flatten(1, 2), self.values


def attention_behind(layer: TalanLayer, blocks: list[nn.Module], adapter_name: str) -> AttentionCopy | None:
    """The attention behind a side path; None behind the last block."""
    index = layer.block_index + (layer.talan_position[adapter_name] == "output")
    if index == len(blocks):
        return None
    block = blocks[index]
    name = "qkv_proj" if any(hasattr(module, "qkv_proj") for module in block.modules()) else "v_proj"
    attention, (values, output) = attention_in(block, (name, "o_proj"), "use initialize_talan_weights")
    if name == "qkv_proj":
        values = values[-((values.shape[0] - output.shape[1]) // 2) :]
    values = normed(block, values)
    return AttentionCopy(index, values, output.to(values.dtype), attention.head_dim)


def attention_in(block: nn.Module, names: Sequence[str], remedy: str) -> tuple[Any, list[torch.Tensor]]:
    """The attention of a block that has projections of some names, and their base weights."""
    needed = (*names, "head_dim")
    attention: Any = next((m for m in block.modules() if all(hasattr(m, name) for name in needed)), None)
    if attention is None:
        raise ValueError(f"model: {type(block).__name__} has no attention with {', '.join(needed)}; {remedy}")
    weights = [weight_of(getattr(attention, name)) for name in names]
    if any(weight.is_meta for weight in weights):
        raise ValueError("model: some of its blocks are offloaded; start the side paths before that, or on one device")
    return attention, weights


def normed(block: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight behind the norm at a block's input, with that norm's own: for x."""
    scale = norm_scale(getattr(block, "input_layernorm", None), weight)
    return weight.to(scale.dtype) * scale


def weight_of(projection: nn.Module) -> torch.Tensor:
    """The base weight of a projection, without LoRA and not quantized."""
    base = projection.get_base_layer() if isinstance(projection, BaseTunerLayer) else projection
    return dequantize_module_weight(base).detach()


def norm_scale(norm: nn.Module | None, weight: torch.Tensor) -> torch.Tensor:
    """By what a norm multiplies each channel, which its own weight does not tell: Gemma's is 1 + weight."""
    signs = torch.ones(weight.shape[1], device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    if norm is None:
        return signs
    # Of mean 0 and mean square 1, for LayerNorm and RMSNorm; the difference leaves a bias out.
    signs[::2] = -1.0
    taken = signs.to(next(norm.parameters(), weight).dtype)
    return signs * (norm(taken) - norm(-taken)).to(signs.dtype) / 2
