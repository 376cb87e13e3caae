"""Starts the side paths of a fresh adapter from data: what they read is whitened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..functional.initialization import second_moment, whitened
from .attachment import fresh_side_paths
from .layer import TalanLayer
from .measured_pass import in_evaluation_mode, run


class _Moments:
    """Sums of x x^T over the tokens that a layer's side path reads, and their number."""

    def __init__(self, adapter_name: str) -> None:
        self.adapter_name = adapter_name
        self.sums: dict[TalanLayer, torch.Tensor] = {}
        self.tokens: dict[TalanLayer, int] = {}

    def add(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Add the tokens of a call, as a forward pre-hook of the layer."""
        hidden_states, position, context = args[:3]
        if not isinstance(layer, TalanLayer) or layer.talan_position.get(self.adapter_name) != position:
            return
        valid = context.layout(hidden_states).valid
        rows = hidden_states.flatten(0, 1) if valid is None else hidden_states[valid]
        self.sums[layer] = self.sums.get(layer, 0) + second_moment(rows)
        self.tokens[layer] = self.tokens.get(layer, 0) + len(rows)


@torch.no_grad()
def initialize_talan_weights(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
    shrinkage: float = 0.1,
) -> None:
    """Start the side paths of a fresh adapter from data: `W_read <- W_read L^-1`, `L L^T = E[x x^T] + shrinkage I`.

    A few directions that all tokens share hold most of a residual stream, and would be most of what a mean over tokens
    holds; after whitening no direction outweighs the others. Each row of `W_read` is then scaled so that what it reads
    has a mean square of 1. `W_write` stays zero: the adapter's output doesn't change. It is this package's own
    addition, as is the `relative` writeback that it is meant for. Call it before training and before the model is
    wrapped for several processes; some thousand tokens are enough. It takes a square matrix of the model's width for
    each block with a side path.

    Args:
        model: A model with a TALAN adapter whose side path has not been trained.
        dataloader: Batches of what the model takes, such as the first few of a trainer's; labels are left out.
        adapter_name: The adapter's name. Default `"default"`.
        shrinkage: What is added to each direction's mean square, of which the average is 1. Default 0.1.

    Raises:
        ValueError: There is no such TALAN adapter, it has been trained, there is no token, or `shrinkage` is not
            positive; nothing has changed then.

    Examples:
        >>> initialize_talan_weights(trainer.model, itertools.islice(trainer.get_train_dataloader(), 16))
    """
    if not shrinkage > 0:
        raise ValueError(f"shrinkage={shrinkage!r}: give a positive number")
    layers = [layer for _, layer in fresh_side_paths(model, adapter_name)]
    weights = {layer: getattr(layer, f"{layer.tensor_prefix}read")[adapter_name].values for layer in layers}
    if any(weight.is_meta for weight in weights.values()):
        raise ValueError("model: some of its blocks are offloaded; start the side paths before that, or on one device")
    moments = _Moments(adapter_name)
    with in_evaluation_mode(model), ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(moments.add).remove)
        for batch in dataloader:
            run(model, batch)
    if not all(moments.tokens.get(layer) for layer in layers):
        raise ValueError("dataloader: it gave no token; give some batches of the training data")
    for layer, weight in weights.items():
        weight.copy_(whitened(weight, moments.sums[layer] / moments.tokens[layer], shrinkage))
