"""Side paths under transformers' continuous batching: a block gets many requests' tokens and a paged cache."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers.generation.continuous_batching import PagedAttentionCache

from ..functional.ragged import request_of
from .pages import PagedMemory, PagePools, Pages


class PagedCall:
    """What all blocks of a forward pass are called with under continuous batching.

    Args:
        cache: The paged cache.
        arguments: The keyword arguments of a block: `cu_seq_lens_q`, [requests + 1], where each request starts, and
            `cu_seq_lens_k`, the same for the keys by attention type; `max_length_q`, the tokens of the longest
            request, or more; `position_ids`, [1, tokens]; by attention type `write_index`, where each token's keys
            go, [tokens], and `read_index`, where each request's keys are, [keys] or empty. Where flash attention
            finds the keys itself, `block_table`, [attention types, requests, blocks].
    """

    def __init__(self, cache: Any, arguments: Mapping[str, Any]) -> None:
        self.cache, self.arguments = cache, arguments
        self.cu_seqlens: torch.Tensor = arguments["cu_seq_lens_q"]
        self._pages: dict[int, Pages] = {}

    def memory(self, block_index: int, name: str) -> PagedMemory:
        """The memory of a side path at a block for all requests of this call."""
        return PagedMemory(page_pools(self.cache), self.pages(block_index), block_index, name)

    def pages(self, block_index: int) -> Pages:
        """The pages of a block, computed once for all blocks of an attention type."""
        allocator = self.cache.layer_to_allocator[block_index]
        if allocator.index not in self._pages:
            self._pages[allocator.index] = self._find_pages(allocator)
        return self._pages[allocator.index]

    def _find_pages(self, allocator: Any) -> Pages:
        unused = allocator.write_trash_index // allocator.block_physical_stride
        positions = self.arguments["position_ids"][0]
        past = positions.index_select(0, self.cu_seqlens[:-1].clamp(max=positions.shape[0] - 1))
        if self.arguments.get("block_table") is None:
            page_of_token = self.arguments["write_index"][allocator.index] // allocator.block_physical_stride
            previous = self._previous_by_index(allocator)
        else:
            previous, page_of_token = self._pages_of_table(allocator, positions, past, unused)
        return Pages.of_call(
            allocator.num_blocks + 2 * allocator.blocks_per_sector,  # two sectors belong to no request
            page_of_token,
            self.cu_seqlens,
            self.arguments["max_length_q"],
            previous,
            past == 0,
            page_size=allocator.tokens_per_page if self.cache.use_prefix_sharing else None,
            unused_page=unused,
        )

    def _previous_by_index(self, allocator: Any) -> torch.Tensor:
        """The page of each request's previous token: it is the last one that is read and not written."""
        ends = self.arguments["cu_seq_lens_k"][allocator.layer_type][1:]
        read_index = self.arguments["read_index"][allocator.index]
        if read_index.shape[0] == 0:
            return torch.zeros_like(ends, dtype=torch.int64)
        place = (ends - (self.cu_seqlens.diff() + 1)).clamp(0, read_index.shape[0] - 1)
        return read_index.index_select(0, place) // allocator.block_physical_stride

    def _pages_of_table(
        self, allocator: Any, positions: torch.Tensor, past: torch.Tensor, unused: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The page of each request's previous token, and of each token; a table has -1 where there is no page."""
        # A block of the cache lies in one page for each layer, and the table counts these.
        pages_per_block = allocator.block_physical_stride // allocator.tokens_per_page
        table = self.arguments["block_table"][allocator.index].long() // pages_per_block
        table = torch.where(table < 0, unused, table)
        token = torch.arange(positions.shape[0], device=positions.device)
        request = request_of(token, self.cu_seqlens[1:])
        previous = table.gather(1, (past - 1).clamp(min=0).long().unsqueeze(1) // allocator.tokens_per_page).squeeze(1)
        return previous, table[request, positions.long() // allocator.tokens_per_page]


def find_paged_call(kwargs: Mapping[str, Any]) -> PagedCall | None:
    """Gather the arguments of a block that is called under continuous batching."""
    cache = next((value for value in kwargs.values() if isinstance(value, PagedAttentionCache)), None)
    if cache is None:
        return None
    if "position_ids" not in kwargs or not hasattr(cache, "layer_to_allocator"):
        raise NotImplementedError(
            "continuous batching of this version of transformers gives a side path other arguments than those of 5.23 "
            "and 5.24; install one of them, or use model.generate"
        )
    return PagedCall(cache, kwargs)


class _CacheCopy:
    """Stands for `perform_cache_copy` of a paged cache: states are copied with the keys of their pages."""

    def __init__(self, cache: Any) -> None:
        self.pools = PagePools()
        # Not a bound method: the cache would hold what holds it, and outlive its last user.
        self._copy_keys = partial(type(cache).perform_cache_copy, weakref.proxy(cache))
        self._block_indices = {name: allocator.layer_indices for name, allocator in cache.cache_allocators.items()}

    def __call__(self, copy_src_and_dst: dict[str, tuple[list[int], list[int]]]) -> None:
        self._copy_keys(copy_src_and_dst)
        for name, (source, target) in copy_src_and_dst.items():
            if source:
                self.pools.copy_pages(self._block_indices[name], source, target)


def page_pools(cache: Any) -> PagePools:
    """The states of a paged cache's pages, which follow copies of the pages and live as long as the cache."""
    copy: _CacheCopy = vars(cache).get("perform_cache_copy") or _follow_copies(cache)
    return copy.pools


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _follow_copies(cache: Any) -> _CacheCopy:
    cache.perform_cache_copy = _CacheCopy(cache)
    return cache.perform_cache_copy
