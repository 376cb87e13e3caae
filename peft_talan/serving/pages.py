"""Side paths of servers that keep a cache in pages: one state per page, that after the last token written there.

A request continues from the state of the page that holds its previous token. Full pages are shared only between
requests whose tokens are equal up to the page's end, and a page that is copied takes its state along, so the states
follow prefix caching, forks and preemption without knowing of requests. Everything here has a size that the shapes
determine, and asks the device nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ..axes import check_causal
from ..functional.parameters import SidePathOptions, SidePathParameters, working_dtype
from ..functional.ragged import ragged_adapters, ragged_side_path, request_of
from ..functional.stacked import StackedParameters
from ..memory.token_layout import TokenLayout


class Pages(NamedTuple):
    """The pages that one forward pass reads and writes, for all blocks whose attention has the same pages.

    Args:
        num_pages: The number of pages, those that belong to no request included.
        cu_seqlens: Where each request starts and the last one ends, [requests + 1], int; None: a request per token.
        max_query_length: The number of tokens of the longest request, or more.
        previous: The page of each request's previous token, [requests], int64; any page for a new request.
        is_new: Whether the request begins with this call, [requests], bool.
        snapshot_positions: The tokens after which a state is stored, [snapshots], int64; None: each request's last.
        written: The page of each stored state, [snapshots or requests], int64.
    """

    num_pages: int
    cu_seqlens: torch.Tensor | None
    max_query_length: int
    previous: torch.Tensor
    is_new: torch.Tensor
    snapshot_positions: torch.Tensor | None
    written: torch.Tensor

    @classmethod
    def of_call(
        cls,
        num_pages: int,
        page_of_token: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_query_length: int,
        previous: torch.Tensor,
        is_new: torch.Tensor,
        *,
        page_size: int | None,
        unused_page: int,
    ) -> Pages:
        """Choose the tokens after which a state is stored: the last one of each page and of each request.

        Args:
            num_pages: This and the other arguments are as above.
            page_of_token: The page that each token is written to, [tokens], int64.
            cu_seqlens: Not falling; tokens from its last number on are padding.
            max_query_length: If it is 1, requests without tokens come last.
            previous: As above.
            is_new: As above.
            page_size: Tokens per page. None: no page is shared, so only the state after a request's end is read.
            unused_page: A page that belongs to no request.

        Returns:
            The pages.
        """
        if max_query_length != 1:
            if page_size is None:
                positions, written = None, _request_ends(page_of_token, cu_seqlens, unused_page)
            else:
                positions, written = _page_ends(page_of_token, cu_seqlens, page_size, unused_page)
            return cls(num_pages, cu_seqlens, max_query_length, previous, is_new, positions, written)
        tokens = page_of_token.shape[0]
        per_request = (previous, is_new, _request_ends(page_of_token, cu_seqlens, unused_page))
        previous, is_new, written = (_per_token(tensor, tokens, unused_page) for tensor in per_request)
        return cls(num_pages, None, 1, previous, is_new, None, written)


def _page_ends(
    page_of_token: torch.Tensor, cu_seqlens: torch.Tensor, page_size: int, unused_page: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last token of each page and of each request, and their pages; what is left over: -1 and the unused page."""
    tokens, requests = page_of_token.shape[0], cu_seqlens.shape[0] - 1
    snapshots = min(tokens, tokens // page_size + 2 * requests)
    index = torch.arange(tokens, device=page_of_token.device)
    ends = cu_seqlens[1:].long()
    request = request_of(index, ends)
    # A neighbour in the flat batch is another request's, or lies in another page, where this token ends something.
    last = torch.ones_like(index, dtype=torch.bool)
    last[:-1] = (request[1:] != request[:-1]) | (page_of_token[1:] != page_of_token[:-1])
    last = (last | (index + 1 == ends[-1])) & (index < ends[-1])
    place = torch.where(last, last.cumsum(0) - 1, snapshots)
    snapshot_positions = index.new_full((snapshots + 1,), -1).index_copy_(0, place, index)[:-1]
    pages = page_of_token.index_select(0, snapshot_positions.clamp(min=0))
    return snapshot_positions, torch.where(snapshot_positions < 0, unused_page, pages)


def _request_ends(page_of_token: torch.Tensor, cu_seqlens: torch.Tensor, unused_page: int) -> torch.Tensor:
    """The page of each request's last token; the unused page for requests without tokens."""
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    pages = page_of_token.index_select(0, (ends - 1).clamp(min=0).long())
    return torch.where(ends > starts, pages, unused_page)


def _per_token(per_request: torch.Tensor, tokens: int, padding: int) -> torch.Tensor:
    """Numbers per request become numbers per token, where requests have one each and those without come last."""
    missing = tokens - per_request.shape[0]
    return F.pad(per_request, (0, missing), value=padding) if missing > 0 else per_request[:tokens]


class PagePools:
    """The states of one cache's pages: a pool for each side path, created when it is first used."""

    def __init__(self) -> None:
        self.pools: dict[tuple[int, str], torch.Tensor] = {}

    def pool(self, block_index: int, name: str, shape: tuple[int, ...], hidden_states: torch.Tensor) -> torch.Tensor:
        """Find the pool of a side path, or create it."""
        pool = self.pools.get((block_index, name))
        if pool is None or pool.shape != shape:
            pool = hidden_states.new_zeros(shape, dtype=working_dtype(hidden_states.dtype))
            self.pools[block_index, name] = pool
        return pool

    def copy_pages(self, block_indices: list[int], source: list[int], target: list[int]) -> None:
        """Copy the states of some pages at the blocks whose keys were copied."""
        for (block_index, _), pool in self.pools.items():
            if block_index in block_indices:
                rows = torch.tensor([source, target], device=pool.device)
                pool.index_copy_(0, rows[1], pool.index_select(0, rows[0]))


class PagedMemory:
    """The memory of one side path for all requests of a call; see `peft_talan.memory.interface.Memory`.

    Args:
        pools: The states of the cache's pages.
        pages: The pages that this call reads and writes.
        block_index: The block's index.
        name: The side path's name, which no other one of the block has.
        strength: What scales each token's perturbation, [tokens], float; None: nothing does.
    """

    def __init__(
        self, pools: PagePools, pages: Pages, block_index: int, name: str, strength: torch.Tensor | None = None
    ) -> None:
        self.pools, self.pages, self.block_index, self.name, self.strength = pools, pages, block_index, name, strength

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
        """Run the side path on the flat tokens of many requests, [(1,) tokens, hidden_size]; it needs no layout."""
        check_causal(options.scope)
        pool = self._pool(parameters, options.mixer, hidden_states)
        output = ragged_side_path(
            hidden_states.view(-1, hidden_states.shape[-1]),
            parameters,
            options,
            alpha=alpha if self.strength is None else alpha * self.strength,
            **self._requests(pool),
        )
        # Each page is written once, but for one that nobody reads.
        pool.index_copy_(0, self.pages.written, output.states)
        return output.hidden_states.view_as(hidden_states)

    @torch.no_grad()
    def append_adapters(
        self,
        hidden_states: torch.Tensor,
        parameters: StackedParameters,
        options: SidePathOptions,
        adapters: torch.Tensor,
    ) -> torch.Tensor:
        """Run the side path of each request's adapter on the flat tokens of many requests.

        Args:
            hidden_states: h, [tokens, hidden_size].
            parameters: The adapters' tensors.
            options: The axes that they share.
            adapters: Each token's adapter, [tokens], int64; -1: none.

        Returns:
            h', [tokens, hidden_size].
        """
        pool = self._pool(parameters, options.mixer, hidden_states)
        output = ragged_adapters(
            hidden_states, parameters, options, adapters=adapters, alpha=self.strength, **self._requests(pool)
        )
        pool.index_copy_(0, self.pages.written, output.states)
        return output.hidden_states

    def _pool(
        self, parameters: SidePathParameters | StackedParameters, mixer: str, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        shape = (self.pages.num_pages, *parameters.state_shape(mixer))
        return self.pools.pool(self.block_index, self.name, shape, hidden_states)

    def _requests(self, pool: torch.Tensor) -> dict[str, Any]:
        """What the operators need to know of this call's requests."""
        pages = self.pages
        return {
            "cu_seqlens": pages.cu_seqlens,
            "state": pool.index_select(0, pages.previous).masked_fill_(pages.is_new[:, None, None], 0.0),
            "max_query_length": pages.max_query_length,
            "snapshot_positions": pages.snapshot_positions,
        }
