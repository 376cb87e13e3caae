"""The pages of a call, from the arguments that a block gets with each attention implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import PagedAttentionCache, RequestState

from peft_talan.serving.paged_cache import find_paged_call
from tests.small_models import make_model

PAGE = 4
PAST = [0, 1, 3, 4, 5, 11, 12]
"""Tokens that the cache holds of each request: none, some of a page, and both sides of a page's end."""


@pytest.fixture(name="cache")
def _cache() -> PagedAttentionCache:
    model = make_model("llama", dtype=torch.float32)
    config = ContinuousBatchingConfig(page_size=PAGE, num_blocks=64, max_batch_tokens=32)
    manager = model.init_continuous_batching(GenerationConfig(max_new_tokens=1, eos_token_id=-1), config)
    manager.warmup()
    cache = manager.batch_processor.cache
    for request, past in enumerate(PAST):
        assert cache.can_store_request_tokens(RequestState(str(request), [2] * (past + 1)), past + 1)
    return cache


def decoding(cache: PagedAttentionCache, padded: int) -> dict[str, Any]:
    """What a block gets where every request has one token and the keys are found by index."""
    read_index: list[list[int]] = [[]]
    write_index: list[list[int]] = [[]]
    for request, past in enumerate(PAST):
        cache.extend_read_and_write_indices(str(request), past, 1, read_index, write_index)
    (allocator,) = cache.cache_allocators.values()
    requests = len(PAST)
    key_lengths = torch.tensor([0, *[past + 1 for past in PAST], *[0] * padded])
    return {
        "cache": cache,
        "position_ids": torch.tensor([[*PAST, *[0] * padded]]),
        "cu_seq_lens_q": torch.tensor([*range(requests + 1), *[requests] * padded], dtype=torch.int32),
        "cu_seq_lens_k": {"full_attention": key_lengths.cumsum(0, dtype=torch.int32)},
        "max_length_q": 1,
        "write_index": [torch.tensor(write_index[0] + [allocator.write_trash_index] * padded)],
        "read_index": [torch.tensor(read_index[0])],
        "block_table": None,
    }


@pytest.mark.parametrize("padded", [0, 3])
def test_flash_attentions_block_table_names_the_same_pages(cache: PagedAttentionCache, padded: int) -> None:
    arguments = decoding(cache, padded)
    by_index = find_paged_call(arguments)
    table = torch.full((1, len(PAST) + padded, 8), -1, dtype=torch.int32)
    for request, past in enumerate(PAST):
        cache.fill_block_table(str(request), past, 1, table[:, request])
    by_table = find_paged_call({**arguments, "read_index": [torch.empty(0, dtype=torch.int64)], "block_table": table})
    assert by_index is not None
    assert by_table is not None
    for block in range(2):
        expected, found = by_index.pages(block), by_table.pages(block)
        assert torch.equal(found.written, expected.written)
        assert torch.equal(found.is_new, expected.is_new)
        begun = ~expected.is_new
        assert torch.equal(found.previous[begun], expected.previous[begun])
        assert found.written.unique().shape[0] == len(PAST) + (padded > 0)
        # Where the previous token lies in the same page, that is the one that is left.
        inside = [request for request, past in enumerate(PAST) if past % PAGE]
        assert torch.equal(found.previous[inside], found.written[inside])


def test_pages_are_worked_out_once_for_all_blocks(cache: PagedAttentionCache) -> None:
    call = find_paged_call(decoding(cache, 0))
    assert call is not None
    assert call.pages(0) is call.pages(1)


def test_both_names_of_the_cache_are_known(cache: PagedAttentionCache) -> None:
    arguments = decoding(cache, 0)
    arguments["past_key_values"] = arguments.pop("cache")
    assert find_paged_call(arguments) is not None
    assert find_paged_call({**arguments, "past_key_values": None}) is None


def test_arguments_of_another_version_are_refused(cache: PagedAttentionCache) -> None:
    arguments = decoding(cache, 0)
    del arguments["position_ids"]
    with pytest.raises(NotImplementedError, match=r"install one of them, or use model\.generate"):
        find_paged_call(arguments)
