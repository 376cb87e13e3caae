"""The reference against the equations, token by token in plain Python, and the properties its rules promise."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch

from peft_talan.functional import fused, reference, slot_reference
from peft_talan.functional.parameters import (
    NORM_EPSILON,
    WRITEBACKS,
    SidePathOptions,
    SidePathParameters,
)

from .inputs import (
    BATCH,
    HIDDEN_SIZE,
    MIXERS_AND_SCOPES,
    SLOTS,
    WIDTH,
    assert_equal_up_to_rounding,
    layout,
    side_path_tensors,
)

BOTH = pytest.mark.parametrize("module", [reference, fused], ids=["reference", "fused"])


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def times(matrix: list[list[float]], vector: list[float]) -> list[float]:
    return [dot(row, vector) for row in matrix]


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(x - max(logits)) for x in logits]
    return [x / math.fsum(powers) for x in powers]


def remixed_slots(mu: list[list[float]], tensors: list[Any]) -> list[list[float]]:
    slot_in, slot_out, channel_in, channel_out = tensors
    columns = [[row[k] for row in mu] for k in range(WIDTH)]
    columns = [
        [x + y for x, y in zip(c, times(slot_out, [gelu(v) for v in times(slot_in, c)]), strict=True)] for c in columns
    ]
    rows = [[column[m] for column in columns] for m in range(SLOTS)]
    return [
        [x + y for x, y in zip(r, times(channel_out, [gelu(v) for v in times(channel_in, r)]), strict=True)]
        for r in rows
    ]


def read_sums(
    read: list[list[float]], mixer: list[Any], options: SidePathOptions, given: dict[str, Any]
) -> list[list[float]]:
    """What each token reads from slots that are means."""
    tokens = len(read)
    z, q, a = [r[:WIDTH] for r in read], [r[WIDTH : 2 * WIDTH] for r in read], [r[2 * WIDTH :] for r in read]
    valid, segment = given["valid"], given["segment_ids"]
    c = options.soft_cap
    e = [[math.exp(c * math.tanh(v / c)) if valid[t] else 0.0 for v in a[t]] for t in range(tokens)]
    readouts = []
    for t in range(tokens):
        seen = [i for i in range(tokens) if segment[i] == segment[t] and (options.scope == "bidirectional" or i <= t)]
        start = given["state"] if segment[t] == 0 else [[0.0] * (WIDTH + 1)] * SLOTS
        mu = []
        for m in range(SLOTS):
            d = start[m][WIDTH] + math.fsum(e[i][m] for i in seen)
            n = [start[m][k] + math.fsum(e[i][m] * z[i][k] for i in seen) for k in range(WIDTH)]
            mu.append([v / d for v in n] if d > 0 else [0.0] * WIDTH)
        if options.mixer == "linear":
            p = [math.fsum(q[t][k] * mixer[0][k][m] for k in range(WIDTH)) for m in range(SLOTS)]
        else:
            if options.mixer == "mlp":
                mu = remixed_slots(mu, mixer[1:])
            p = softmax([dot(q[t], mu[m]) / math.sqrt(WIDTH) + mixer[0][m] for m in range(SLOTS)])
        readouts.append([math.fsum(p[m] * mu[m][k] for m in range(SLOTS)) for k in range(WIDTH)])
    return readouts


def read_delta(read: list[list[float]], bias: list[float], given: dict[str, Any]) -> list[list[float]]:
    """What each token reads from a memory of keys and values, after its own update."""
    readouts = []
    valid, segment = given["valid"], given["segment_ids"]
    memory = given["state"]
    for t, row in enumerate(read):
        v, q, gates, k = row[:WIDTH], row[WIDTH:][:SLOTS], row[WIDTH + SLOTS :][:3], row[WIDTH + SLOTS + 3 :]
        w, b, f = (1 / (1 + math.exp(-(x + y))) for x, y in zip(gates, bias, strict=True))
        k, q = ([x / math.sqrt(dot(u, u) + NORM_EPSILON) for x in u] for u in (k, q))
        if segment[t] != (segment[t - 1] if t else 0):
            memory = [[0.0] * WIDTH for _ in range(SLOTS)]
        if valid[t]:
            memory = [[(1 - f) * x for x in slot] for slot in memory]
            known = [dot(k, column) for column in zip(*memory, strict=True)]
            added = [w * x - b * y for x, y in zip(v, known, strict=True)]
            memory = [
                [x + key * y for x, y in zip(slot, added, strict=True)] for slot, key in zip(memory, k, strict=True)
            ]
        r = [dot(q, column) for column in zip(*memory, strict=True)]
        rms = math.sqrt(dot(r, r) / WIDTH + NORM_EPSILON)
        readouts.append([x / rms for x in r])
    return readouts


def token_by_token(
    hidden: torch.Tensor, parameters: SidePathParameters, options: SidePathOptions, alpha: float, given: dict[str, Any]
) -> torch.Tensor:
    """The equations of docs/concepts/side_path.md for one sequence, in Python numbers."""
    tokens = hidden.shape[0]
    h, w_read, w_write = hidden.tolist(), parameters.read.tolist(), parameters.write.tolist()
    mixer = [tensor.tolist() for tensor in parameters.mixer]
    x = []
    for row in h:
        rms = math.sqrt(dot(row, row) / HIDDEN_SIZE + NORM_EPSILON)
        x.append([value / rms for value in row])
    read = [times(w_read, row) for row in x]
    empty = [[0.0] * (WIDTH if options.mixer == "delta" else WIDTH + 1)] * SLOTS
    given = {name: tensor.tolist() for name, tensor in given.items()}
    given = {"valid": [True] * tokens, "segment_ids": [0] * tokens, "state": empty, **given}
    if options.mixer == "delta":
        readouts = read_delta(read, mixer[0], given)
    else:
        readouts = read_sums(read, mixer, options, given)
    written = []
    for t, r in enumerate(readouts):
        delta = [alpha * v for v in times(w_write, r)]
        length, size = math.sqrt(dot(h[t], h[t])), math.sqrt(dot(delta, delta))
        if options.writeback == "gated" and parameters.gate is not None:
            gate = parameters.gate.tolist()
            opening = 1 / (1 + math.exp(-(dot(x[t], gate[:-1]) + gate[-1])))
            delta = [opening * v for v in delta]
        elif options.writeback == "capped":
            delta = [v * min(1.0, options.cap * length / size) if size else 0.0 for v in delta]
        elif options.writeback == "orthogonal":
            along = dot(h[t], delta) / length**2
            delta = [v - along * u for v, u in zip(delta, h[t], strict=True)]
        elif options.writeback == "relative":
            delta = [v * math.sqrt(length**2 / HIDDEN_SIZE + NORM_EPSILON) for v in delta]
        written.append([u + v for u, v in zip(h[t], delta, strict=True)])
    return torch.tensor(written, dtype=torch.float64)


@BOTH
@pytest.mark.parametrize("writeback", WRITEBACKS)
@pytest.mark.parametrize(("mixer", "scope"), MIXERS_AND_SCOPES)
def test_the_equations_token_by_token(module: ModuleType, mixer: Any, writeback: Any, scope: Any) -> None:
    tokens = 40
    for kind, soft_cap in (("plain", 5.0), ("all", 10.0)):
        options = SidePathOptions(mixer, writeback, scope, cap=0.3, soft_cap=soft_cap)
        hidden = torch.randn(BATCH, tokens, HIDDEN_SIZE, dtype=torch.float64)
        parameters, given = side_path_tensors(mixer, writeback), layout(kind, BATCH, tokens, mixer)
        found = module.side_path(hidden, parameters, options, alpha=0.7, **given).hidden_states
        for index in range(BATCH):
            own = {name: tensor[index] for name, tensor in given.items()}
            expected = token_by_token(hidden[index], parameters, options, 0.7, own)
            assert_equal_up_to_rounding(found[index], expected)


def test_the_soft_cap_bounds_how_much_more_a_token_weighs() -> None:
    for soft_cap in (1.0, 5.0, 10.0):
        weights = slot_reference.slot_weights(torch.tensor([[[1e3, -1e3]]]), None, soft_cap)
        torch.testing.assert_close(weights[0, 0].log(), torch.tensor([soft_cap, -soft_cap]))


@BOTH
def test_capped_holds_its_trust_region(module: ModuleType) -> None:
    hidden = torch.randn(BATCH, 9, HIDDEN_SIZE, dtype=torch.float64)
    for cap in (0.01, 0.3):
        for strength in (1e-3, 1.0, 1e6):
            written = module.write_back(
                hidden,
                torch.randn(BATCH, 9, WIDTH, dtype=torch.float64),
                side_path_tensors("attention", "capped"),
                SidePathOptions(writeback="capped", cap=cap),
                strength,
            )
            # h' - h is rounded at the size of h, hence the slack.
            assert ((written - hidden).norm(dim=-1) <= cap * hidden.norm(dim=-1) + 1e-14 * hidden.norm(dim=-1)).all()


@BOTH
def test_orthogonal_has_no_component_along_the_hidden_state(module: ModuleType) -> None:
    hidden = torch.randn(BATCH, 9, HIDDEN_SIZE, dtype=torch.float64)
    readout = torch.randn(BATCH, 9, WIDTH, dtype=torch.float64)
    parameters, options = side_path_tensors("attention", "orthogonal"), SidePathOptions(writeback="orthogonal")
    change = module.write_back(hidden, readout, parameters, options) - hidden
    assert change.norm() > 1
    assert_equal_up_to_rounding((change * hidden).sum(-1), torch.zeros(BATCH, 9, dtype=torch.float64))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("writeback", WRITEBACKS)
def test_zero_write_weight_gives_the_hidden_state_back_bitwise(
    module: ModuleType, writeback: Any, dtype: torch.dtype
) -> None:
    parameters = side_path_tensors("attention", writeback)._replace(
        write=torch.zeros(HIDDEN_SIZE, WIDTH, dtype=torch.float32)
    )
    parameters = SidePathParameters(
        parameters.read.float(),
        tuple(tensor.float() for tensor in parameters.mixer),
        parameters.write,
        None if parameters.gate is None else parameters.gate.float(),
    )
    hidden = torch.randn(BATCH, 40, HIDDEN_SIZE).to(dtype)
    written = module.side_path(hidden, parameters, SidePathOptions("attention", writeback)).hidden_states
    assert written.dtype == dtype
    assert torch.equal(written, hidden)


@BOTH
@pytest.mark.parametrize("writeback", WRITEBACKS)
def test_gradient_scale_scales_what_enters_the_side_path_only(module: ModuleType, writeback: Any) -> None:
    parameters = side_path_tensors("attention", writeback)
    trained = [parameters.read, parameters.write, *parameters.mixer]
    trained += [] if parameters.gate is None else [parameters.gate]
    hidden = torch.randn(BATCH, 9, HIDDEN_SIZE, dtype=torch.float64).requires_grad_()
    direction = torch.randn(BATCH, 9, HIDDEN_SIZE, dtype=torch.float64)
    outputs, by_hidden, by_parameter = [], [], []
    for tensor in trained:
        tensor.requires_grad_()
    for scale in (1.0, 0.25, 0.0):
        options = SidePathOptions("attention", writeback, grad_scale=scale)
        written = module.side_path(hidden, parameters, options).hidden_states
        outputs.append(written.detach())
        first, *others = torch.autograd.grad(written, [hidden, *trained], direction)
        by_hidden.append(first)
        by_parameter.append(others)
    assert torch.equal(by_hidden[2], direction)
    for found, scale in ((1, 0.25), (2, 0.0)):
        assert_equal_up_to_rounding(outputs[found], outputs[0])
        assert_equal_up_to_rounding(by_hidden[found] - direction, scale * (by_hidden[0] - direction))
        for scaled, whole in zip(by_parameter[found], by_parameter[0], strict=True):
            assert_equal_up_to_rounding(scaled, scale * whole)
