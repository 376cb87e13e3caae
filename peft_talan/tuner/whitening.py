"""Starts the side paths of a fresh adapter from data: what they read is whitened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..functional.initialization import whitened
from ..memory.token_layout import TokenLayout
from .attachment import fresh_side_paths
from .block_context import BlockContext
from .layer import TalanLayer
from .measured_pass import TokenSums, in_evaluation_mode, normalized, reading, run


def _after_the_first(hidden_states: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Which tokens are real and not the first of their sample, [batch, tokens], bool."""
    real = layout.valid
    if real is None:
        real = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
    after = real & (real.cumsum(1) > 1)
    segments = layout.segment_ids
    return after if segments is None else after & (segments == F.pad(segments[:, :-1], (1, 0), value=-1))


@torch.no_grad()
def initialize_talan_weights(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
    shrinkage: float = 0.1,
) -> None:
    """Start the side paths of a fresh adapter from data: `W_read <- W_read L^-1`, `L L^T = E[x x^T] + shrinkage I`.

    A few directions that all tokens share hold most of a residual stream, and would be most of what a mean over tokens
    holds; after whitening no direction outweighs the others. The mean is over all tokens but the first of each sample,
    which attention uses as a sink. Each row of `W_read` is then scaled so that what it reads has a mean square of 1.
    `W_write` stays zero: the adapter's output doesn't change. It is this package's own addition, as is the `relative`
    writeback that it is meant for. Call it before training and before the model is wrapped for several processes; some
    thousand tokens are enough. It takes a square matrix of the model's width for each block with a side path.

    Args:
        model: A model with a TALAN adapter whose side path has not been trained.
        dataloader: Batches of what the model takes, such as the first few of a trainer's; labels are left out.
        adapter_name: The adapter's name. Default `"default"`.
        shrinkage: What is added to each direction's mean square, of which the average is 1. Default 0.1.

    Raises:
        ValueError: There is no such TALAN adapter, it has been trained, no sample has two tokens, or `shrinkage` is
            not positive; nothing has changed then.

    Examples:
        >>> initialize_talan_weights(trainer.model, itertools.islice(trainer.get_train_dataloader(), 16))
    """
    if not shrinkage > 0:
        raise ValueError(f"shrinkage={shrinkage!r}: give a positive number")
    layers = [layer for _, layer in fresh_side_paths(model, adapter_name)]
    weights = {layer: layer.parameters_of(adapter_name).read for layer in layers}
    if any(weight.is_meta for weight in weights.values()):
        raise ValueError("model: some of its blocks are offloaded; start the side paths before that, or on one device")
    sums = {layer: TokenSums() for layer in layers}

    def add(layer: TalanLayer, hidden_states: torch.Tensor, context: BlockContext) -> None:
        sums[layer].add(normalized(hidden_states)[_after_the_first(hidden_states, context.layout(hidden_states))])

    with in_evaluation_mode(model), reading(layers, adapter_name, add):
        for batch in dataloader:
            run(model, batch)
    if not all(part.tokens for part in sums.values()):
        raise ValueError("dataloader: it gave no token after the first of a sample; give batches of the training data")
    for layer, weight in weights.items():
        weight.copy_(whitened(weight, sums[layer].means()[1], shrinkage))
