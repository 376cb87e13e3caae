"""How a model's blocks lay out their hidden states, and which residual stream of them a side path reads and writes.

A side path works on one residual stream, [batch, tokens, hidden_size]. Where a model has several of each token, it
reads one and adds the same perturbation to all of them: their mean moves by exactly it, and so does any stream that
the model reads; a perturbation of zero changes no bit. What is read is what the model itself takes a token's hidden
state from:

- hyper-connections (DeepSeek V4, GLM-5 Next, HunYuan V4, Qwen4-exp): the mean. All streams start as the token's
  embedding, each block reads a sum of them whose weights depend on the token, and the mean is the one sum without
  weights.
- AltUp (Gemma 3n): the active stream, which each block predicts its input from. The others are in bases of their own,
  so their mean is no hidden state.
- ProphetNet: the main stream, whose keys all streams attend to. The others start without the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.utils import output_capturing

from ..functional.parameters import working_dtype
from .blocks import find_decoder, innermost_config, is_from_transformers

TOKENS_FIRST = ("fsmt", "xlnet")
"""Model types whose blocks pass on hidden states of shape [tokens, batch, hidden_size]."""

NOT_OF_TOKENS: dict[str, str] = {
    "longformer": "pass on hidden states that are padded to a multiple of the attention window",
    "mask2former": "pass on the queries of an image, which are no tokens of a sequence",
    "oneformer": "pass on the queries of an image, which are no tokens of a sequence",
}
"""Model types whose blocks pass on hidden states of something else than the model's tokens, and what it is."""


