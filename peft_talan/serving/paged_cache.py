"""Side paths under transformers' continuous batching: a block gets many requests' tokens and a paged cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers.generation.continuous_batching import PagedAttentionCache

from ..functional.parameters import SidePathOptions, SidePathParameters
from ..functional.ragged import ragged_side_path, request_of
from .pages import PagedMemory, of_tokens, page_ends, read_states, request_ends, write_states


class SidePath(NamedTuple):
    """One adapter's side path as it runs now.

    Args:
        adapter_name: The adapter's name.
        parameters: Its tensors at this block.
        options: Its axes.
        alpha: The strength of the perturbation.
    """

    adapter_name: str
    parameters: SidePathParameters
    options: SidePathOptions
    alpha: float


class Pages(NamedTuple):
    """The pages that one call reads and writes, for all blocks of one attention type.

    Args:
        number: The number of pages, including those that belong to no request.
        starts: Where each request starts, and where the last one ends, [requests + 1], int; None: each token is one.
        before: The page of each request's previous token, [requests], int64.
        is_new: Whether the request begins with this call, [requests], bool.
        snapshot_positions: The tokens after which a state is stored, [snapshots], int64; None: each request's last.
        after: Their pages, [snapshots or requests], int64.
    """

    number: int
    starts: torch.Tensor | None
    before: torch.Tensor
    is_new: torch.Tensor
    snapshot_positions: torch.Tensor | None
    after: torch.Tensor


@dataclass
class PagedCall:
    """What all blocks of a forward pass are called with under continuous batching.

    There are more requests than have tokens.

    Args:
        cache: The paged cache.
        query_start_loc: [requests + 1], int: where each request starts, and where the last one ends.
        key_start_loc: The same for the keys, by attention type.
        max_query_length: The number of tokens of the longest request, or more.
        position_ids: [1, tokens], int.
        write_index: Where each token's keys go, [tokens] for each attention type, int64.
        read_index: Where each request's keys are, [keys] for each attention type, int64; none: all are new.
        block_table: [attention types, requests, blocks], int, where flash attention finds the keys itself; else None.
        known_pages: The pages that were worked out for an earlier block, by attention type.
    """

    cache: Any
    query_start_loc: torch.Tensor
    key_start_loc: Mapping[str, torch.Tensor]
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
            The pages, worked out once for all blocks of an attention type.
        """
        allocator = self.cache.layer_to_allocator[block_index]
        if allocator.index not in self.known_pages:
            self.known_pages[allocator.index] = self._find_pages(allocator)
        return self.known_pages[allocator.index]

    def _find_pages(self, allocator: Any) -> Pages:
        unused = allocator.write_trash_index // allocator.block_physical_stride
        number = allocator.num_blocks + 2 * allocator.blocks_per_sector  # two sectors belong to no request
        positions = self.position_ids[0]
        tokens = positions.shape[0]
        if self.block_table is None:
            of_token = self.write_index[allocator.index] // allocator.block_physical_stride
            if self.max_query_length == 1:  # Of decoding, nothing is padded here.
                before = self._pages_read(allocator, 1)[:tokens]
                return Pages(number, None, before, positions == 0, None, of_token)
            before = self._pages_read(allocator, self.query_start_loc.diff())
        past = positions.index_select(0, self.query_start_loc[:-1].clamp(max=tokens - 1))
        if self.block_table is not None:
            before, of_token = self._pages_of_table(allocator, positions, past, unused)
        if self.max_query_length == 1:
            after = request_ends(of_token, self.query_start_loc, unused)
            before, after = of_tokens(before, tokens, unused), of_tokens(after, tokens, unused)
            return Pages(number, None, before, positions == 0, None, after)
        if self.cache.use_prefix_sharing:
            snapshot_positions, after = page_ends(of_token, self.query_start_loc, allocator.tokens_per_page, unused)
        else:
            snapshot_positions, after = None, request_ends(of_token, self.query_start_loc, unused)
        return Pages(number, self.query_start_loc, before, past == 0, snapshot_positions, after)

    def _pages_read(self, allocator: Any, queries: torch.Tensor | int) -> torch.Tensor:
        """The page of each request's previous token: it is the last one that is read and not written."""
        ends, read_index = self.key_start_loc[allocator.layer_type][1:], self.read_index[allocator.index]
        if read_index.shape[0] == 0:
            return torch.zeros_like(ends, dtype=torch.int64)
        place = (ends - (queries + 1)).clamp(0, read_index.shape[0] - 1)
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
        request = request_of(token, self.query_start_loc[1:])
        before = table.gather(1, (past - 1).clamp(min=0).long().unsqueeze(1) // allocator.tokens_per_page).squeeze(1)
        return before, table[request, positions.long() // allocator.tokens_per_page]


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


def paged_memory(cache: Any) -> PagedMemory:
    """Find the latent memory of a paged cache, or give it one, which then follows copies of its pages.

    Args:
        cache: The cache.

    Returns:
        Its memory, which lives as long as the cache.
    """
    memory: PagedMemory | None = vars(cache).get("talan_memory")
    return _give_memory(cache) if memory is None else memory


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _give_memory(cache: Any) -> PagedMemory:
    memory = cache.talan_memory = PagedMemory()
    for allocator in cache.cache_allocators.values():
        # Not a method of the allocator: it would hold what holds it, and the cache would outlive its last user.
        copy_keys = partial(type(allocator).copy_blocks, weakref.proxy(allocator))
        allocator.copy_blocks = partial(_copy_pages, copy_keys, memory, allocator.layer_indices)
    return memory


def _copy_pages(
    copy_keys: Callable[[list[int], list[int]], None],
    memory: PagedMemory,
    block_indices: list[int],
    source_block_ids: list[int],
    dest_block_ids: list[int],
) -> None:
    copy_keys(source_block_ids, dest_block_ids)
    memory.copy_pages(block_indices, source_block_ids, dest_block_ids)


def run_paged(
    hidden_states: torch.Tensor, side_paths: list[SidePath], block_index: int, call: PagedCall
) -> torch.Tensor:
    """Run the side paths of a block on the flat tokens of many requests; those of several adapters add up.

    Args:
        hidden_states: h, [1, tokens, hidden_size].
        side_paths: The side paths.
        block_index: The block's index.
        call: What the block was called with.

    Returns:
        h', [1, tokens, hidden_size].

    Raises:
        ValueError: A memory is bidirectional.
    """
    if not side_paths:
        return hidden_states
    written, memory, pages = hidden_states, paged_memory(call.cache), call.pages(block_index)
    for adapter_name, parameters, options, alpha in side_paths:
        if options.scope != "causal":
            raise ValueError(
                f"talan_memory_scope={options.scope!r} of adapter {adapter_name!r} can't generate; use 'causal'"
            )
        width = parameters.write.shape[1]
        shape = (pages.number, parameters.read.shape[0] - 2 * width, width + 1)
        with torch.no_grad():
            pool = memory.pool(block_index, adapter_name, shape, hidden_states)
            output = ragged_side_path(
                hidden_states[0],
                parameters,
                options,
                cu_seqlens=pages.starts,
                state=read_states(pool, pages.before, pages.is_new),
                max_query_length=call.max_query_length,
                snapshot_positions=pages.snapshot_positions,
                alpha=alpha,
            )
            write_states(pool, pages.after, output.states)
        changed = output.hidden_states.unsqueeze(0)
        written = changed if written is hidden_states else written + (changed - hidden_states)
    return written
