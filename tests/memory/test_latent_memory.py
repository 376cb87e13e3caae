"""The memory by itself, against the reference: however tokens come in and whatever happens to its rows and length."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, StaticCache

from peft_talan.functional import reference
from peft_talan.functional.parameters import SidePathOptions
from peft_talan.memory.cache import MemoryRequest, continue_or_start_memory, mark_stale
from peft_talan.memory.latent_memory import LatentMemory
from peft_talan.memory.token_layout import TokenLayout

from ..functional.inputs import HIDDEN_SIZE, assert_equal_up_to_rounding, side_path_tensors
from ..small_models import CONFIGS

OPTIONS = SidePathOptions()
PARAMETERS = side_path_tensors("attention", "add")
BY_MIXER = {mixer: (side_path_tensors(mixer, "add"), SidePathOptions(mixer)) for mixer in ("attention", "delta")}
HIDDEN = torch.randn(2, 150, HIDDEN_SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
VALID = torch.ones(2, 150, dtype=torch.bool)
VALID[0, :5] = VALID[1, 70:75] = False


def expected(
    hidden: torch.Tensor, valid: torch.Tensor | None = None, mixer: str | None = None
) -> reference.SidePathOutput:
    parameters, options = BY_MIXER.get(mixer, (PARAMETERS, OPTIONS))
    return reference.side_path(hidden, parameters, options, valid=valid)


def append(
    memory: LatentMemory, pieces: list[int], valid: torch.Tensor | None = None, mixer: str | None = None
) -> torch.Tensor:
    parameters, options = BY_MIXER.get(mixer, (PARAMETERS, OPTIONS))
    written, start = [], 0
    for piece in pieces:
        now = None if valid is None else valid[:, start : start + piece]
        written.append(memory.append(HIDDEN[:, start : start + piece], parameters, options, TokenLayout(now)))
        start += piece
    return torch.cat(written, dim=1)


PIECES = {
    "one call": [150],
    "prompt and tokens": [20] + [1] * 130,
    "tokens": [1] * 150,
    "turns": [1, 60, 1, 1, 40, 47],
}


@torch.no_grad()
@pytest.mark.parametrize("valid", [None, VALID])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("mixer", BY_MIXER)
def test_any_split_of_the_tokens(mixer: str, pieces: list[int], static: bool, valid: torch.Tensor | None) -> None:
    memory = LatentMemory(static=static)
    assert_equal_up_to_rounding(append(memory, pieces, valid, mixer), expected(HIDDEN, valid, mixer).hidden_states)
    assert_equal_up_to_rounding(memory.state, expected(HIDDEN, valid, mixer).state)
    assert int(memory.length) == 150


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("prompt", [0, 1, 4])
def test_a_row_of_padding_alone_reads_zeros_also_after_a_reset(prompt: int, static: bool) -> None:
    """The second row's first real token comes late, one token at a time."""
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, :6] = False
    memory = LatentMemory(static=static)
    for _ in range(2):
        pieces = [prompt, *[1] * (9 - prompt)] if prompt else [1] * 9
        written = append(memory, pieces, valid)
        assert_equal_up_to_rounding(written, expected(HIDDEN[:, :9], valid).hidden_states)
        memory.reset()


class NoDoubles(TorchFunctionMode):
    """A device without float64, as it answers."""

    def __torch_function__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is torch.Tensor.to and torch.float64 in args:
            raise TypeError("Cannot convert a Tensor to float64 dtype as the framework doesn't support float64")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_device_without_doubles_sums_in_single_precision(static: bool) -> None:
    hidden, parameters = HIDDEN.float(), side_path_tensors("attention", "add", dtype=torch.float32)
    whole = reference.side_path(hidden, parameters, OPTIONS).hidden_states
    memory, written = LatentMemory(static=static), []
    with NoDoubles():
        for part in hidden.split([40] + [1] * 8 + [102], dim=1):
            written.append(memory.append(part, parameters, OPTIONS))
        if not static:
            memory.crop(110)
            again = memory.append(hidden[:, 40:], parameters, OPTIONS)
            assert_equal_up_to_rounding(again, whole[:, 40:])
    assert memory.state.dtype == torch.float32
    assert_equal_up_to_rounding(torch.cat(written, 1), whole)


@torch.no_grad()
@pytest.mark.parametrize("forget", [1, 3, 64, 65, 100, 150])
@pytest.mark.parametrize("mixer", BY_MIXER)
def test_a_crop_leaves_what_came_before(mixer: str, forget: int) -> None:
    memory, (parameters, options) = LatentMemory(static=False), BY_MIXER[mixer]
    append(memory, PIECES["prompt and tokens"], VALID, mixer)
    memory.crop(forget)
    assert memory.length == 150 - forget
    if forget < 150:
        kept = expected(HIDDEN[:, :-forget], VALID[:, :-forget], mixer)
        assert_equal_up_to_rounding(memory.state, kept.state)
    written = memory.append(HIDDEN[:, -forget:], parameters, options, TokenLayout(VALID[:, -forget:]))
    assert_equal_up_to_rounding(written, expected(HIDDEN, VALID, mixer).hidden_states[:, -forget:])


