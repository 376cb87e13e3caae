"""The inner states of a TALAN model on any batch: what LoRA weights and side path change, and what tokens read.

These are the measurements of the paper (arXiv 2606.06902), which prints no definitions; the definitions are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..tuner.attachment import attached_side_paths
from ..tuner.layer import TalanLayer
from ..tuner.measured_pass import run
from ..tuner.strength import talan_strength
from .streams import (
    Inputs,
    TokenMeans,
    evaluated,
    measure_layer,
    record_streams,
    steered_blocks,
    without_adapters,
)
from .token_measures import TokenMeasures, token_measures


@dataclass(frozen=True)
class BlockMeasures:
    """The residual stream after one block: means over the real tokens.

    Args:
        block: The block's index.
        hidden_norm: |h|, with the adapter.
        low_rank_norm: |u|, u the change that the LoRA weights alone make to the stream: with it minus without it,
            the side path off in both.
        side_path_norm: |d|, d the change that the side path makes to the stream: with it minus without it, the
            LoRA weights on in both.
        ratio: `low_rank_norm / side_path_norm`; None if the side path has not written yet.
        cosine: The mean cosine of u and d; None if one of them is zero everywhere.
        written_norm: |delta|, what the block's own side path writes; None if it has none.
        written_ratio: |u| / |delta| at the end of the block where it writes.
        written_cosine: The mean cosine of u and delta there.
    """

    block: int
    hidden_norm: float
    low_rank_norm: float
    side_path_norm: float
    ratio: float | None
    cosine: float | None
    written_norm: float | None
    written_ratio: float | None
    written_cosine: float | None


@dataclass(frozen=True)
class Propagation:
    """The perturbation of one block's side path as it is after another block, with all other side paths off.

    Args:
        source: The block whose side path writes.
        block: The block after which the streams are compared.
        difference_norm: The mean |difference| of the streams with and without it.
        relative_norm: `difference_norm` divided by the mean |h|.
        amplification: `difference_norm` divided by the mean |delta| that was written.
        cosine: The mean cosine of the difference and what was written at the same token.
    """

    source: int
    block: int
    difference_norm: float
    relative_norm: float
    amplification: float | None
    cosine: float | None


@dataclass(frozen=True)
class SidePathReads:
    """What one side path did to each token of a batch.

    Args:
        block: The block's index.
        adapter_name: The adapter's name.
        measures: One number per token.
        valid: [batch, tokens], bool; False marks padding.
    """

    block: int
    adapter_name: str
    measures: TokenMeasures
    valid: torch.Tensor

    @property
    def slot_usage(self) -> torch.Tensor:
        """The mean share of each slot in what real tokens read, [slots]."""
        return self.measures.slot_shares[self.valid].mean(0)

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per real token: row, token, block, adapter, norms, gate, entropy, `slot_0`, `slot_1`, ..."""
        measures, entropy = self.measures, self.measures.read_entropy
        return [
            {
                "row": row,
                "token": token,
                "block": self.block,
                "adapter": self.adapter_name,
                "relative_norm": float(measures.relative_norm[row, token]),
                "gate": None if measures.gates is None else float(measures.gates[row, token]),
                "read_entropy": float(entropy[row, token]),
                **{f"slot_{slot}": share for slot, share in enumerate(measures.slot_shares[row, token].tolist())},
            }
            for row, token in self.valid.nonzero().tolist()
        ]


def to_rows(
    measures: Sequence[BlockMeasures] | Sequence[Propagation] | Sequence[SidePathReads],
) -> list[dict[str, Any]]:
    """Turn measurements into a table: `pandas.DataFrame(to_rows(...))` takes it, as does `csv.DictWriter`.

    Args:
        measures: What a function of this module returned.

    Returns:
        One dictionary per row.

    Examples:
        >>> table = pandas.DataFrame(to_rows(measure_blocks(model, inputs)))
    """
    rows: list[dict[str, Any]] = []
    for measure in measures:
        rows.extend(measure.rows() if isinstance(measure, SidePathReads) else [asdict(measure)])
    return rows


def _batches(inputs: Inputs | Sequence[Inputs]) -> list[Inputs]:
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not batches:
        raise ValueError("inputs=[]: give at least one batch")
    return batches


