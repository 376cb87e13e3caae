"""Gradient checkpointing of a block with its side paths: what they save is computed again, as the block's own is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .residual_streams import recorded_states

CHECKPOINTS_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)
"""Whether transformers leaves a block's hooks outside of its checkpoint, as since 5.23; inside, nothing is missing."""


def leaves_hooks_outside(block: nn.Module) -> bool:
    """Whether a call of the block made now is recomputed in the backward pass, but not what its hooks do."""
    return (
        CHECKPOINTS_FORWARD
        and block.training
        and isinstance(block, GradientCheckpointingLayer)
        and block.gradient_checkpointing
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def writes_input_inside(block: nn.Module) -> bool:
    """Whether side paths at the block's input are recomputed with it in a call made now.

    What they write is recorded as a hidden state, which has no gradient inside of a reentrant checkpoint.
    """
    return leaves_hooks_outside(block) and recorded_states() is None


class CheckpointWithSidePaths:
    """A block's checkpointing function that takes its side paths into the checkpoint.

    Args:
        checkpoint: The function that transformers gave the block.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self._checkpoint = checkpoint

    @classmethod
    def install(cls, block: nn.Module) -> None:
        """Put itself in front of a block's function, which each `gradient_checkpointing_enable` sets anew."""
        # mypy takes what a module holds for tensors and modules.
        checkpoint: Any = block._gradient_checkpointing_func
        if not isinstance(checkpoint, cls):
            block._gradient_checkpointing_func = cls(checkpoint)  # type: ignore[assignment]

    @classmethod
    def remove(cls, block: nn.Module) -> None:
        """Give a block its own function back."""
        # As above.
        installed: Any = getattr(block, "_gradient_checkpointing_func", None)
        if isinstance(installed, cls):
            block._gradient_checkpointing_func = installed._checkpoint  # type: ignore[assignment]

    def __call__(self, forward: partial[Any], *args: Any) -> Any:
        """Run the block and its side paths; a recomputed call has the contexts of the first, with its adapters."""
        block = forward.args[0]
        if not leaves_hooks_outside(block):
            return self._checkpoint(forward, *args)  # The hooks write, as where nothing is checkpointed.
        layers = [child for child in block.children() if hasattr(child, "write_at_output")]
        # As the hooks: what was attached last is the first at the input and the last at the output.
        at_input = [layer for layer in reversed(layers) if layer.acts_at_input] if writes_input_inside(block) else []
        contexts: dict[tuple[str, str], Any] = {}

        def context(layer: Any, position: str, given: tuple[Any, ...]) -> Any:
            # Of what the block was given, and not of what was written: the contexts live until the backward pass.
            if (layer.child_name, position) not in contexts:
                contexts[layer.child_name, position] = layer.context(block, given, forward.keywords, position)
            return contexts[layer.child_name, position]

        def forward_with_side_paths(*given: Any) -> Any:
            args, kwargs = given, forward.keywords
            for layer in at_input:
                args, kwargs = layer.write_at_input(block, args, kwargs, context(layer, "input", given))
            output = forward.func(block, *args, **kwargs)
            for layer in layers:
                output = layer.write_at_output(block, output, context(layer, "output", given))
            return output

        return self._checkpoint(forward_with_side_paths, *args)