def test_a_crop_into_an_earlier_segment() -> None:
    memory = LatentMemory(static=False)
    segments = torch.arange(30).expand(2, 30) // 10
    memory.append(HIDDEN[:, :30], PARAMETERS, OPTIONS, TokenLayout(None, segments))
    memory.append(HIDDEN[:, 30:33], PARAMETERS, OPTIONS)
    for forget, start, end in ((3, 20, 30), (5, 20, 25), (10, 10, 15)):
        memory.crop(forget)
        assert_equal_up_to_rounding(memory.state, expected(HIDDEN[:, start:end]).state)


@torch.no_grad()
def test_rows_follow_beams_and_what_is_recorded_stays_one_piece() -> None:
    memory, rows = LatentMemory(static=False), torch.tensor([0, 1])
    seen = HIDDEN[:, :0]
    for index in range(20):
        token = HIDDEN[:, index : index + 1]
        memory.append(token, PARAMETERS, OPTIONS)
        rows = torch.tensor([1, 0]) if index % 3 else torch.tensor([0, 0])
        memory.select_rows(rows)
        seen = torch.cat([seen, token], dim=1)[rows]
    assert len(memory.recent.records) == 1
    assert_equal_up_to_rounding(memory.state, expected(seen).state)
    memory.crop(7)
    assert_equal_up_to_rounding(memory.state, expected(seen[:, :-7]).state)


def make_cache(kind: str) -> DynamicCache | StaticCache:
    config = CONFIGS["qwen3"]
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=40)


def request(past: int | torch.Tensor, **options: object) -> MemoryRequest:
    return MemoryRequest(
        **{
            "block_index": 1,
            "child_name": "talan",
            "adapter_name": "a",
            "past": past,
            "batch": 2,
            "tokens": 6,
            "scope": "causal",
            **options,
        }
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_only_a_memory_that_has_all_tokens_is_continued(kind: str) -> None:
    def past(number: int) -> int | torch.Tensor:
        return number if kind == "dynamic" else torch.tensor(number)

    def start() -> tuple[DynamicCache | StaticCache, LatentMemory]:
        cache = make_cache(kind)
        memory = continue_or_start_memory(cache, request(0))
        memory.append(HIDDEN[:, :6], PARAMETERS, OPTIONS)
        return cache, memory

    cache, memory = start()
    assert continue_or_start_memory(cache, request(past(6))) is memory
    with pytest.raises(ValueError, match="batch has 3 rows"):
        continue_or_start_memory(cache, request(past(6), batch=3))
    for refused in (
        request(past(7)),
        request(past(5)),
        request(past(6), adapter_name="b"),
        request(past(6), block_index=2),
    ):
        with pytest.raises(ValueError, match="empty cache"):
            continue_or_start_memory(cache, refused)
    mark_stale(cache, 1, "talan", ["b"])
    with pytest.raises(ValueError, match="empty cache"):
        continue_or_start_memory(cache, request(past(6)))
    cache.reset()
    assert continue_or_start_memory(cache, request(past(0))) is memory
    with pytest.raises(ValueError, match="empty cache"):
        continue_or_start_memory(cache, request(past(6)))
    with pytest.raises(ValueError, match="'bidirectional'"):
        continue_or_start_memory(start()[0], request(past(6), scope="bidirectional"))


@torch.no_grad()
def test_rows_that_an_adapter_left_out_are_not_continued() -> None:
    cache, first = make_cache("dynamic"), torch.tensor([True, False])
    memory = continue_or_start_memory(cache, request(0, rows=first))
    memory.append(HIDDEN[:, :6], PARAMETERS, OPTIONS)
    assert continue_or_start_memory(cache, request(6, rows=first)) is memory
    for rows in (None, ~first):
        with pytest.raises(ValueError, match="empty cache"):
            continue_or_start_memory(cache, request(6, rows=rows))


@torch.no_grad()
@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_cache_looks_as_without_memories_and_dies_without_the_collector(copier: object) -> None:
    cache = make_cache("dynamic")
    continue_or_start_memory(cache, request(0)).append(HIDDEN[:, :6], PARAMETERS, OPTIONS)
    plain = make_cache("dynamic")
    assert len(cache) == len(plain)
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in plain.layers]
    for index in range(len(cache)):
        cache.update(torch.zeros(2, 1, 6, 4), torch.zeros(2, 1, 6, 4), index)
    twin = copier(cache)
    if copier is not copy.copy:
        twin.crop(-2)
        assert continue_or_start_memory(twin, request(4)).length == 4
    assert continue_or_start_memory(cache, request(6)).length == 6
    gc.collect()
    gc.disable()
    try:
        alive = weakref.ref(cache)
        del cache
        assert alive() is None
    finally:
        gc.enable()