def measure_blocks(model: nn.Module, inputs: Inputs | Sequence[Inputs]) -> list[BlockMeasures]:
    """Compare what the LoRA weights and the side path do to the residual stream, block by block.

    Three forward passes per batch: with both, with the LoRA weights alone, and the base model. The model is not
    changed.

    Args:
        model: A model whose active adapters have a side path.
        inputs: What the model takes, such as `input_ids` and `attention_mask` [batch, tokens], or a list of such
            batches. Labels are left out.

    Returns:
        One item per block, in order.

    Raises:
        ValueError: The model has no side path, is disabled or merged, or there is no batch.

    Examples:
        >>> blocks = measure_blocks(model, tokenizer("Why is the sky blue?", return_tensors="pt"))
        >>> blocks[9].ratio  # how many times larger the low-rank update is than the side path's
    """
    at_input = {
        layer.block_index for _, layer in attached_side_paths(model) if "input" in layer.talan_position.values()
    }
    means = [TokenMeans() for _ in steered_blocks(model)]
    with evaluated(model):
        for batch in _batches(inputs):
            both = record_streams(model, batch)
            with talan_strength(model, 0):
                low_rank = record_streams(model, batch)
            with without_adapters(model):
                base = record_streams(model, batch)
            for block, mean in enumerate(means):
                update = low_rank.after[block] - base.after[block]
                change = both.after[block] - low_rank.after[block]
                mean.add_norms(hidden=both.after[block], low_rank=update, side_path=change)
                mean.add_cosine("cosine", update, change)
                if block in both.written:
                    if block in at_input:
                        update = low_rank.before[block] - base.before[block]
                    mean.add_norms(low_rank_there=update, written=both.written[block])
                    mean.add_cosine("written_cosine", update, both.written[block])
    return [
        BlockMeasures(
            block=block,
            hidden_norm=mean.of("hidden"),
            low_rank_norm=mean.of("low_rank"),
            side_path_norm=mean.of("side_path"),
            ratio=mean.ratio("low_rank", "side_path"),
            cosine=mean.get("cosine"),
            written_norm=mean.get("written"),
            written_ratio=mean.ratio("low_rank_there", "written"),
            written_cosine=mean.get("written_cosine"),
        )
        for block, mean in enumerate(means)
    ]


def measure_propagation(model: nn.Module, inputs: Inputs | Sequence[Inputs]) -> list[Propagation]:
    """Follow the perturbation of each side path through the later blocks: it alone on, against all side paths off.

    The model is not changed.

    Args:
        model: A model whose active adapters have a side path.
        inputs: As in `measure_blocks`.

    Returns:
        One item for each side path and each block from its own to the last.

    Raises:
        ValueError: As in `measure_blocks`.

    Examples:
        >>> for step in measure_propagation(model, tokenizer("Why is the sky blue?", return_tensors="pt")):
        ...     print(step.source, step.block, step.amplification)
    """
    sources = [layer.block_index for _, layer in attached_side_paths(model)]
    depth = len(steered_blocks(model))
    means = {(source, block): TokenMeans() for source in sources for block in range(source, depth)}
    with evaluated(model):
        for batch in _batches(inputs):
            with talan_strength(model, 0):
                off = record_streams(model, batch)
            for source in sources:
                others = [block for block in sources if block != source]
                with talan_strength(model, 0, layers=others) if others else ExitStack():
                    on = record_streams(model, batch)
                delta = on.written[source]
                for block in range(source, depth):
                    change = on.after[block] - off.after[block]
                    means[source, block].add_norms(change=change, hidden=on.after[block], written=delta)
                    means[source, block].add_cosine("cosine", change, delta)
    return [
        Propagation(
            source=source,
            block=block,
            difference_norm=mean.of("change"),
            relative_norm=mean.ratio("change", "hidden") or 0.0,
            amplification=mean.ratio("change", "written"),
            cosine=mean.get("cosine"),
        )
        for (source, block), mean in means.items()
    ]


def measure_reads(model: nn.Module, inputs: Inputs) -> list[SidePathReads]:
    """Measure, token by token, what each side path writes, through which gate, and from which slots it reads.

    It uses the readable equations: O(tokens slots width) memory. The model is not changed.

    Args:
        model: A model whose active adapters have a side path.
        inputs: What the model takes, as one batch.

    Returns:
        One item for each block and active adapter.

    Raises:
        ValueError: As in `measure_blocks`.

    Examples:
        >>> reads = measure_reads(model, tokenizer("Why is the sky blue?", return_tensors="pt"))
        >>> reads[0].slot_usage
    """
    reads: list[SidePathReads] = []

    def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(layer, TalanLayer):
            for name, measures, valid in measure_layer(token_measures, layer, args):
                reads.append(SidePathReads(layer.block_index, name, measures, valid))

    steered_blocks(model)  # Refuses a model without a side path.
    with evaluated(model), torch.no_grad(), ExitStack() as hooks:
        for _, layer in attached_side_paths(model):
            hooks.callback(layer.register_forward_pre_hook(look).remove)
        run(model, inputs)
    return sorted(reads, key=lambda item: (item.block, item.adapter_name))
