"""Tokens that stand for many in the memories, so that a short text in training fills them as a long one would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .attachment import attached_side_paths


@contextmanager
def talan_token_counts(model: nn.Module, counts: torch.Tensor) -> Iterator[None]:
    """Let each token of the calls inside a `with` block enter the memories as often as it counts.

    With a count n, a token's weight e is n e: `N = sum n e z`, `D = sum n e`. To a memory, filler of 100 tokens that
    count 1,000 each is filler of 100,000 tokens. Attention, positions and the loss do not change. For training on
    texts that are much shorter than those in use; the counts belong to this model, for all threads.

    Tokens near a fact can hold it themselves, by their attention: let those count 1.

    Args:
        model: A model with a TALAN adapter.
        counts: How many tokens each token stands for, [batch, tokens] of the calls, at least 1; a padded token's does
            not matter.

    Yields:
        Nothing; every token counts 1 again afterwards, also after an error.

    Raises:
        ValueError: A count is below 1 or not finite, the model has no side path, or one of the mixer `delta`, whose
            memory is no sum. A call inside raises it if its tokens are other ones.

    Examples:
        >>> counts = torch.ones(input_ids.shape)
        >>> counts[:, 70:-1] = 1000.0
        >>> with talan_token_counts(model, counts):
        ...     loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
    """
    fits = isinstance(counts, torch.Tensor) and counts.dim() == 2
    if not fits or not bool(((counts >= 1) & counts.isfinite()).all()):
        raise ValueError("counts: give a tensor [batch, tokens] of finite numbers, 1 or more")
    layers = [layer for _, layer in attached_side_paths(model)]
    if not layers:
        raise ValueError(f"model={type(model).__name__}: it has no side path; give a model with a TALAN adapter")
    delta = {name for layer in layers for name, options in layer.talan_options.items() if options.mixer == "delta"}
    if delta:
        raise ValueError(
            f"talan_mixer='delta' of adapter {min(delta)!r}: its memory is no sum of tokens, so none can stand "
            "for many; use another mixer, or longer texts"
        )
    all_hooks = {id(hooks): hooks for layer in layers if (hooks := layer._decoder_hooks) is not None}.values()
    before = [hooks.token_counts for hooks in all_hooks]
    for hooks in all_hooks:
        hooks.token_counts = counts.float()
    try:
        yield
    finally:
        for hooks, counts_before in zip(all_hooks, before, strict=True):
            hooks.token_counts = counts_before
