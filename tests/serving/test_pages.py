"""The arithmetic of pages: after which tokens a state is stored, and what is read from and left in a pool."""

from __future__ import annotations

from itertools import pairwise

import torch

from peft_talan.serving.pages import PagedMemory, of_tokens, page_ends, read_states, request_ends, write_states

UNUSED = 0


def expected_ends(pages: list[int], bounds: list[int]) -> dict[int, int]:
    """The last token of each page inside a request, one token after the other."""
    ends = {}
    for start, end in pairwise(bounds):
        for token in range(start, end):
            if token == end - 1 or pages[token + 1] != pages[token]:
                ends[token] = pages[token]
    return ends


def test_every_page_and_every_request_is_left_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        size = int(torch.randint(1, 7, (), generator=generator))
        lengths = torch.randint(0, 12, (5,), generator=generator).tolist()
        pages, page = [], 0
        for length in lengths:
            offset = int(torch.randint(0, size, (), generator=generator))
            pages += [page + 1 + (offset + token) // size for token in range(length)]
            page = max([page, *pages]) + 1
        bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        expected = expected_ends(pages, bounds)
        padding = 4
        page_of_token = torch.tensor([*pages, *[UNUSED] * padding])
        snapshot_positions, left = page_ends(page_of_token, torch.tensor(bounds, dtype=torch.int32), size, UNUSED)
        used = snapshot_positions >= 0
        assert dict(zip(snapshot_positions[used].tolist(), left[used].tolist(), strict=True)) == expected
        assert (left[~used] == UNUSED).all()
        ends = request_ends(page_of_token, torch.tensor(bounds), UNUSED).tolist()
        assert ends == [pages[end - 1] if end > start else UNUSED for start, end in pairwise(bounds)]


def test_numbers_of_requests_become_those_of_their_only_tokens() -> None:
    pages = torch.tensor([5, 6, 7])
    assert of_tokens(pages, 2, UNUSED).tolist() == [5, 6]  # the third request has no token
    assert of_tokens(pages, 5, UNUSED).tolist() == [5, 6, 7, UNUSED, UNUSED]
    assert of_tokens(pages > 5, 4, True).tolist() == [False, True, True, True]


def test_a_new_request_starts_empty_whatever_its_page_held() -> None:
    pool = torch.full((4, 2, 3), torch.nan)
    write_states(pool, torch.tensor([2]), torch.ones(1, 2, 3))
    states = read_states(pool, torch.tensor([2, 3]), torch.tensor([False, True]))
    assert torch.equal(states[0], torch.ones(2, 3))
    assert torch.equal(states[1], torch.zeros(2, 3))


def test_a_copy_of_pages_reaches_the_pools_of_the_copied_blocks_only() -> None:
    memory, like = PagedMemory(), torch.empty(0, dtype=torch.float64)
    pools = {block: memory.pool(block, "default", (3, 1, 2), like) for block in (1, 2)}
    for pool in pools.values():
        pool[0] = 1.0
    memory.copy_pages([2], [0], [1])
    assert pools[2][1].eq(1.0).all()
    assert pools[1][1].eq(0.0).all()
    assert memory.pool(1, "default", (3, 1, 2), like) is pools[1]
