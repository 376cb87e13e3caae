"""Side paths under transformers' continuous batching: a block gets many requests' tokens and a paged cache."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers.generation.continuous_batching import PagedAttentionCache

from ..functional.parameters import SidePathOptions, SidePathParameters
from ..functional.ragged import request_of
from ..memory.token_layout import TokenLayout
from .pages import PagedMemory, Pages, run_on_pages


@dataclass
class PagedCall:
    """What all blocks of a forward pass are called with under continuous batching.

    Args:
        cache: The paged cache.
        cu_seqlens: [requests + 1], int: where each request starts, and where the last one ends. There may be more
            requests than have tokens.
        key_cu_seqlens: The same for the keys, by attention type.
        max_query_length: The number of tokens of the longest request, or more.
        position_ids: [1, tokens], int.
        write_index: Where each token's keys go, [tokens] for each attention type, int64.
        read_index: Where each request's keys are, [keys] for each attention type, int64; none: all are new.
        block_table: [attention types, requests, blocks], int, where flash attention finds the keys itself; else None.
        known_pages: The pages that were computed for an earlier block, by attention type.
    """

    cache: Any
    cu_seqlens: torch.Tensor
    key_cu_seqlens: Mapping[str, torch.Tensor]
    max_query_length: int
    position_ids: torch.Tensor
    write_index: list[torch.Tensor]
    read_index: list[torch.Tensor]
    block_table: torch.Tensor | None
    known_pages: dict[int, Pages] = field(default_factory=dict)

    def pages(self, block_index: int) -> Pages:
        """Find the pages of this call.

        Args:
            block_index: The block's index.

        Returns:
            The pages, computed once for all blocks of an attention type.
        """
        allocator = self.cache.layer_to_allocator[block_index]
        if allocator.index not in self.known_pages:
            self.known_pages[allocator.index] = self._find_pages(allocator)
        return self.known_pages[allocator.index]

    def memory(self, block_index: int, name: str) -> RequestsMemory:
        """The memory of a side path at a block for all requests of this call."""
        return RequestsMemory(self, block_index, name)

    def _find_pages(self, allocator: Any) -> Pages:
        unused = allocator.write_trash_index // allocator.block_physical_stride
        positions = self.position_ids[0]
        first = self.cu_seqlens[:-1].clamp(max=positions.shape[0] - 1)
        past = positions.index_select(0, first)
        if self.block_table is None:
            page_of_token = self.write_index[allocator.index] // allocator.block_physical_stride
            previous = self._previous_by_index(allocator)
        else:
            previous, page_of_token = self._pages_of_table(allocator, positions, past, unused)
        return Pages.of_call(
            allocator.num_blocks + 2 * allocator.blocks_per_sector,  # two sectors belong to no request
            page_of_token,
            self.cu_seqlens,
            self.max_query_length,
            previous,
            past == 0,
            page_size=allocator.tokens_per_page if self.cache.use_prefix_sharing else None,
            unused_page=unused,
        )

    def _previous_by_index(self, allocator: Any) -> torch.Tensor:
        """The page of each request's previous token: it is the last one that is read and not written."""
        ends, read_index = self.key_cu_seqlens[allocator.layer_type][1:], self.read_index[allocator.index]
        if read_index.shape[0] == 0:
            return torch.zeros_like(ends, dtype=torch.int64)
        place = (ends - (self.cu_seqlens.diff() + 1)).clamp(0, read_index.shape[0] - 1)
        return read_index.index_select(0, place) // allocator.block_physical_stride

    def _pages_of_table(
        self, allocator: Any, positions: torch.Tensor, past: torch.Tensor, unused: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The page of each request's previous token, and of each token; a table has -1 where there is no page."""
        # A block of the cache lies in one page for each layer, and the table counts these.
        table = self.block_table[allocator.index].long() // (  # type: ignore[index]
            allocator.block_physical_stride // allocator.tokens_per_page
        )
        table = torch.where(table < 0, unused, table)
        token = torch.arange(positions.shape[0], device=positions.device)
        request = request_of(token, self.cu_seqlens[1:])
        previous = table.gather(1, (past - 1).clamp(min=0).long().unsqueeze(1) // allocator.tokens_per_page).squeeze(1)
        return previous, table[request, positions.long() // allocator.tokens_per_page]


def find_paged_call(kwargs: Mapping[str, Any]) -> PagedCall | None:
    """Gather the arguments of a block that is called under continuous batching.

    Args:
        kwargs: The block's keyword arguments.

    Returns:
        The call, or None where the block was not given a paged cache.

    Raises:
        NotImplementedError: The arguments are not those of the versions that this was written for.
    """
    cache = next((value for value in kwargs.values() if isinstance(value, PagedAttentionCache)), None)
    if cache is None:
        return None
    if "position_ids" not in kwargs or not hasattr(cache, "layer_to_allocator"):
        raise NotImplementedError(
            "continuous batching of this version of transformers gives a side path other arguments than those of 5.23 "
            "and 5.24; install one of them, or use model.generate"
        )
    return PagedCall(
        cache,
        kwargs["cu_seq_lens_q"],
        kwargs["cu_seq_lens_k"],
        kwargs["max_length_q"],
        kwargs["position_ids"],
        kwargs["write_index"],
        kwargs["read_index"],
        kwargs.get("block_table"),
    )


class _CacheCopy:
    """Stands for `perform_cache_copy` of a paged cache: states are copied with the keys of their pages."""

    def __init__(self, cache: Any) -> None:
        self.memory = PagedMemory()
        # Not a bound method: the cache would hold what holds it, and outlive its last user.
        self._copy_keys = partial(type(cache).perform_cache_copy, weakref.proxy(cache))
        self._block_indices = {name: allocator.layer_indices for name, allocator in cache.cache_allocators.items()}

    def __call__(self, copy_src_and_dst: dict[str, tuple[list[int], list[int]]]) -> None:
        self._copy_keys(copy_src_and_dst)
        for name, (source, target) in copy_src_and_dst.items():
            if source:
                self.memory.copy_pages(self._block_indices[name], source, target)


def paged_memory(cache: Any) -> PagedMemory:
    """Find the latent memory of a paged cache, or create it, which then follows copies of its pages.

    Args:
        cache: The cache.

    Returns:
        Its memory, which lives as long as the cache.
    """
    copy: _CacheCopy = vars(cache).get("perform_cache_copy") or _follow_copies(cache)
    return copy.memory


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _follow_copies(cache: Any) -> _CacheCopy:
    cache.perform_cache_copy = _CacheCopy(cache)
    return cache.perform_cache_copy


class RequestsMemory:
    """The memory of one side path for all requests of a call; see `peft_talan.memory.interface.Memory`.

    Args:
        call: What the block was called with.
        block_index: The block's index.
        name: The side path's name, which no other one of the block has.
    """

    def __init__(self, call: PagedCall, block_index: int, name: str) -> None:
        self.call, self.block_index, self.name = call, block_index, name

    @torch.no_grad()
    def append(
        self,
        hidden_states: torch.Tensor,
        parameters: SidePathParameters,
        options: SidePathOptions,
        layout: TokenLayout,
        *,
        alpha: float = 1.0,
        training: bool = False,
    ) -> torch.Tensor:
        """Run a side path on the flat tokens of many requests, [1, tokens, hidden_size]; it needs no layout."""
        pages = self.call.pages(self.block_index)
        memory = paged_memory(self.call.cache)
        pool = memory.pool(self.block_index, self.name, pages.num_pages, parameters, hidden_states)
        return run_on_pages(hidden_states[0], parameters, options, pool, pages, alpha).unsqueeze(0)
