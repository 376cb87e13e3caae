"""What a decoder or one of its blocks was called with, by standard names, whatever the model calls its arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import nn
from transformers import __version__ as transformers_version
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.utils import output_capturing

STATE = re.compile(r"(.*_)?(past|cache|caches|mems|state|states|buckets)(_.*)?")
"""Names of arguments that carry a state from one call to the next, as far as they are not a transformers `Cache`."""

NO_STATE = re.compile(r".*(hidden|position|use_|output_|return_|encoder|attention).*|.*_(ids|mask|embeds|length|lens)")

KEEPS_CACHE_WITHOUT_GRADIENTS = Version(transformers_version).release >= (5, 24)
"""Whether a block with gradient checkpointing keeps its cache if gradients are off."""


class CallArguments(NamedTuple):
    """The arguments of one call, as far as a side path needs them.

    Args:
        attention_mask: In any of the forms that attention implementations take.
        position_ids: Positions of any rank, or None.
        cu_seq_lens: [samples + 1]: where packed samples start, or None.
        seq_idx: [batch, tokens]: the sample of each token, or None.
        cache: The cache of the self-attention, or None.
        shape: (batch, tokens) of the model's input, if it is known.
        unknown_state: The name of an argument with a state that is no transformers cache, or None.
    """

    attention_mask: object = None
    position_ids: torch.Tensor | None = None
    cu_seq_lens: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None
    cache: Cache | None = None
    shape: tuple[int, int] | None = None
    unknown_state: str | None = None


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's positional arguments.

    Args:
        module: The module.

    Returns:
        The names in their order; one in place of `*args` and `**kwargs`, too.
    """
    return tuple(inspect.signature(module.forward).parameters)


def read_arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallArguments:
    """Gather what a side path needs from a call.

    Args:
        names: Those returned by `argument_names`.
        args: The positional arguments.
        kwargs: The keyword arguments.

    Returns:
        The arguments by standard names.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    cache: Cache | None = None
    unknown: str | None = None
    for name, value in given.items():
        if isinstance(value, EncoderDecoderCache):
            cache = value.self_attention_cache
        elif isinstance(value, Cache):
            cache = cache or value
        elif _holds_state(value) and STATE.fullmatch(name) and not NO_STATE.fullmatch(name):
            unknown = name
    tokens, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    shape = None
    if isinstance(tokens, torch.Tensor) and tokens.dim() == 2:
        shape = (tokens.shape[0], tokens.shape[1])
    elif isinstance(embeddings, torch.Tensor) and embeddings.dim() == 3:
        shape = (embeddings.shape[0], embeddings.shape[1])
    positions = given.get("position_ids")
    return CallArguments(
        given.get("attention_mask"),
        positions if isinstance(positions, torch.Tensor) else None,
        given.get("cu_seq_lens_q"),
        given.get("seq_idx"),
        cache,
        shape,
        unknown,
    )


def _holds_state(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() > 0
    if isinstance(value, (list, tuple, dict)):
        return any(_holds_state(part) for part in (value.values() if isinstance(value, dict) else value))
    return value is not None and not isinstance(value, (bool, int, float, str, Cache))


def withholds_cache(block: nn.Module) -> bool:
    """Whether transformers hides the cache from a block, which it recomputes in the backward pass.

    Hooks outside of the checkpoint still see the cache.

    Args:
        block: The decoder block.

    Returns:
        True if it does in a call that is made now.
    """
    checkpoints = block.training and bool(getattr(block, "gradient_checkpointing", False))
    return checkpoints and (torch.is_grad_enabled() or not KEEPS_CACHE_WITHOUT_GRADIENTS)


def tensors_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors beside the hidden states that a block is called with; a recomputed call gets the same ones.

    Args:
        args: The block's positional arguments.
        kwargs: Its keyword arguments.

    Yields:
        Masks, positions and position embeddings.
    """
    for value in (*args[1:], *(value for name, value in kwargs.items() if name != "hidden_states")):
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, torch.Tensor):
                yield tensor


def replace_recorded_state(before: torch.Tensor, after: torch.Tensor) -> None:
    """Let `output_hidden_states=True` show what a block receives if a side path wrote at its input.

    transformers records a block's output before the next block's input is changed.

    Args:
        before: The recorded hidden states.
        after: What the block receives instead.
    """
    recorded = output_capturing._active_collector.get()
    states = recorded.get("hidden_states") if recorded else None
    if states and states[-1] is before:
        states[-1] = after


def replace_stream(output: Any, written: torch.Tensor) -> Any:
    """Put the changed residual stream into a block's output.

    Args:
        output: What the block returned: the hidden states, or a sequence or named tuple that starts with them.
        written: The changed hidden states.

    Returns:
        An output of the same type.
    """
    if isinstance(output, torch.Tensor):
        return written
    if isinstance(output, dict):
        return type(output)(**{**output, next(iter(output)): written})
    parts = (written, *output[1:])
    return output._make(parts) if hasattr(output, "_make") else type(output)(parts)


def stream_of(output: Any, like: torch.Size) -> torch.Tensor:
    """The residual stream in a block's output.

    Args:
        output: What the block returned.
        like: The shape of what the block received.

    Returns:
        The hidden states, [batch, tokens, hidden_size].

    Raises:
        TypeError: The output does not start with hidden states of that shape.
    """
    first = output
    if isinstance(output, dict):
        first = next(iter(output.values()), None)
    elif isinstance(output, (list, tuple)):
        first = output[0] if output else None
    if not isinstance(first, torch.Tensor) or first.shape != like:
        got = f"shape {tuple(first.shape)}" if isinstance(first, torch.Tensor) else type(first).__name__
        raise TypeError(
            f"talan_position='output': expected the block to return hidden states of shape {tuple(like)} first, got "
            f"{type(output).__name__} with {got}; use talan_position='input', or other blocks by talan_blocks"
        )
    return first
