"""Starts a fresh adapter's side paths as a memory of what attention would read beyond the window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import TalanConfig
from ..functional.fused import inverse_rms
from ..functional.initialization import copying_rows, telling_row, whitened
from ..functional.parameters import working_dtype
from .answers import Answers, reach_beyond
from .attachment import fresh_side_paths
from .attention_weights import AttentionCopy, attention_behind
from .blocks import find_blocks
from .layer import TalanLayer
from .measured_pass import in_evaluation_mode
from .sliding_window import own_window, pretrained_model, without_window

WEIGHT_OF_FOUND = 6.0
"""The slot logit of a token that an answer depends on, above the mean of all tokens."""
SPREAD_OF_OTHERS = 2.5
"""The largest standard deviation of a slot's logits."""
STRENGTHS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
"""By what the writes are multiplied."""
CHOOSING_BATCHES = 4
"""How many batches choose the strength."""


@dataclass
class _Sums:
    """What is summed up for one side path."""

    moment: Any = 0.0
    """x x^T over all tokens."""
    total: Any = 0.0
    """x over all tokens."""
    tokens: int = 0
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


def can_start_for_recall(model: nn.Module, dataloader: Iterable[Mapping[str, Any]], adapter_name: str) -> bool:
    """Whether `initialize_talan_recall` has something to start from.

    That is: a mixer whose reads can be given, a side path before some block's attention, and an answer that has a
    token beyond the window, in rows that aren't packed.
    """
    config = getattr(model, "peft_config", {})[adapter_name]
    layers = [layer for _, layer in fresh_side_paths(model, adapter_name)]
    if config.talan_mixer != "linear" or not any(_has_attention_behind(layer, adapter_name) for layer in layers):
        return False
    return reach_beyond(dataloader, own_window(model), _answered_slots(config))


def _has_attention_behind(layer: TalanLayer, adapter_name: str) -> bool:
    return layer.talan_position[adapter_name] == "input" or layer.block_index < layer.depth - 1


def _answered_slots(config: TalanConfig) -> int:
    """How many slots start with what a place in the answers depends on."""
    return min(config.talan_slots, config.talan_dim)


def initialize_talan_recall(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
    shrinkage: float = 0.1,
) -> None:
    """Start a fresh adapter's side paths as a memory of what answers depend on beyond the window.

    With its window taken away, the model shows by its gradients which tokens an answer depends on, and by its
    attention which heads read them. Slot m starts by weighing the tokens that the m-th token of an answer depends on,
    and is asked where that token is predicted, both by ridge regression on x; what a slot holds and what is written is
    what those heads would have copied, `sum_h p_h W_O W_V` of heads that look with weight p_h, to rank d. Of some
    strengths of the writes, the first four batches with answers choose the one of the lowest loss with the window.
    Slots that are left start whitened as by `initialize_talan_weights`. The adapter's output changes. This is this
    package's own addition.

    Call it before training, and before the model is wrapped for several processes. Some dozens of rows are enough;
    the attention of one batch without its window must fit into memory.

    Args:
        model: A model with a sliding window in every block, and a fresh TALAN adapter of `talan_mixer="linear"`.
        dataloader: Batches with `input_ids`, `labels` and, where rows are padded, `attention_mask`. Of a row the last
            answer is used. The batches are held until it is done.
        adapter_name: The adapter's name. Default `"default"`.
        shrinkage: What is added to each direction's variance. Default 0.1.

    Raises:
        ValueError: There is no such TALAN adapter, it has been trained, the model has no window or no attention whose
            projections are known, or no answer has a token beyond the window; nothing has changed then.

    Examples:
        >>> initialize_talan_recall(trainer.model, list(itertools.islice(trainer.get_train_dataloader(), 16)))
    """
    base = pretrained_model(model)
    layers = [layer for _, layer in fresh_side_paths(model, adapter_name)]
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if base is None or not isinstance(config, TalanConfig):
        raise ValueError("model: give what get_peft_model returned for a transformers model")
    if config.talan_mixer != "linear":
        raise ValueError(f"talan_mixer={config.talan_mixer!r}: its reads can't be given; use 'linear'")
    if not shrinkage > 0:
        raise ValueError(f"shrinkage={shrinkage!r}: give a positive number")
    if any(adapter_name not in layer.active_adapters or layer.disable_adapters for layer in layers):
        raise ValueError(f"adapter_name={adapter_name!r}: it isn't active; call set_adapter first")
    if not any(_has_attention_behind(layer, adapter_name) for layer in layers):
        raise ValueError("talan_layers: no attention reads what the side path writes; give an earlier block")
    window = own_window(base)
    blocks = list(find_blocks(base, config)[1])
    attentions = {layer: attention_behind(layer, blocks, adapter_name) for layer in layers}
    slots = _answered_slots(config)
    batches = [Answers.of(batch, window, slots, base.device) for batch in dataloader]
    with in_evaluation_mode(model):
        with without_window(base), _telling_weights(base):
            sums = _collect(base, model, attentions, adapter_name, batches, window)
        started = {
            layer: _start(config, sums[layer], attentions[layer], slots, shrinkage)
            for layer in attentions
            if sums[layer].tokens
        }
        if not any(sums[layer].answers for layer in started):
            raise ValueError(
                f"dataloader: no answer has a token further back than the window of {window}; give rows that are "
                "longer, or use initialize_talan_weights"
            )
        _install(model, started, adapter_name, batches, slots, shrinkage)


