"""Keys and queries of `delta` side paths that start from the attention of their blocks."""

from __future__ import annotations

import torch
from torch import nn

from ..config import TalanConfig
from ..functional.initialization import keys_and_queries_of
from .attachment import fresh_side_paths
from .attention_weights import attention_in, normed


@torch.no_grad()
def initialize_talan_keys(model: nn.Module, adapter_name: str = "default") -> None:
    """Start the keys and queries of a fresh adapter's `delta` side paths from the attention of their blocks.

    What a block's attention matches inside its window, the side path at its input then matches from the first step; a
    random start has to find it. Values and gates stay as they are. Call it after `get_peft_model` and before training.
    Rotary positions, biases and the norms of heads are left out.

    Args:
        model: A model with a TALAN adapter of `talan_mixer="delta"` and `talan_position="input"`, whose side path has
            not been trained.
        adapter_name: The adapter's name. Default `"default"`.

    Raises:
        ValueError: There is no such adapter, it has been trained, or a block has no attention with `q_proj` and
            `k_proj` whose weights are here. Nothing is changed.

    Examples:
        >>> config = TalanConfig(talan_mixer="delta", talan_slots=16, talan_position="input", talan_layers="all")
        >>> model = get_peft_model(base_model, config)
        >>> initialize_talan_keys(model)
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, TalanConfig):
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no TALAN adapter of this name")
    if config.talan_mixer != "delta":
        raise ValueError(f"talan_mixer={config.talan_mixer!r} has no keys; use 'delta'")
    if config.talan_position != "input":
        raise ValueError(
            f"talan_position={config.talan_position!r}: the attention of a block reads its input; use 'input'"
        )
    found: list[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]] = [
        (layer.parameters_of(adapter_name).read, keys_and_queries_of(*_projections(block, config.talan_slots)))
        for block, layer in fresh_side_paths(model, adapter_name)
    ]
    for read, (keys, queries) in found:
        read[-config.talan_slots :] = keys.to(read)
        read[config.talan_dim : config.talan_dim + config.talan_slots] = queries.to(read)


def _projections(block: nn.Module, slots: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """The arguments of `keys_and_queries_of`, with the weights of the norm before the attention in its projections."""
    attention, (queries, keys) = attention_in(block, ("q_proj", "k_proj"), "leave its keys as drawn")
    heads, width = getattr(getattr(attention, "config", None), "num_attention_heads", 0), attention.head_dim
    if {queries.dim(), keys.dim()} != {2} or queries.shape[0] != heads * width:
        shapes = [tuple(weight.shape) for weight in (queries, keys)]
        raise ValueError(
            f"model: the projections of {type(attention).__name__} have shapes {shapes}, which are not those of "
            f"{heads} heads of {width}; leave the keys as drawn, or call this before the model is sharded"
        )
    if slots > min(keys.shape):
        raise ValueError(f"talan_slots={slots!r}: the block's keys have {min(keys.shape)} channels; use no more")
    return normed(block, queries), normed(block, keys), width, slots
