"""The tensors that a fresh side path starts from."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .parameters import SidePathOptions, read_sizes, working_dtype

HIDDEN_FACTOR = 2
"""How much wider than its input each hidden layer of the `mlp` mixer is."""

INITIAL_GATES = (-4.0, -4.0, -6.0)
"""The logits of the `delta` mixer's gates before training: a token writes and erases 2%, and forgets 0.2%."""


WEIGHT_OF_FOUND = 6.0
"""The logit of a token that a gate or slot is to let in, above the mean of all tokens."""
SPREAD_OF_OTHERS = 2.5
"""The largest standard deviation of such logits."""

STARTS_AT_ZERO: tuple[str, ...] = ("write", "slot_bias", "slot_out", "channel_out", "gate")
"""A fresh adapter is exactly its LoRA weights, and a fresh `mlp` reads like `attention`."""


def parameter_shapes(options: SidePathOptions, hidden_size: int, slots: int, width: int) -> dict[str, torch.Size]:
    """Lay out the tensors of a side path.

    Args:
        options: The axes of the side path.
        hidden_size: H, the width of the residual stream.
        slots: M, the number of memory slots.
        width: d, the latent width.

    Returns:
        The shapes by the names that follow `lora_talan_` in the checkpoint.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "read": (sum(read_sizes(options.mixer, slots, width)), hidden_size),
        "write": (hidden_size, width),
    }
    if options.mixer == "linear":
        shapes["slot_readout"] = (width, slots)
    elif options.mixer == "delta":
        shapes["gate_bias"] = (len(INITIAL_GATES),)
    else:
        shapes["slot_bias"] = (slots,)
    if options.mixer == "mlp":
        shapes["slot_in"] = (HIDDEN_FACTOR * slots, slots)
        shapes["slot_out"] = (slots, HIDDEN_FACTOR * slots)
        shapes["channel_in"] = (HIDDEN_FACTOR * width, width)
        shapes["channel_out"] = (width, HIDDEN_FACTOR * width)
    if options.writeback == "gated":
        shapes["gate"] = (hidden_size + 1,)
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def initial_parameters(
    options: SidePathOptions, hidden_size: int, slots: int, width: int, zero_write: bool = True
) -> dict[str, torch.Tensor]:
    """Draw the tensors of a fresh side path: projections with a standard deviation of 1 / sqrt(inputs).

    Args:
        options: The axes of the side path.
        hidden_size: H, the width of the residual stream.
        slots: M, the number of memory slots.
        width: d, the latent width.
        zero_write: Whether those of `STARTS_AT_ZERO` do; with False nothing starts at zero, for tests. Default True.

    Returns:
        The tensors by name, as in `parameter_shapes`, float32.
    """
    tensors = {}
    for name, shape in parameter_shapes(options, hidden_size, slots, width).items():
        if name == "gate_bias":
            tensors[name] = torch.tensor(INITIAL_GATES)
        elif name == "slot_readout":
            tensors[name] = (torch.randn(slots, width) / width**0.5).T.contiguous()
        elif zero_write and name in STARTS_AT_ZERO:
            tensors[name] = torch.zeros(shape)
        else:
            tensors[name] = torch.randn(shape) / shape[-1] ** 0.5
    return tensors


def whitened(weight: torch.Tensor, moment: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """Turn a projection of white inputs into one of inputs with a given second moment.

    `W L^-1`, `L L^T = E[x x^T] + shrinkage I`, each row scaled so that its output has a mean square of 1.

    Args:
        weight: W, [rows, hidden_size].
        moment: E[x x^T], [hidden_size, hidden_size].
        shrinkage: What is added to each direction's mean square.

    Returns:
        [rows, hidden_size], in the dtype of `moment`.
    """
    root = torch.linalg.cholesky(moment + shrinkage * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))
    rows = torch.linalg.solve_triangular(root, weight.to(moment.dtype), upper=False, left=False)
    return rows / ((rows @ moment) * rows).sum(1, keepdim=True).sqrt()


def telling_row(found: torch.Tensor, mean: torch.Tensor, moment: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """Make the row of `W_read` that best tells some tokens from all others: 0 for the mean of all, 1 for theirs.

    The ridge regression of which tokens they are on x, `(Cov[x] + shrinkage I)^-1 (E[x | found] - E[x])`, made blind
    to what all tokens share.

    Args:
        found: E[x | found], [hidden_size].
        mean: E[x], [hidden_size].
        moment: E[x x^T], [hidden_size, hidden_size].
        shrinkage: What is added to each direction's variance.

    Returns:
        [hidden_size].
    """
    eye = torch.eye(len(mean), dtype=moment.dtype, device=moment.device)
    row = torch.linalg.solve(moment - torch.outer(mean, mean) + shrinkage * eye, found - mean)
    shared = torch.linalg.solve(moment + shrinkage * eye, mean)
    row = row - (row @ mean) / (shared @ mean) * shared
    return row / (row @ (found - mean))


def opening_row(found: torch.Tensor, mean: torch.Tensor, moment: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """Scale `telling_row` to logits that let its tokens in, and not so far that others swing with them.

    Args:
        found: As for `telling_row`, and so are the others.
        mean: E[x].
        moment: E[x x^T].
        shrinkage: What is added to each direction's variance.

    Returns:
        [hidden_size].
    """
    row = telling_row(found, mean, moment, shrinkage)
    return row * min(WEIGHT_OF_FOUND, SPREAD_OF_OTHERS / float((row @ moment @ row).sqrt()))


class StartTensors(NamedTuple):
    """What a side path starts from that some data has told.

    Args:
        rows: Rows of `W_read` by their index.
        write: `W_write` of strength 1; None leaves it at zero.
        moment: The second moment that whitens the other rows.
        mixer: The mixer's own tensor.
        gate: The gate's row, where there is one. Default None.
    """

    rows: dict[int, torch.Tensor]
    write: torch.Tensor | None
    moment: torch.Tensor
    mixer: torch.Tensor
    gate: torch.Tensor | None = None


def copying_rows(
    left: torch.Tensor, right: torch.Tensor, mean: torch.Tensor, moment: torch.Tensor, width: int, shrinkage: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make values and a `W_write` whose product is nearest to a map, for tokens of a given second moment.

    Of `left right L`, `L L^T = E[x x^T] + shrinkage I`, they are the leading singular vectors; what all tokens share
    is not copied.

    Args:
        left: [hidden_size, K].
        right: [K, hidden_size]; the map is `left right`.
        mean: E[x], [hidden_size].
        moment: E[x x^T], [hidden_size, hidden_size].
        width: d, the latent width.
        shrinkage: What is added to each direction's mean square.

    Returns:
        The rows of z, [width, hidden_size], and W_write, [hidden_size, width].
    """
    root = torch.linalg.cholesky(moment + shrinkage * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))
    # As two thin factors: of hidden_size x hidden_size numbers, a decomposition takes minutes.
    outputs, output_factor = torch.linalg.qr(left)
    inputs, input_factor = torch.linalg.qr((right @ root).T)
    of_outputs, values, of_inputs = torch.linalg.svd(output_factor @ input_factor.T)
    kept = min(width, len(values))
    rows = torch.linalg.solve_triangular(root, of_inputs[:kept] @ inputs.T, upper=False, left=False)
    rows = rows - torch.outer(rows @ mean, mean) / (mean @ mean)
    read, write = rows.new_zeros(width, rows.shape[1]), rows.new_zeros(rows.shape[1], width)
    read[:kept], write[:, :kept] = rows, outputs @ of_outputs[:, :kept] * values[:kept]
    return read, write