@dataclass(frozen=True)
class ResidualStreams:
    """Where the residual streams lie in a block's hidden states. The default is one, [batch, tokens, hidden_size].

    Args:
        dimension: The dimension of the streams; None: there is one stream, without a dimension of its own.
        count: The number of streams.
        joined: Whether the streams lie one after the other in that dimension, [count * size], and not in one of their
            own before it.
        main: The index of the stream that is read; None: the mean of all.
        hidden_size: The width of a stream; None: not checked.
        tokens_first: Whether the one stream is [tokens, batch, hidden_size].
    """

    dimension: int | None = None
    count: int = 1
    joined: bool = False
    main: int | None = None
    hidden_size: int | None = None
    tokens_first: bool = False

    def shape_of_one(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of the stream that is read.

        Args:
            shape: That of the hidden states.

        Returns:
            (batch, tokens, hidden_size).

        Raises:
            ValueError: The hidden states do not hold these streams.
        """
        if self.tokens_first:
            return (shape[1], shape[0], *shape[2:]) if len(shape) > 1 else tuple(shape)
        if self.dimension is None:
            return tuple(shape)
        sizes, fits = list(shape), len(shape) == (3 if self.joined else 4)
        if fits and self.joined:
            sizes[self.dimension], rest = divmod(sizes[self.dimension], self.count)
            fits = rest == 0
        elif fits:
            fits = sizes.pop(self.dimension) == self.count
        if not fits or sizes[-1] != self.hidden_size:
            expected: list[object] = ["batch", "tokens", self.hidden_size]
            if self.joined:
                expected[self.dimension] = f"{self.count} x {expected[self.dimension]}"
            else:
                expected.insert(self.dimension, self.count)
            raise ValueError(
                f"talan_layers: a block has hidden states of shape {list(shape)}, expected "
                f"[{', '.join(map(str, expected))}]: the model lays its {self.count} residual streams out differently "
                "there; choose other blocks, or use plain LoRA for this model"
            )
        return tuple(sizes)

    def read(self, hidden_states: Any) -> Any:
        """Read one stream.

        Args:
            hidden_states: What a block receives or returns. What is no tensor is returned as it is.

        Returns:
            The stream that a side path reads, [batch, tokens, hidden_size]; of several, in float32 or float64.

        Raises:
            ValueError: The hidden states do not hold these streams.
        """
        if not isinstance(hidden_states, torch.Tensor):
            return hidden_states
        # Contiguous: of other tensors, products with weights that train are rounded unlike those with frozen ones.
        if self.tokens_first:
            return hidden_states.transpose(0, 1).contiguous()
        if self.dimension is None:
            return hidden_states
        self.shape_of_one(hidden_states.shape)
        streams = self._apart(hidden_states)
        # Not in half precision, in which a small perturbation of the stream would be lost on the way to the others.
        dtype = working_dtype(streams.dtype)
        if self.main is None:
            return streams.mean(self.dimension, dtype=dtype)
        return streams.select(self.dimension, self.main).to(dtype).contiguous()

    def write(self, hidden_states: torch.Tensor, read: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """Write what changed into every stream.

        Args:
            hidden_states: What a block receives or returns.
            read: What `read` returned for it.
            written: The same with a perturbation, [batch, tokens, hidden_size].

        Returns:
            The hidden states in their own order and dtype, in which what was read has become what was written.
        """
        if self.tokens_first:
            return written.transpose(0, 1).contiguous()
        if self.dimension is None:
            return written
        # In the dtype of what was written, to which a sharding library may have cast what was read.
        change = (written - read.to(written)).to(hidden_states.dtype).unsqueeze(self.dimension)
        streams = self._apart(hidden_states.to(written.device)) + change
        return streams.flatten(self.dimension, self.dimension + 1) if self.joined else streams

    def _apart(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The streams in a dimension of their own."""
        if not self.joined or self.dimension is None:
            return hidden_states
        return hidden_states.unflatten(self.dimension, (self.count, -1))


def _count(owner: object, field: str) -> int | None:
    value = getattr(owner, field, None)
    return value if isinstance(value, int) else None


def find_streams(model: nn.Module, block_name: str) -> ResidualStreams:
    """Find how a block lays out its hidden states, by what the model says about itself and never by shapes.

    Args:
        model: The model.
        block_name: The block's name in it.

    Returns:
        The residual streams.

    Raises:
        ValueError: They are not those of the model's tokens, or there are several of each and the model is none of
            transformers', so that their layout is not known.
    """
    config, decoder = innermost_config(model, block_name), find_decoder(model, block_name)
    model_type, width = getattr(config, "model_type", None), getattr(config, "hidden_size", None)
    if model_type in NOT_OF_TOKENS:
        raise _refusal(model, NOT_OF_TOKENS[model_type])
    if model_type in TOKENS_FIRST:
        return ResidualStreams(tokens_first=True)
    if (predicting := _count(decoder, "ngram")) is not None and model_type == "prophetnet":
        return ResidualStreams(1, 1 + predicting, joined=True, main=0, hidden_size=width)
    kinds = {
        "hc_mult": ResidualStreams(2, hidden_size=width),
        "hc_count": ResidualStreams(2, joined=True, hidden_size=width),
        "altup_num_inputs": ResidualStreams(0, main=_count(config, "altup_active_idx") or 0, hidden_size=width),
    }
    for field, streams in kinds.items():
        count = _count(config, field)
        if count is None:
            continue
        if is_from_transformers(decoder):
            return replace(streams, count=count)
        if count > 1:
            raise _refusal(
                model,
                f"pass on several hidden states of each token ({field}={count}), in an order that only transformers' "
                "own models are known to have",
            )
    return ResidualStreams()


def _refusal(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"model={type(model).__name__}: its blocks {reason}, and a side path reads and writes hidden states "
        "of shape [batch, tokens, hidden_size]; use a plain LoraConfig"
    )


def recorded_states() -> list[torch.Tensor] | None:
    """The hidden states that `output_hidden_states=True` has recorded in the call under way; None without it."""
    recorded = output_capturing._active_collector.get()
    states: list[torch.Tensor] | None = recorded.get("hidden_states") if recorded else None
    return states


def replace_recorded_state(before: torch.Tensor, after: torch.Tensor) -> None:
    """Let `output_hidden_states=True` show what a block receives if a side path wrote at its input.

    transformers records a block's output before the next block's input is changed.
    """
    states = recorded_states()
    if states and states[-1] is before:
        states[-1] = after


def replace_stream(output: Any, written: torch.Tensor) -> Any:
    """Put the changed residual stream into a block's output."""
    if isinstance(output, torch.Tensor):
        return written
    if isinstance(output, dict):
        return type(output)(**{**output, next(iter(output)): written})
    parts = (written, *output[1:])
    return output._make(parts) if hasattr(output, "_make") else type(output)(parts)


def stream_of(output: Any) -> Any:
    """The first part of a block's output, of whatever type it is, which should be its hidden states."""
    if isinstance(output, dict):
        return next(iter(output.values()), None)
    if isinstance(output, (list, tuple)):
        return output[0] if output else None
    return output


def check_same_shape(stream: Any, expected: tuple[int, ...] | None) -> None:
    """Refuse to write into what is not the residual stream that a block received, of the expected shape."""
    if not isinstance(stream, torch.Tensor) or (expected is not None and stream.shape != expected):
        got = f"shape {list(stream.shape)}" if isinstance(stream, torch.Tensor) else type(stream).__name__
        raise TypeError(
            f"talan_position='output': expected a block to return hidden states {list(expected or [])} first, "
            f"got {got}; use talan_position='input', or choose other blocks by talan_blocks"
        )
