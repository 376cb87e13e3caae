"""The arithmetic of pages: after which tokens a state is stored, and what is read from and stored in a pool."""

from __future__ import annotations

from itertools import pairwise

import torch

from peft_talan.functional import reference
from peft_talan.functional.parameters import SidePathOptions
from peft_talan.memory.token_layout import TokenLayout
from peft_talan.serving.pages import PagedMemory, PagePools, Pages

from ..functional.inputs import HIDDEN_SIZE, SLOTS, WIDTH, assert_equal_up_to_rounding, side_path_tensors

UNUSED = 0


def make_pages(
    page_of_token: torch.Tensor, bounds: list[int], longest: int, page_size: int | None, past: list[int] | None = None
) -> Pages:
    """Requests whose previous token lies in the page before that of their first one."""
    requests = len(bounds) - 1
    known = torch.tensor(past or [0] * requests)
    first = torch.tensor([start if end > start else 0 for start, end in pairwise(bounds)])
    previous = page_of_token[first] - 1
    return Pages.of_call(
        int(page_of_token.max()) + 1,
        page_of_token,
        torch.tensor(bounds, dtype=torch.int32),
        longest,
        previous,
        known == 0,
        page_size=page_size,
        unused_page=UNUSED,
    )


def expected_ends(pages: list[int], bounds: list[int]) -> dict[int, int]:
    """The last token of each page inside a request, one token after the other."""
    ends = {}
    for start, end in pairwise(bounds):
        for token in range(start, end):
            if token == end - 1 or pages[token + 1] != pages[token]:
                ends[token] = pages[token]
    return ends


def test_a_state_is_stored_once_for_every_page_and_every_request() -> None:
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
        shared = make_pages(page_of_token, bounds, max(2, *lengths), size)
        assert shared.snapshot_positions is not None
        used = shared.snapshot_positions >= 0
        assert dict(zip(shared.snapshot_positions[used].tolist(), shared.written[used].tolist(), strict=True)) == (
            expected
        )
        assert (shared.written[~used] == UNUSED).all()
        alone = make_pages(page_of_token, bounds, max(2, *lengths), None)
        assert alone.snapshot_positions is None
        assert alone.written.tolist() == [pages[end - 1] if end > start else UNUSED for start, end in pairwise(bounds)]


def test_numbers_of_requests_become_those_of_their_only_tokens() -> None:
    pages = make_pages(torch.tensor([5, 7]), [0, 1, 2, 2], 1, 4, past=[3, 0, 0])  # the third request has no token
    assert pages.cu_seqlens is None
    assert pages.written.tolist() == [5, 7]
    assert pages.is_new.tolist() == [False, True]
    assert pages.previous.tolist() == [4, 6]
    padded = make_pages(torch.tensor([5, 6, 7, UNUSED, UNUSED]), [0, 1, 2, 3], 1, 4, past=[3, 0, 2])
    assert padded.written.tolist() == [5, 6, 7, UNUSED, UNUSED]
    assert padded.previous.tolist() == [4, 5, 6, UNUSED, UNUSED]
    assert padded.is_new.tolist() == [False, True, False, False, False]


def test_a_request_continues_from_its_page_and_starts_empty_whatever_its_page_held() -> None:
    torch.manual_seed(0)
    options, parameters = SidePathOptions(), side_path_tensors("attention", "add")
    hidden_states = torch.randn(11, HIDDEN_SIZE, dtype=torch.float64)
    expected = reference.side_path(hidden_states[None], parameters, options, alpha=0.5).hidden_states[0]
    pools = PagePools()
    pool = pools.pool(1, "default", (5, SLOTS, WIDTH + 1), hidden_states).fill_(torch.nan)
    page_of_token, found = torch.arange(11) // 4 + 2, []
    for start, end in ((0, 6), (6, 7), (7, 11)):
        previous = torch.tensor([int(page_of_token[start - 1]) if start else 4])
        bounds = torch.tensor([0, end - start])
        pages = Pages.of_call(
            5,
            page_of_token[start:end],
            bounds,
            end - start,
            previous,
            torch.tensor([start == 0]),
            page_size=4,
            unused_page=UNUSED,
        )
        # The strength of the side path, and per token.
        strength = None if start else torch.full((end - start,), 0.5)
        memory = PagedMemory(pools, pages, 1, "default", strength)
        alpha = 1.0 if strength is not None else 0.5
        found.append(memory.append(hidden_states[start:end], parameters, options, TokenLayout(), alpha=alpha))
    assert_equal_up_to_rounding(torch.cat(found), expected)
    for page, end in ((2, 4), (3, 8), (4, 11)):
        state = reference.side_path(hidden_states[None, :end], parameters, options).state[0]
        assert_equal_up_to_rounding(pool[page], state)
    assert pool[1].isnan().all()


def test_a_copy_of_pages_reaches_the_pools_of_the_copied_blocks_only() -> None:
    pages, like = PagePools(), torch.empty(0, dtype=torch.float64)
    pools = {block: pages.pool(block, "default", (3, 1, 2), like) for block in (1, 2)}
    for pool in pools.values():
        pool[0] = 1.0
    pages.copy_pages([2], [0], [1])
    assert pools[2][1].eq(1.0).all()
    assert pools[1][1].eq(0.0).all()
    assert pages.pool(1, "default", (3, 1, 2), like) is pools[1]
