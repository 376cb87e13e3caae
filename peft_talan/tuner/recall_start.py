"""Starts a fresh adapter's side paths as a memory of what attention would read beyond the window."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..config import TalanConfig
from ..functional.initialization import StartTensors, whitened
from .answers import Answers, NothingToRecall
from .attachment import fresh_side_paths
from .attention_weights import attention_behind
from .blocks import find_blocks
from .keyed_start import start_keyed
from .layer import TalanLayer
from .measured_pass import in_evaluation_mode
from .sliding_window import own_window, pretrained_model
from .slot_start import answered_slots, start_slots

STRENGTHS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
"""By what the writes are multiplied."""
SHRINKAGE, KEYED_SHRINKAGE = 0.1, 0.01
"""What is added to each direction's variance; where keys match, places differ in directions of small variance."""
CHOOSING_BATCHES = 4
"""How many batches choose the strength."""


def _check_axes(config: TalanConfig) -> None:
    """Refuse axes that can't be started."""
    if config.talan_mixer not in ("linear", "delta"):
        remedy = "its reads can't be given; use 'linear' or 'delta'"
        raise NothingToRecall(f"talan_mixer={config.talan_mixer!r}: {remedy}")
    if config.talan_mixer == "delta" and config.talan_writeback != "gated":
        raise NothingToRecall(
            f"talan_writeback={config.talan_writeback!r}: what 'delta' reads is of one size at every token, and "
            "is to be written where it is asked for; use 'gated'"
        )


def initialize_talan_recall(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
    shrinkage: float | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Start a fresh adapter's side paths as a memory of what answers depend on beyond the window.

    `linear`: with its window taken away, the model shows by its gradients which tokens an answer depends on, and by
    its attention which heads read them. Slot m starts by weighing the tokens that the m-th token of an answer depends
    on, and is asked where that token is predicted, both by ridge regression on x. Slots that are left start whitened
    as by `initialize_talan_weights`.

    `delta`: keys and queries start as the canonical correlations of x where a token of an answer is predicted, and
    where it stands beyond the window; the gates of writing and reading open there, by ridge regression on x. So one of
    several facts is found by what its question says.

    What is held and written is what the model's attention would have copied, `sum_h p_h W_O W_V` of heads that look
    with weight p_h, to rank d. Of some strengths of the writes, the first four batches with answers choose the one of
    the lowest loss with the window. The adapter's output changes. This is this package's own addition.

    Call it before training, and before the model is wrapped for several processes. Under `torch.autocast` the model
    reads so, and what is computed from it isn't rounded. Some dozens of rows are enough for `linear`; `delta` is the
    better the more there are, up to some thousand for several facts, of which only the first 16 batches are read
    without the window. The attention of two such batches must fit into memory.

    Args:
        model: A model with a sliding window in every block, and a fresh TALAN adapter of `talan_mixer="linear"`, or of
            "delta" with `talan_writeback="gated"`.
        dataloader: Batches with `input_ids`, `labels` and, where rows are padded, `attention_mask`. Of a row the last
            answer is used, for keys all answers. The batches are held until it is done.
        adapter_name: The adapter's name. Default `"default"`.
        shrinkage: What is added to each direction's variance. Default None: 0.1, and 0.01 for `delta`.
        tokenizer: With the model's tokenizer, `delta` finds where answers stand as text, without regard to case and to
            the spaces around them; without it by their tokens, of which " Olga" and "Olga" have others. Default None.

    Raises:
        ValueError: There is no such TALAN adapter, it has been trained, or the model has no window or no attention
            whose projections are known; nothing has changed then. `NothingToRecall` if the axes can't be started so,
            rows are packed, or no answer has a token beyond the window, or for `delta` one that stands there.

    Examples:
        >>> initialize_talan_recall(trainer.model, trainer.get_train_dataloader(), tokenizer=tokenizer)
    """
    base = pretrained_model(model)
    layers = [layer for _, layer in fresh_side_paths(model, adapter_name)]
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if base is None or not isinstance(config, TalanConfig):
        raise ValueError("model: give what get_peft_model returned for a transformers model")
    _check_axes(config)
    keyed = config.talan_mixer == "delta"
    shrinkage = (KEYED_SHRINKAGE if keyed else SHRINKAGE) if shrinkage is None else shrinkage
    if not shrinkage > 0:
        raise ValueError(f"shrinkage={shrinkage!r}: give a positive number")
    if any(adapter_name not in layer.active_adapters or layer.disable_adapters for layer in layers):
        raise ValueError(f"adapter_name={adapter_name!r}: it isn't active; call set_adapter first")
    if all(
        layer.talan_position[adapter_name] == "output" and layer.block_index == layer.depth - 1 for layer in layers
    ):
        raise NothingToRecall("talan_layers: no attention reads what the side path writes; give an earlier block")
    window = own_window(base)
    blocks = list(find_blocks(base, config)[1])
    attentions = {layer: attention_behind(layer, blocks, adapter_name) for layer in layers}
    batches = [Answers.of(batch, window, answered_slots(config), base.device) for batch in dataloader]
    choosing = [batch for batch in batches if batch.any][:CHOOSING_BATCHES]
    forward = _in_callers_precision(model, base.device.type)
    with in_evaluation_mode(model), torch.autocast(base.device.type, enabled=False):
        told = (base, forward, config, attentions, adapter_name, batches, window, shrinkage)
        started = choosing and (start_keyed(*told, tokenizer) if keyed else start_slots(*told))
        if not started:
            stands, other = (" that stands there, too", "talan_mixer='linear', or ") if keyed else ("", "")
            raise NothingToRecall(
                f"dataloader: no answer has a token further back than the window of {window}{stands}; give rows that "
                f"are longer, or use {other}initialize_talan_weights"
            )
        _install(forward, started, adapter_name, choosing, shrinkage)


def _in_callers_precision(model: nn.Module, device: str) -> Callable[..., Any]:
    """The model's forward pass under the autocast that is on now, for use where it is off."""
    autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def forward(**inputs: Any) -> Any:
        with autocast:
            return model(**inputs)

    return forward


@torch.no_grad()
def _install(
    forward: Callable[..., Any],
    started: Mapping[TalanLayer, StartTensors],
    adapter_name: str,
    choosing: list[Answers],
    shrinkage: float,
) -> None:
    """Copy what the side paths start from into their tensors; some batches choose the strength of the writes."""
    parameters = {layer: layer.parameters_of(adapter_name) for layer in started}
    for layer, start in started.items():
        read, gate = parameters[layer].read, parameters[layer].gate
        if len(start.rows) < len(read):
            read.copy_(whitened(read, start.moment, shrinkage))
        for index, row in start.rows.items():
            read[index] = row.to(read)
        parameters[layer].mixer[0].copy_(start.mixer)
        if gate is not None and start.gate is not None:
            gate.copy_(start.gate)

    def set_strength(strength: float) -> None:
        for layer, start in started.items():
            if start.write is not None:
                parameters[layer].write.copy_(start.write * strength)

    def loss_at(strength: float) -> float:
        set_strength(strength)
        return sum(float(loss) for batch in choosing for loss in batch.losses(forward)[0])

    tried = logging.tqdm(STRENGTHS, "Choosing the strength", disable=None, leave=False)
    set_strength(min((loss_at(strength), strength) for strength in tried)[1])
