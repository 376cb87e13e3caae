"""What `delta` side paths start from: keys by which an answer's place matches where the answer stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..config import TalanConfig
from ..functional.initialization import StartTensors, copying_rows, matching_rows, opening_row
from ..functional.parameters import DELTA_GATES
from .answers import Answers
from .attention_weights import AttentionCopy
from .layer import TalanLayer
from .measured_pass import TokenSums, attention_with_weights, kept_streams, normalized
from .sliding_window import without_window

ATTENTION_BATCHES = 16
"""How many batches are read without the window; all are read with it."""
CLOSED = -3.0
"""The logit of writing and of reading at the mean of all tokens."""
KEEPING = (-8.0, -10.0)
"""The logits of erasing and of forgetting: what was written stays."""
OF_ALL_TOKENS = 0.3
"""The weight of all tokens in the queries' covariance; there are far fewer answers than directions."""


@dataclass
class _Matches(TokenSums):
    """What is summed up for one side path, of x at its place; q predicts an answer's token, k is where it stands."""

    pairs: int = 0
    queries: Any = 0.0
    """q."""
    keys: Any = 0.0
    """k."""
    query_moment: Any = 0.0
    """q q^T."""
    key_moment: Any = 0.0
    """k k^T."""
    cross: Any = 0.0
    """q k^T."""
    looked: int = 0
    reading: Any = 0.0
    """[heads]: how much each head of the attention that follows looks from q at k, without the window."""


def start_keyed(
    base: PreTrainedModel,
    forward: Callable[..., Any],
    config: TalanConfig,
    attentions: Mapping[TalanLayer, AttentionCopy | None],
    adapter_name: str,
    batches: list[Answers],
    window: int,
    shrinkage: float,
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[TalanLayer, StartTensors]:
    """Read the batches, and make the tensors of side paths that an attention follows; none if no answer stands there.

    What attention looks at is read without the window, and x with it, as the side path will read it.
    """
    found = [(batch, copies) for batch in batches if (copies := batch.copies(window, tokenizer)).shape[1]]
    readers = {layer: attention for layer, attention in attentions.items() if attention is not None}
    sums = {layer: _Matches() for layer in readers}
    with torch.no_grad():
        with without_window(base), attention_with_weights(base):
            looking = logging.tqdm(found[:ATTENTION_BATCHES], "Reading without the window", disable=None, leave=False)
            for batch, (rows, at, places) in looking:
                output = forward(**batch.inputs, use_cache=False, logits_to_keep=1, output_attentions=True)
                for layer, reader in readers.items():
                    weights = output.attentions[reader.index][rows, :, at, places]
                    sums[layer].reading = sums[layer].reading + weights.to(torch.float32).sum(0)
                    sums[layer].looked += len(rows)
        with kept_streams(sums, adapter_name) as streams:
            for batch, copies in logging.tqdm(found, "Reading with the window", disable=None, leave=False):
                forward(**batch.inputs, use_cache=False, logits_to_keep=1)
                for layer, part in sums.items():
                    _add(part, normalized(streams[layer]), batch.valid, copies)
    return {layer: _make(config, part, readers[layer], shrinkage) for layer, part in sums.items() if part.pairs}


def _add(sums: _Matches, x: torch.Tensor, valid: torch.Tensor, copies: torch.Tensor) -> None:
    rows, at, places = copies
    q, k = x[rows, at], x[rows, places]
    sums.add(x[valid])
    sums.pairs += len(q)
    sums.queries, sums.keys = sums.queries + q.sum(0), sums.keys + k.sum(0)
    sums.query_moment, sums.key_moment = sums.query_moment + q.T @ q, sums.key_moment + k.T @ k
    sums.cross = sums.cross + q.T @ k


def _make(config: TalanConfig, sums: _Matches, attention: AttentionCopy, shrinkage: float) -> StartTensors:
    mean, moment = sums.means()
    queries, keys, query_moment, key_moment, cross = (
        part / sums.pairs for part in (sums.queries, sums.keys, sums.query_moment, sums.key_moment, sums.cross)
    )
    key_rows, query_rows = matching_rows(
        queries,
        keys,
        torch.lerp(query_moment - torch.outer(queries, queries), moment - torch.outer(mean, mean), OF_ALL_TOKENS),
        key_moment - torch.outer(keys, keys),
        cross - torch.outer(queries, keys),
        config.talan_slots,
        shrinkage,
    )
    left, right = attention.factors((sums.reading / sums.looked).to(mean))
    read, write = copying_rows(left.to(mean), right.to(mean), mean, key_moment, config.talan_dim, shrinkage)
    writing, asking = (opening_row(tokens, mean, moment, shrinkage) for tokens in (keys, queries))
    gates = torch.stack([writing, *mean.new_zeros(DELTA_GATES - 1, len(mean))])
    rows: dict[int, torch.Tensor] = {}
    # Where there are more slots than directions, the others stay whitened.
    for first, part in zip(
        accumulate((config.talan_dim, config.talan_slots, DELTA_GATES), initial=0),
        (read, query_rows, gates, key_rows),
        strict=True,
    ):
        rows.update(enumerate(part, first))
    return StartTensors(
        rows,
        write,
        moment,
        torch.tensor([CLOSED, *KEEPING]),
        torch.cat([asking, mean.new_tensor([CLOSED])]),
    )