def matching_rows(
    queries: torch.Tensor,
    keys: torch.Tensor,
    query_covariance: torch.Tensor,
    key_covariance: torch.Tensor,
    cross: torch.Tensor,
    slots: int,
    shrinkage: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make rows of `W_read` by which the tokens of pairs match: their canonical correlations (Hotelling, 1936).

    Of `(Cov[q] + shrinkage I)^-1/2 Cov[q, k] (Cov[k] + shrinkage I)^-1/2` they are the leading singular vectors, each
    times the root of its singular value, and blind to what all q, and all k, share.

    Args:
        queries: E[q], [hidden_size].
        keys: E[k], [hidden_size].
        query_covariance: Cov[q], [hidden_size, hidden_size].
        key_covariance: Cov[k], [hidden_size, hidden_size].
        cross: Cov[q, k], [hidden_size, hidden_size].
        slots: M, the length of a key.
        shrinkage: What is added to each direction's variance.

    Returns:
        The rows of k and of q, [slots, hidden_size] each.
    """
    eye = shrinkage * torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
    roots = [torch.linalg.cholesky(covariance + eye) for covariance in (query_covariance, key_covariance)]
    between = torch.linalg.solve_triangular(roots[0], cross, upper=False)
    between = torch.linalg.solve_triangular(roots[1], between.T, upper=False).T
    left, values, right = torch.linalg.svd(between)
    scale = values[:slots].sqrt()[:, None]
    made = []
    for root, mean, directions in ((roots[1], keys, right[:slots]), (roots[0], queries, left[:, :slots].T)):
        rows = scale * torch.linalg.solve_triangular(root, directions, upper=False, left=False)
        # Rows have no bias: what is 1 for all such tokens takes its place.
        shared = torch.cholesky_solve(mean[:, None], root)[:, 0]
        made.append(rows - torch.outer(rows @ mean, shared) / (shared @ mean))
    return made[0], made[1]


def keys_and_queries_of(
    query_weight: torch.Tensor, key_weight: torch.Tensor, head_dim: int, slots: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make rows of `W_read` whose products are nearest to the scores of an attention at distance 0, summed over heads.

    Of `sum_h Q_h^T K_h` they are the leading singular vectors, so tokens match in the memory as in the attention.

    Args:
        query_weight: The projection to queries, [heads * head_dim, hidden_size].
        key_weight: The projection to keys, [key_heads * head_dim, hidden_size]; key_heads divides heads.
        head_dim: The width of a head.
        slots: M, the length of a key; at most the number of rows and of columns of `key_weight`.

    Returns:
        The rows of k and of q, [slots, hidden_size] each, at least float32, on average of length 1 as drawn ones.
    """
    dtype = working_dtype(query_weight.dtype)
    # The queries of the heads that share keys add up.
    shared = query_weight.to(dtype).reshape(key_weight.shape[0] // head_dim, -1, head_dim, query_weight.shape[1])
    # As two thin factors: of hidden_size x hidden_size numbers, a decomposition takes minutes.
    left, left_factor = torch.linalg.qr(shared.sum(1).flatten(0, 1).T)
    right, right_factor = torch.linalg.qr(key_weight.to(dtype).T)
    of_queries, values, of_keys = torch.linalg.svd(left_factor @ right_factor.T)
    scale = (values[:slots] / values[:slots].mean()).sqrt()
    return scale[:, None] * (right @ of_keys[:slots].T).T, scale[:, None] * (left @ of_queries[:, :slots]).T
