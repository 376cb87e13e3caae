"""Forward passes that only measure: without dropout, a cache or a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..functional.fused import inverse_rms
from ..functional.parameters import working_dtype
from .block_context import BlockContext
from .layer import TalanLayer
from .sliding_window import pretrained_model


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def run(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Run the model on its device without a cache, and with logits of few tokens; labels are left out."""
    base: Any = pretrained_model(model) or model
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in signature(base.forward).parameters:
        options["logits_to_keep"] = 1
    device = next(base.parameters()).device
    for name, part in inputs.items():
        # Where the first parameters are offloaded, what brings them in moves the inputs, too.
        moves = isinstance(part, torch.Tensor) and device.type != "meta"
        if name != "labels":
            options[name] = part.to(device) if moves else part
    model(**options)


@dataclass
class TokenSums:
    """What is summed up over all tokens that one side path reads."""

    moment: Any = 0.0
    """x x^T over all tokens."""
    total: Any = 0.0
    """x over all tokens."""
    tokens: int = 0

    def add(self, x: torch.Tensor) -> None:
        """Add tokens, [tokens, hidden_size]."""
        self.moment, self.total = self.moment + x.T @ x, self.total + x.sum(0)
        self.tokens += len(x)

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """E[x] and E[x x^T]."""
        return self.total / self.tokens, self.moment / self.tokens


@contextmanager
def attention_with_weights(base: PreTrainedModel) -> Iterator[None]:
    """Use the attention that returns its weights."""
    implementation = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(implementation)


@contextmanager
def reading(
    layers: Iterable[TalanLayer], adapter_name: str, take: Callable[[TalanLayer, torch.Tensor, BlockContext], None]
) -> Iterator[None]:
    """Let `take` have what side paths of an adapter read, [batch, tokens, hidden_size], and the call of the block."""

    def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
        hidden_states, position, context = args[:3]
        if isinstance(layer, TalanLayer) and layer.talan_position[adapter_name] == position:
            take(layer, hidden_states, context)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(look).remove)
        yield


@contextmanager
def kept_streams(layers: Iterable[TalanLayer], adapter_name: str) -> Iterator[dict[TalanLayer, torch.Tensor]]:
    """Keep what side paths of an adapter read in the last pass, [batch, tokens, hidden_size]."""
    streams: dict[TalanLayer, torch.Tensor] = {}

    def keep(layer: TalanLayer, hidden_states: torch.Tensor, _: BlockContext) -> None:
        streams[layer] = hidden_states

    with reading(layers, adapter_name, keep):
        yield streams


def normalized(stream: torch.Tensor) -> torch.Tensor:
    """RMSNorm(h), as side paths read it."""
    stream = stream.detach().to(working_dtype(stream.dtype))
    return stream * inverse_rms(stream)
