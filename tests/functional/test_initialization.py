"""The rows that side paths start from, of data whose answer is known."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from peft_talan.functional.initialization import copying_rows, matching_rows, telling_row


def test_a_telling_row_is_0_for_all_tokens_and_1_for_those_that_it_tells() -> None:
    torch.manual_seed(0)
    x = torch.randn(4_000, 10, dtype=torch.float64) + 3
    x[:100, 4] += 30
    mean, moment = x.mean(0), x.T @ x / len(x)
    row = telling_row(x[:100].mean(0), mean, moment, 1e-6)
    torch.testing.assert_close(row @ mean, torch.zeros((), dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(row @ x[:100].mean(0), torch.ones((), dtype=torch.float64))
    # Not one of the others is taken for them.
    assert (x[:100] @ row).min() > (x[100:] @ row).max()


def test_copying_rows_are_the_map_where_the_rank_allows_it() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(12, 3, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    x = torch.randn(500, 12, dtype=torch.float64)
    moment, mean = x.T @ x / len(x), torch.randn(12, dtype=torch.float64)
    read, write = copying_rows(left, right, mean, moment, 5, 0.1)
    assert read.shape == (5, 12) and write.shape == (12, 5)
    blind = torch.eye(12, dtype=torch.float64) - torch.outer(mean, mean) / (mean @ mean)
    torch.testing.assert_close(write @ read, left @ right @ blind)
    # Of a smaller rank: no map of that rank is nearer, for tokens of this moment. What is shared lies apart here.
    shared = torch.eye(12, dtype=torch.float64)[-1]
    right, moment = right * (1 - shared), moment.clone()
    moment[-1, :-1] = moment[:-1, -1] = 0
    read, write = copying_rows(left, right, shared, moment, 2, 1e-12)
    root = torch.linalg.cholesky(moment)
    left_over = torch.linalg.matrix_norm((write @ read - left @ right) @ root)
    torch.testing.assert_close(left_over, torch.linalg.svdvals(left @ right @ root)[2])


def test_matching_rows_tell_the_pairs_of_tokens_apart() -> None:
    torch.manual_seed(0)
    told = torch.randn(2_000, 4, dtype=torch.float64)
    # Both hold what is told, by other directions, among more of their own, and share something.
    q, k = (
        told @ torch.randn(4, 20, dtype=torch.float64)
        + torch.randn(2_000, 12, dtype=torch.float64) @ torch.randn(12, 20, dtype=torch.float64)
        + 5 * torch.randn(20, dtype=torch.float64)
        for _ in range(2)
    )
    fitted = slice(0, 1_900)
    moments = [(x[fitted].T @ y[fitted]) / 1_900 for x, y in ((q, q), (k, k), (q, k))]
    keys, queries = matching_rows(q[fitted].mean(0), k[fitted].mean(0), *moments, 4, 1e-3)
    assert keys.shape == queries.shape == (4, 20)
    for rows_of, tokens in ((keys, k), (queries, q)):
        torch.testing.assert_close(rows_of @ tokens[fitted].mean(0), torch.zeros(4, dtype=torch.float64))
    # Among 100 others that it was not fitted to.
    scores = F.normalize(q[1_900:] @ queries.T, dim=1) @ F.normalize(k[1_900:] @ keys.T, dim=1).T
    assert (scores.argmax(1) == torch.arange(100)).double().mean() > 0.9
