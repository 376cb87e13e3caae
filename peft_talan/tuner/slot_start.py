"""What `linear` side paths start from: slots that hold what each place in an answer depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import TalanConfig
from ..functional.initialization import StartTensors, copying_rows, opening_row, telling_row
from .answers import Answers
from .attention_weights import AttentionCopy
from .layer import TalanLayer
from .measured_pass import TokenSums, attention_with_weights, kept_streams, normalized
from .sliding_window import without_window


def answered_slots(config: TalanConfig) -> int:
    """How many slots start with what a place in the answers depends on."""
    return min(config.talan_slots, config.talan_dim)


@dataclass
class _Sums(TokenSums):
    """What is summed up for one side path."""

    scale: float = 0.0
    """The root mean square of the residual stream where answers are predicted."""
    found: dict[int, torch.Tensor] = field(default_factory=dict)
    """Of each place in the answers: x of the tokens that it depends on."""
    content: Any = 0.0
    """x x^T of the same tokens, of all places."""
    asking: dict[int, torch.Tensor] = field(default_factory=dict)
    """Of each place in the answers: x of the tokens that predict it."""
    answers: dict[int, int] = field(default_factory=dict)
    reading: Any = 0.0
    """[heads]: how much each head of the attention that follows looks at what an answer depends on."""


def start_slots(
    base: PreTrainedModel,
    forward: Callable[..., Any],
    config: TalanConfig,
    attentions: Mapping[TalanLayer, AttentionCopy | None],
    adapter_name: str,
    batches: list[Answers],
    window: int,
    shrinkage: float,
) -> dict[TalanLayer, StartTensors]:
    """Read the batches without the window, and make the tensors; none if no answer depends on what lies beyond it."""
    with without_window(base), attention_with_weights(base):
        sums = _collect(base, forward, attentions, adapter_name, batches, window)
    if not any(part.answers for part in sums.values()):
        return {}
    return {layer: _make(config, part, attentions[layer], shrinkage) for layer, part in sums.items() if part.tokens}


def _collect(
    base: PreTrainedModel,
    forward: Callable[..., Any],
    attentions: Mapping[TalanLayer, AttentionCopy | None],
    adapter_name: str,
    batches: list[Answers],
    window: int,
) -> dict[TalanLayer, _Sums]:
    """Sum up what `_Sums` holds over the batches."""
    sums = {layer: _Sums() for layer in attentions}
    with ExitStack() as hooks, kept_streams(sums, adapter_name) as streams, torch.enable_grad():
        # Gradients reach every stream, also where nothing before it is trained.
        embeddings: Any = base.get_input_embeddings()
        hooks.callback(embeddings.register_forward_hook(lambda *call: call[2].requires_grad_()).remove)
        for batch in logging.tqdm(batches, "Reading without the window", disable=None, leave=False):
            losses, output = batch.losses(forward, output_attentions=True)
            read = {layer: (stream.detach(), normalized(stream)) for layer, stream in streams.items()}
            for layer, (_, x) in read.items():
                sums[layer].add(x[batch.valid])
            for ordinal, (loss, (rows, at, _)) in enumerate(zip(losses, batch.places, strict=True)):
                if not len(rows):
                    continue
                gradients = torch.autograd.grad(loss, list(streams.values()), retain_graph=True, allow_unused=True)
                far = batch.valid[rows] & (
                    torch.arange(batch.valid.shape[1], device=at.device) <= at[:, None] - window
                )
                for (layer, (stream, x)), gradient in zip(read.items(), gradients, strict=True):
                    if gradient is not None:
                        reader = attentions[layer]
                        weights = None if reader is None else output.attentions[reader.index][rows, :, at].detach()
                        _add_answers(sums[layer], ordinal, stream[rows], x[rows], gradient[rows], far, at, weights)
            streams.clear()
    return sums


def _add_answers(
    sums: _Sums,
    ordinal: int,
    stream: torch.Tensor,
    x: torch.Tensor,
    gradient: torch.Tensor,
    far: torch.Tensor,
    at: torch.Tensor,
    attention: torch.Tensor | None,
) -> None:
    """Add what the answers of one place depend on, by the size of the loss's gradient with respect to x."""
    scale = stream.to(x.dtype).square().mean(-1).sqrt()
    share = gradient.to(x.dtype).norm(dim=-1) * scale * far
    total = share.sum(1)
    answers = (total > 0).nonzero()[:, 0]
    if not len(answers):
        return
    share, x, at, scale = share[answers] / total[answers, None], x[answers], at[answers], scale[answers]
    each = torch.arange(len(answers), device=x.device)
    sums.content = sums.content + torch.einsum("ati,atj->ij", share[:, :, None] * x, x)
    sums.found[ordinal] = sums.found.get(ordinal, 0) + (share[:, :, None] * x).sum((0, 1))
    sums.asking[ordinal] = sums.asking.get(ordinal, 0) + x[each, at].sum(0)
    sums.answers[ordinal] = sums.answers.get(ordinal, 0) + len(answers)
    sums.scale += float(scale[each, at].sum())
    if attention is not None:
        looked = (attention[answers].to(x.dtype) * share[:, None]).sum(-1)
        sums.reading = sums.reading + (looked / share.square().sum(-1, keepdim=True)).sum(0)


def _make(config: TalanConfig, sums: _Sums, attention: AttentionCopy | None, shrinkage: float) -> StartTensors:
    mean, moment = sums.means()
    rows: dict[int, torch.Tensor] = {}
    for ordinal in range(answered_slots(config)):
        rows[config.talan_dim + ordinal] = torch.zeros_like(mean)
        if ordinal not in sums.answers:
            continue
        number = sums.answers[ordinal]
        rows[2 * config.talan_dim + ordinal] = opening_row(sums.found[ordinal] / number, mean, moment, shrinkage)
        rows[config.talan_dim + ordinal] = telling_row(sums.asking[ordinal] / number, mean, moment, shrinkage)
    readout = torch.eye(config.talan_dim, config.talan_slots)
    if attention is None or not sums.answers:
        return StartTensors(rows, None, moment, readout)
    number = sum(sums.answers.values())
    left, right = attention.factors(sums.reading / number)
    read, write = copying_rows(left.to(mean), right.to(mean), mean, sums.content / number, config.talan_dim, shrinkage)
    if config.talan_writeback == "relative":
        write = write * number / sums.scale
    rows.update(enumerate(read))
    return StartTensors(rows, write, moment, readout)
