"""Many requests' tokens in one flat call, against the reference that runs them one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_talan.functional import ragged, ragged_reference, reference
from peft_talan.functional.parameters import MIXERS, WRITEBACKS, SidePathOptions, SidePathParameters, read_sizes
from peft_talan.functional.stacked import StackedParameters

from .inputs import HIDDEN_SIZE, LargestTensor, assert_equal_up_to_rounding, memory, mixer_tensors, side_path_tensors

PADDING = 5
LENGTHS = {
    "one request": [37],
    "chunk borders": [31, 32, 33, 64],
    "one token among long ones": [1, 70, 1, 1, 3],
    "no tokens: first, between and last": [0, 9, 0, 0, 14, 0],
    "decoding": [1] * 7,
    "decoding, some without a token": [0, 1, 1, 0, 1, 0, 0],
    "more requests than tokens": [2, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    "nothing but padding": [0, 0],
}


def call(lengths: list[int], padded: int, mixer: Any, writeback: Any) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    real = sum(lengths)
    hidden = torch.randn(real + padded, HIDDEN_SIZE, dtype=torch.float64)
    given = {
        "cu_seqlens": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        "state": memory(len(lengths), mixer),
        "max_query_length": max(lengths),
        "alpha": 0.7,
    }
    given["state"][::2] = 0.0  # requests that begin
    arguments = (hidden, side_path_tensors(mixer, writeback), SidePathOptions(mixer, writeback, soft_cap=7.0))
    return arguments, given, real


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_outputs_and_memories_equal_the_reference(lengths: list[int], mixer: Any) -> None:
    for writeback in WRITEBACKS:
        for padded in (0, PADDING):
            arguments, given, real = call(lengths, padded, mixer, writeback)
            if not real + padded:
                continue
            for snapshot_positions in (None, torch.tensor([0, *range(0, real, 3), -1, real + padded])):
                found = ragged.ragged_side_path(*arguments, **given, snapshot_positions=snapshot_positions)
                expected = ragged_reference.ragged_side_path(
                    *arguments, **given, snapshot_positions=snapshot_positions
                )
                assert found.hidden_states.isfinite().all() and found.states.isfinite().all()
                if real:
                    assert_equal_up_to_rounding(found.hidden_states[:real], expected.hidden_states[:real])
                if real or snapshot_positions is None:
                    wanted = slice(None) if snapshot_positions is None else slice(-2)
                    assert_equal_up_to_rounding(found.states[wanted], expected.states[wanted])


@pytest.mark.parametrize("mixer", MIXERS)
def test_calls_in_which_each_token_is_a_request(mixer: Any) -> None:
    for writeback in WRITEBACKS:
        arguments, given, _ = call([1] * 7, 0, mixer, writeback)
        given |= {"cu_seqlens": None, "alpha": torch.randn(7, dtype=torch.float64)}
        for snapshot_positions in (None, torch.tensor([5, -1, 2, 7])):
            found = ragged.ragged_side_path(*arguments, **given, snapshot_positions=snapshot_positions)
            expected = ragged_reference.ragged_side_path(*arguments, **given, snapshot_positions=snapshot_positions)
            wanted = slice(None) if snapshot_positions is None else [0, 2]
            assert_equal_up_to_rounding(found.hidden_states, expected.hidden_states)
            assert_equal_up_to_rounding(found.states[wanted], expected.states[wanted])


@pytest.mark.parametrize("lengths", [[3, 0, 12], [1, 1, 0, 1]])
def test_each_token_has_a_strength_of_its_own(lengths: list[int]) -> None:
    for writeback in WRITEBACKS:
        arguments, given, real = call(lengths, PADDING, "attention", writeback)
        given["alpha"] = torch.randn(real + PADDING, dtype=torch.float64)
        found = ragged.ragged_side_path(*arguments, **given)
        expected = ragged_reference.ragged_side_path(*arguments, **given)
        assert_equal_up_to_rounding(found.hidden_states[:real], expected.hidden_states[:real])
        assert_equal_up_to_rounding(found.states, expected.states)


def stacked_call(lengths: list[int], padded: int, mixer: Any, writeback: Any) -> tuple[dict[str, Any], int]:
    """Requests of three adapters in turn, and of none."""
    (hidden, _, options), given, real = call(lengths, padded, mixer, writeback)
    several = [side_path_tensors(mixer, writeback) for _ in range(3)]
    parameters = StackedParameters(
        read=torch.stack([one.read for one in several]),
        mixer=tuple(torch.stack(tensors) for tensors in zip(*(one.mixer for one in several), strict=True)),
        write=torch.stack([one.write.T for one in several]),
        gate=torch.stack([one.gate for one in several]) if several[0].gate is not None else None,
        alpha=torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64),
        cap=torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
    )
    of_request = (torch.arange(len(lengths)) + 1) % 4 - 1
    adapters = torch.cat([of_request.repeat_interleave(torch.tensor(lengths)), torch.full((padded,), -1)])
    given |= {"alpha": torch.randn(real + padded, dtype=torch.float64), "adapters": adapters}
    return {"hidden_states": hidden, "parameters": parameters, "options": options, **given}, real


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("lengths", [*LENGTHS.values(), None], ids=[*LENGTHS, "each token is a request"])
def test_requests_of_several_adapters_equal_the_reference(lengths: list[int] | None, mixer: Any) -> None:
    for writeback in WRITEBACKS:
        given, real = stacked_call(lengths or [1] * 7, PADDING if lengths else 0, mixer, writeback)
        if lengths is None:
            given["cu_seqlens"] = None
        for snapshot_positions in (None, torch.arange(real)) if real else (None,):
            found = ragged.ragged_adapters(**given, snapshot_positions=snapshot_positions)
            expected = ragged_reference.ragged_adapters(**given, snapshot_positions=snapshot_positions)
            assert found.hidden_states.isfinite().all() and found.states.isfinite().all()
            without = given["adapters"] < 0
            assert torch.equal(found.hidden_states[without], given["hidden_states"][without])
            if real:
                assert_equal_up_to_rounding(found.hidden_states[~without], expected.hidden_states[~without])
            if snapshot_positions is not None and (~without).any():
                with_adapter = ~without[:real]
                assert_equal_up_to_rounding(found.states[with_adapter], expected.states[with_adapter])


def test_another_adapter_changes_nothing() -> None:
    given, _ = stacked_call([9, 30, 21, 5], 0, "attention", "add")
    before = ragged.ragged_adapters(**given)
    given["parameters"].read[1], given["parameters"].write[1] = 3.0, -2.0
    after = ragged.ragged_adapters(**given)
    others = given["adapters"] != 1
    assert torch.equal(after.hidden_states[others], before.hidden_states[others])
    assert not torch.equal(after.hidden_states, before.hidden_states)


def test_the_reference_runs_each_request_as_a_sequence_of_its_own() -> None:
    lengths = [4, 0, 7]
    (hidden, parameters, options), given, _ = call(lengths, PADDING, "attention", "add")
    output = ragged_reference.ragged_side_path(hidden, parameters, options, **given)
    for request, part in ((0, slice(0, 4)), (2, slice(4, 11))):
        before = given["state"][request : request + 1]
        alone = reference.side_path(hidden[None, part], parameters, options, alpha=0.7, state=before)
        torch.testing.assert_close(output.hidden_states[part], alone.hidden_states[0], rtol=0, atol=0)
        assert_equal_up_to_rounding(output.states[request], alone.state[0])
    assert torch.equal(output.states[1], given["state"][1])
    assert torch.equal(output.hidden_states[11:], hidden[11:])


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_call_cut_into_pieces_returns_what_the_whole_returns(mixer: Any) -> None:
    lengths = [40, 13, 77]
    (hidden, parameters, options), given, _ = call(lengths, 0, mixer, "gated")
    whole = ragged.ragged_side_path(hidden, parameters, options, **given)
    rows, state = hidden.split(lengths), given["state"]
    written: list[list[torch.Tensor]] = [[], [], []]
    for start in range(0, max(lengths), 11):
        pieces = [row[start : start + 11] for row in rows]
        ends = torch.tensor([0, *(len(piece) for piece in pieces)]).cumsum(0)
        part = ragged.ragged_side_path(
            torch.cat(pieces), parameters, options, cu_seqlens=ends, state=state, max_query_length=11, alpha=0.7
        )
        state = part.states
        for request, piece in enumerate(part.hidden_states.split([len(piece) for piece in pieces])):
            written[request].append(piece)
    assert_equal_up_to_rounding(torch.cat([piece for request in written for piece in request]), whole.hidden_states)
    assert_equal_up_to_rounding(state, whole.states)


@pytest.mark.parametrize("mixer", MIXERS)
def test_another_request_changes_nothing(mixer: Any) -> None:
    lengths = [9, 30, 21]
    (hidden, parameters, options), given, _ = call(lengths, 0, mixer, "add")
    before = ragged.ragged_side_path(hidden, parameters, options, **given)
    hidden[9:39], given["state"][1] = torch.randn(30, HIDDEN_SIZE, dtype=torch.float64), memory(1, mixer)[0]
    after = ragged.ragged_side_path(hidden, parameters, options, **given)
    for part in (slice(0, 9), slice(39, 60)):
        assert torch.equal(after.hidden_states[part], before.hidden_states[part])
    assert torch.equal(after.states[::2], before.states[::2])


@pytest.mark.parametrize(("lengths", "mixer"), [([1, 1, 1], "attention"), ([3, 0, 12], "mlp"), ([3, 0, 12], "delta")])
def test_the_operator_compiles_as_one_graph_without_asking_the_device(lengths: list[int], mixer: Any) -> None:
    (hidden, parameters, options), given, _ = call(lengths, 2, mixer, "add")
    expected = ragged.ragged_side_path(hidden, parameters, options, **given)
    compiled = torch.compile(ragged.ragged_side_path, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(hidden, parameters, options, **given)
    assert_equal_up_to_rounding(found.hidden_states, expected.hidden_states)
    assert_equal_up_to_rounding(found.states, expected.states)


@pytest.mark.parametrize("mixer", MIXERS)
def test_no_memory_is_made_for_every_token(mixer: Any) -> None:
    tokens, slots, width = 1200, 12, 16
    parameters = SidePathParameters(
        read=torch.randn(sum(read_sizes(mixer, slots, width)), HIDDEN_SIZE),
        mixer=tuple(tensor.float() for tensor in mixer_tensors(mixer, slots, width)),
        write=torch.randn(HIDDEN_SIZE, width),
    )
    with torch.no_grad(), LargestTensor() as largest:
        ragged.ragged_side_path(
            torch.randn(tokens, HIDDEN_SIZE),
            parameters,
            SidePathOptions(mixer=mixer),
            cu_seqlens=torch.tensor([0, 700, 1200]),
            state=torch.zeros(2, *parameters.state_shape(mixer)),
            max_query_length=700,
        )
    assert 0 < largest.elements < tokens * slots * width / 3