@contextmanager
def _telling_weights(base: PreTrainedModel) -> Iterator[None]:
    """Use the attention that returns its weights."""
    implementation = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(implementation)


def _collect(
    base: PreTrainedModel,
    model: nn.Module,
    attentions: Mapping[TalanLayer, AttentionCopy | None],
    adapter_name: str,
    batches: list[Answers],
    window: int,
) -> dict[TalanLayer, _Sums]:
    """Sum up what `_Sums` holds over the batches."""
    sums = {layer: _Sums() for layer in attentions}
    streams: dict[TalanLayer, torch.Tensor] = {}

    def keep(layer: nn.Module, args: tuple[Any, ...]) -> None:
        hidden_states, position = args[:2]
        if isinstance(layer, TalanLayer) and layer.talan_position[adapter_name] == position:
            streams[layer] = hidden_states

    with ExitStack() as hooks, torch.enable_grad():
        # Gradients reach every stream, also where nothing before it is trained.
        embeddings: Any = base.get_input_embeddings()
        hooks.callback(embeddings.register_forward_hook(lambda *call: call[2].requires_grad_()).remove)
        for layer in sums:
            hooks.callback(layer.register_forward_pre_hook(keep).remove)
        for batch in logging.tqdm(batches, "Reading without the window", disable=None, leave=False):
            losses, output = batch.losses(model, output_attentions=True)
            read = {layer: (stream.detach(), _normalized(stream)) for layer, stream in streams.items()}
            for layer, (_, x) in read.items():
                rows = x[batch.valid]
                sums[layer].moment = sums[layer].moment + rows.T @ rows
                sums[layer].total = sums[layer].total + rows.sum(0)
                sums[layer].tokens += len(rows)
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


def _normalized(stream: torch.Tensor) -> torch.Tensor:
    stream = stream.detach().to(working_dtype(stream.dtype))
    return stream * inverse_rms(stream)


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


def _start(
    config: TalanConfig, sums: _Sums, attention: AttentionCopy | None, slots: int, shrinkage: float
) -> tuple[dict[int, torch.Tensor], torch.Tensor | None, torch.Tensor]:
    """Rows of `W_read` by their index, `W_write` of strength 1, and the moment that whitens the other rows."""
    mean, moment = sums.total / sums.tokens, sums.moment / sums.tokens
    rows: dict[int, torch.Tensor] = {}
    for ordinal in range(slots):
        rows[config.talan_dim + ordinal] = torch.zeros_like(mean)
        if ordinal not in sums.answers:
            continue
        number = sums.answers[ordinal]
        slot = telling_row(sums.found[ordinal] / number, mean, moment, shrinkage)
        spread = float((slot @ moment @ slot).sqrt())
        rows[2 * config.talan_dim + ordinal] = slot * min(WEIGHT_OF_FOUND, SPREAD_OF_OTHERS / spread)
        rows[config.talan_dim + ordinal] = telling_row(sums.asking[ordinal] / number, mean, moment, shrinkage)
    if attention is None or not sums.answers:
        return rows, None, moment
    number = sum(sums.answers.values())
    left, right = attention.factors(sums.reading / number)
    read, write = copying_rows(left.to(mean), right.to(mean), mean, sums.content / number, config.talan_dim, shrinkage)
    if config.talan_writeback == "relative":
        write = write * number / sums.scale
    rows.update(enumerate(read))
    return rows, write, moment


@torch.no_grad()
def _install(
    model: nn.Module,
    started: Mapping[TalanLayer, tuple[dict[int, torch.Tensor], torch.Tensor | None, torch.Tensor]],
    adapter_name: str,
    batches: list[Answers],
    slots: int,
    shrinkage: float,
) -> None:
    """Copy what the side paths start from into their tensors, and choose the strength of the writes."""
    parameters = {layer: layer.parameters_of(adapter_name) for layer in started}
    for layer, (rows, _, moment) in started.items():
        read, (readout, *_) = parameters[layer].read, parameters[layer].mixer
        read.copy_(whitened(read, moment, shrinkage))
        for index, row in rows.items():
            read[index] = row.to(read)
        readout.zero_()[:slots] = torch.eye(slots, readout.shape[1]).to(readout)

    choosing = [batch for batch in batches if batch.any][:CHOOSING_BATCHES]

    def set_strength(strength: float) -> None:
        for layer, (_, write, _) in started.items():
            if write is not None:
                parameters[layer].write.copy_(write * strength)

    def loss_at(strength: float) -> float:
        set_strength(strength)
        return sum(float(loss) for batch in choosing for loss in batch.losses(model)[0])

    tried = logging.tqdm(STRENGTHS, "Choosing the strength", disable=None, leave=False)
    set_strength(min((loss_at(strength), strength) for strength in tried)[1])
