"""What a decoder or one of its blocks was called with, by standard names, whatever the model calls its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import nn
from transformers import __version__ as transformers_version
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.utils import output_capturing

STATE = {"past", "cache", "caches", "mems", "state", "states", "buckets"}
"""Words in the names of arguments that carry a state from one call to the next."""

NO_STATE = {"hidden", "position", "ids", "mask", "length", "encoder", "attention", "use", "output", "return"}
"""Words in the names of other arguments."""

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
        shape: (batch, tokens) of the model's input, if it is known; None in place of an unknown number of tokens.
        unknown_state: The name of an argument with a state that is not a transformers cache, or None.
    """

    attention_mask: object = None
    position_ids: torch.Tensor | None = None
    cu_seq_lens: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None
    cache: Cache | None = None
    shape: tuple[int, int | None] | None = None
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
        elif _names_state(name) and _holds_state(value):
            unknown = name
    positions = given.get("position_ids")
    return CallArguments(
        given.get("attention_mask"),
        positions if isinstance(positions, torch.Tensor) else None,
        given.get("cu_seq_lens_q"),
        given.get("seq_idx"),
        cache,
        _shape_of_input(given, names),
        unknown,
    )


def _shape_of_input(given: dict[str, Any], names: tuple[str, ...]) -> tuple[int, int | None] | None:
    tokens, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    if isinstance(tokens, torch.Tensor) and tokens.dim() == 2:
        return tokens.shape[0], tokens.shape[1]
    if isinstance(embeddings, torch.Tensor) and embeddings.dim() == 3:
        return embeddings.shape[0], embeddings.shape[1]
    # Token ids by a name of the model's own: it may add tokens to them.
    first = given.get(names[0]) if names else None
    if isinstance(first, torch.Tensor) and first.dim() == 2 and not first.is_floating_point():
        return first.shape[0], None
    return None


def _names_state(name: str) -> bool:
    words = name.split("_")
    return any(word in STATE for word in words) and not any(word in NO_STATE for word in words)


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


def stream_of(output: Any) -> Any:
    """The first part of a block's output, which should be its hidden states.

    Args:
        output: What the block returned.

    Returns:
        The part, of whatever type it is.
    """
    if isinstance(output, dict):
        return next(iter(output.values()), None)
    if isinstance(output, (list, tuple)):
        return output[0] if output else None
    return output


def check_stream(stream: Any, received: torch.Tensor | None) -> None:
    """Refuse to write into what is not the residual stream that a block received.

    Args:
        stream: As returned by `stream_of`, or what the block received.
        received: What the block received; None: not known.

    Raises:
        TypeError: The stream is not a tensor, or has another shape.
    """
    expected = getattr(received, "shape", None)
    if not isinstance(stream, torch.Tensor) or (expected is not None and stream.shape != expected):
        got = f"shape {list(stream.shape)}" if isinstance(stream, torch.Tensor) else type(stream).__name__
        raise TypeError(
            f"talan_position='output': expected a block to return hidden states {list(expected or [])} first, "
            f"got {got}; use talan_position='input', or choose other blocks by talan_blocks"
        )
