"""The latent memory of servers that keep a cache in pages: one memory a page, that after the last token written there.

A request goes on from the memory of the page that holds its previous token. Full pages are shared only between
requests whose tokens are equal up to the page's end, and a page that is copied takes its memory along, so the memories
follow prefix caching, forks and preemption without knowing of requests. Everything here has a size that the shapes
give, and asks the device nothing.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..functional.parameters import working_dtype
from ..functional.ragged import request_of


def page_ends(
    page_of_token: torch.Tensor, query_start_loc: torch.Tensor, page_size: int, unused_page: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the tokens after which a state is stored: the last one of each page and of each request.

    Args:
        page_of_token: The page that each token is written to, [tokens], int64.
        query_start_loc: Where each request starts and the last one ends, [requests + 1], int, not falling.
        page_size: Tokens a page.
        unused_page: A page that belongs to no request.

    Returns:
        The tokens and their pages, [snapshots], int64, as `ragged_side_path` and `write_states` take them; there are
        more places than needed, and what is left over is -1 and the unused page.
    """
    tokens, requests = page_of_token.shape[0], query_start_loc.shape[0] - 1
    snapshots = min(tokens, tokens // page_size + 2 * requests)
    index = torch.arange(tokens, device=page_of_token.device)
    ends = query_start_loc[1:].long()
    request = request_of(index, ends)
    # A neighbour in the flat batch is another request's, or lies in another page, where this token ends something.
    last = torch.ones_like(index, dtype=torch.bool)
    last[:-1] = (request[1:] != request[:-1]) | (page_of_token[1:] != page_of_token[:-1])
    last = (last | (index + 1 == ends[-1])) & (index < ends[-1])
    place = torch.where(last, last.cumsum(0) - 1, snapshots)
    snapshot_positions = index.new_full((snapshots + 1,), -1).index_copy_(0, place, index)[:-1]
    pages = page_of_token.index_select(0, snapshot_positions.clamp(min=0))
    return snapshot_positions, torch.where(snapshot_positions < 0, unused_page, pages)


def request_ends(page_of_token: torch.Tensor, query_start_loc: torch.Tensor, unused_page: int) -> torch.Tensor:
    """Find the page of each request's last token: where nothing but a request itself goes on, that is enough.

    Args:
        page_of_token: [tokens], int64.
        query_start_loc: [requests + 1], int.
        unused_page: A page that belongs to no request.

    Returns:
        [requests], int64; the unused page for requests without tokens.
    """
    starts, ends = query_start_loc[:-1], query_start_loc[1:]
    pages = page_of_token.index_select(0, (ends - 1).clamp(min=0).long())
    return torch.where(ends > starts, pages, unused_page)


def of_tokens(of_requests: torch.Tensor, tokens: int, padding: int) -> torch.Tensor:
    """Where every request with tokens has one, turn a number of each request into one of each token.

    Args:
        of_requests: [requests], int; requests without tokens come last.
        tokens: The number of tokens, those of padding, which come last, included.
        padding: The number for them.

    Returns:
        [tokens], int.
    """
    missing = tokens - of_requests.shape[0]
    return F.pad(of_requests, (0, missing), value=padding) if missing > 0 else of_requests[:tokens]


def read_states(pool: torch.Tensor, page_before: torch.Tensor, is_new: torch.Tensor) -> torch.Tensor:
    """Read the memory that each request goes on from.

    Args:
        pool: [pages, slots, width + 1].
        page_before: The page of each request's previous token, [requests], int64; any page for a new request.
        is_new: Whether the request begins with this call, [requests], bool.

    Returns:
        [requests, slots, width + 1]; empty memories for new requests.
    """
    return pool.index_select(0, page_before).masked_fill_(is_new[:, None, None], 0.0)


def write_states(pool: torch.Tensor, pages: torch.Tensor, states: torch.Tensor) -> None:
    """Leave memories in their pages.

    Args:
        pool: [pages, slots, width + 1]; it is changed in place.
        pages: [snapshots], int64, each page once but for one that nobody reads.
        states: [snapshots, slots, width + 1].
    """
    pool.index_copy_(0, pages, states)


class PagedMemory:
    """The pools of one cache: one for each side path and adapter, made when it is first used."""

    def __init__(self) -> None:
        self.pools: dict[tuple[int, str], torch.Tensor] = {}

    def pool(
        self, block_index: int, adapter_name: str, shape: tuple[int, int, int], hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Find the pool of an adapter's side path at a block, or make it.

        Args:
            block_index: The block's index.
            adapter_name: The adapter's name.
            shape: (pages, slots, width + 1).
            hidden_states: Of the block; a new pool lies on their device, in the dtype that memories of theirs take.

        Returns:
            The pool, of the given shape.
        """
        pool = self.pools.get((block_index, adapter_name))
        if pool is None or pool.shape != shape:
            pool = self.pools[block_index, adapter_name] = hidden_states.new_zeros(
                shape, dtype=working_dtype(hidden_states.dtype)
            )
        return pool

    def copy_pages(self, block_indices: list[int], source: list[int], target: list[int]) -> None:
        """Follow the copy of some pages.

        Args:
            block_indices: The blocks whose keys were copied.
            source: The pages that were copied.
            target: Where to.
        """
        for (block_index, _), pool in self.pools.items():
            if block_index in block_indices:
                rows = torch.tensor([source, target], device=pool.device)
                pool.index_copy_(0, rows[1], pool.index_select(0, rows[0]))
