"""Records the residual stream of a model at every block, with and without its adapters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..functional.parameters import working_dtype
from ..tuner.attachment import attached_side_paths
from ..tuner.layer import TalanLayer
from ..tuner.measured_pass import in_evaluation_mode, run
from ..tuner.residual_streams import stream_of

Inputs = Mapping[str, torch.Tensor]
Measured = TypeVar("Measured")


class Streams(NamedTuple):
    """The residual stream at both ends of every block, [real tokens, hidden_size] each, and what was written."""

    before: list[torch.Tensor]
    after: list[torch.Tensor]
    written: dict[int, torch.Tensor]


def steered_blocks(model: nn.Module) -> list[nn.Module]:
    """The list of blocks, in order, that the side paths are attached to; `ValueError` without a side path."""
    attached = {id(block) for block, _ in attached_side_paths(model)}
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(id(block) in attached for block in module):
            return list(module)
    raise ValueError(f"model={type(model).__name__}: it has no side path; give a model with a TALAN adapter")


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; modes, adapters and gradients are restored afterwards.

    Raises `ValueError` if the adapters are disabled or merged.
    """
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    if any(layer.disable_adapters for layer in _switches(model)):
        raise ValueError("model: its adapters are disabled; enable them to measure what they do")
    if any(layer.merged for layer in _switches(model)):
        raise ValueError("model: an adapter's LoRA weights are merged, and can't be measured alone; unmerge it first")
    try:
        with in_evaluation_mode(model):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.requires_grad_(gradient)


def _switches(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Run the base model inside; only inside of `evaluated`, which restores gradients."""
    for layer in _switches(model):
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in _switches(model):
            layer.enable_adapters(True)


@torch.no_grad()
def record_streams(model: nn.Module, inputs: Inputs) -> Streams:
    """Run the model and record the residual stream of the real tokens.

    Args:
        model: A model with a TALAN adapter.
        inputs: What it takes; labels are left out.

    Returns:
        The stream, at least float32.

    Raises:
        ValueError: The attention mask is not of shape [batch, tokens], or blocks run more than once in a forward pass.
    """
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"inputs: attention_mask has {mask.dim()} dimensions; give one of [batch, tokens], or none")
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    written: dict[int, torch.Tensor] = {}

    def real(stream: torch.Tensor) -> torch.Tensor:
        tokens = stream.detach().to(working_dtype(stream.dtype))
        return tokens.flatten(0, 1) if mask is None else tokens[mask.to(tokens.device, torch.bool)]

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before.append(real(layout.read(args[0] if args else kwargs["hidden_states"])))

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        after.append(real(layout.read(stream_of(output))))

    def write(layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if isinstance(layer, TalanLayer) and not layer.disable_adapters:
            change = real(output) - real(args[0])
            written[layer.block_index] = written.get(layer.block_index, 0) + change

    blocks = steered_blocks(model)
    layout = next(layer.streams for _, layer in attached_side_paths(model))
    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(leave).remove)
        for _, layer in attached_side_paths(model):
            hooks.callback(layer.register_forward_hook(write).remove)
        run(model, inputs)
    if len(after) > len(blocks):
        raise ValueError(
            f"model={type(model).__name__}: its {len(blocks)} blocks ran {len(after)} times in a forward pass, and a "
            "block that runs more than once has more than one residual stream to measure"
        )
    return Streams(before, after, written)


def norm(stream: torch.Tensor) -> torch.Tensor:
    """The length of each token's vector, [tokens] of [tokens, hidden_size]."""
    return torch.linalg.vector_norm(stream, dim=-1)


class TokenMeans:
    """Means over the tokens of several batches, by name."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, name: str, values: torch.Tensor) -> None:
        """Add one number per token, [tokens]."""
        self._sums[name] += float(values.double().sum())
        self._counts[name] += len(values)

    def add_norms(self, **streams: torch.Tensor) -> None:
        """Add the lengths of the tokens' vectors, [tokens, hidden_size] each."""
        for name, stream in streams.items():
            self.add(name, norm(stream))

    def add_cosine(self, name: str, first: torch.Tensor, second: torch.Tensor) -> None:
        """Add the cosines of the tokens at which neither vector is zero."""
        lengths = norm(first) * norm(second)
        defined = lengths > 0
        self.add(name, (first * second).sum(-1)[defined] / lengths[defined])

    def get(self, name: str) -> float | None:
        """The mean, or None where no token was added."""
        return self._sums[name] / self._counts[name] if self._counts[name] else None

    def of(self, name: str) -> float:
        """The mean, or 0 where no token was added."""
        return self.get(name) or 0.0

    def ratio(self, above: str, below: str) -> float | None:
        """The ratio of two means, or None where the second is zero."""
        divisor = self.get(below)
        return self.of(above) / divisor if divisor else None


def measure_layer(
    measure: Callable[..., Measured], layer: TalanLayer, args: tuple[Any, ...], most: int | None = None
) -> Iterator[tuple[str, Measured, torch.Tensor]]:
    """Measure the side paths of a layer from a forward pre-hook, on the first `most` tokens of each row.

    Yields, for each active adapter that acts here, its name, what `token_measures` or `side_path_statistics` returned,
    and which tokens are real, [batch, tokens].
    """
    hidden_states, position, call = args[:3]
    layout = call.layout(hidden_states)
    stream = hidden_states[:, :most]
    valid, segment_ids = (None if part is None else part[:, :most] for part in (layout.valid, layout.segment_ids))
    real = torch.ones(stream.shape[:2], dtype=torch.bool) if valid is None else valid
    for name in layer.active_adapters:
        if layer.talan_position.get(name) == position:
            options, alpha = layer.talan_options[name], layer.alpha_at_run_time(name)
            measured = measure(
                stream, layer.parameters_of(name), options, alpha=alpha, valid=valid, segment_ids=segment_ids
            )
            yield name, measured, real
