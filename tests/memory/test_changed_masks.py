"""A mask that says something else about earlier tokens than the mask they were read with: right, or refused."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from peft import PeftModel
from transformers import Cache, DynamicCache, StaticCache

from peft_talan.memory.recent_tokens import RECORDED_TOKENS

from ..small_models import make_config, make_model, make_tokens, rounding
from .test_generation import OperationCounter

LENGTH = 8
CHANGED = {"hides one and shows one": (1, 3), "hides one": (None, 3), "shows one": (1, None)}
"""What the first mask hides and the second shows, and the other way round."""


def make_cache(model: PeftModel, kind: str, length: int = LENGTH + 4) -> Cache:
    config = model.get_base_model().config
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=length)


def mask_without(length: int, hidden: int | None) -> torch.Tensor:
    mask = torch.ones(1, length, dtype=torch.long)
    if hidden is not None:
        mask[0, hidden] = 0
    return mask


def call(model: PeftModel, tokens: torch.Tensor, cache: Cache, mask: torch.Tensor | None) -> torch.Tensor:
    """Go on with the tokens that the cache lacks, each at its own position."""
    past = int(cache.get_seq_length())
    positions = torch.arange(past, tokens.shape[1]).unsqueeze(0)
    given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    return model(tokens[:, past:], **given).logits


def causal(mask: torch.Tensor, queries: int, cache: Cache) -> torch.Tensor:
    """The mask of the last tokens and all keys that a cache gives to attention, [1, 1, queries, keys], bool."""
    length = mask.shape[1]
    visible = (mask.bool()[:, None] & torch.ones(length, length, dtype=torch.bool).tril())[:, None, -queries:]
    return torch.nn.functional.pad(visible, (0, cache.get_mask_sizes(queries, 0)[0] - length))


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "after", "cache_kind", "square"),
    [
        (CHANGED[name], after, cache_kind, square)
        for name, after, cache_kind, square in product(CHANGED, (1, 2), ("dynamic", "static"), (False, True))
        # Several tokens with a flat mask and a dynamic cache take the token out: test_recorded_tokens.py.
        if not (name == "hides one" and after > 1 and cache_kind == "dynamic" and not square)
    ],
)
def test_another_mask_is_refused(
    change: tuple[int | None, int | None], after: int, cache_kind: str, square: bool
) -> None:
    hidden_first, hidden_second = change
    model = make_model("qwen3")
    tokens, cache = make_tokens(batch=1, tokens=LENGTH + after), make_cache(model, cache_kind)
    call(model, tokens[:, :LENGTH], cache, mask_without(LENGTH, hidden_first))
    mask = mask_without(LENGTH + after, hidden_second)
    with pytest.raises(ValueError, match=r"attention_mask: it (un)?masks"):
        call(model, tokens, cache, causal(mask, after, cache) if square else mask)


@torch.no_grad()
@pytest.mark.parametrize("after", [1, 2])
def test_another_mask_of_tokens_that_are_not_recorded_any_more_is_refused(after: int) -> None:
    model, length = make_model("qwen3"), RECORDED_TOKENS + 20
    tokens, cache = make_tokens(batch=1, tokens=length + after), make_cache(model, "dynamic")
    call(model, tokens[:, :length], cache, mask_without(length, 1))
    with pytest.raises(ValueError, match="attention_mask: it masks"):
        call(model, tokens, cache, mask_without(length + after, 3))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["after a crop", "recording asked for late"])
def test_a_mask_that_hides_a_token_is_refused_where_nothing_is_recorded(kind: str) -> None:
    model = make_model("qwen3" if kind == "after a crop" else "mistral")
    length = RECORDED_TOKENS + LENGTH if kind == "after a crop" else 40
    tokens, cache = make_tokens(batch=1, tokens=length), make_cache(model, "dynamic")
    call(model, tokens, cache, None)
    if kind == "after a crop":
        cache.crop(-RECORDED_TOKENS)
    else:
        cache.activate_past_recording()
    past = cache.get_seq_length()
    with pytest.raises(ValueError, match="attention_mask: it masks"):
        call(model, make_tokens(batch=1, tokens=past + 2), cache, mask_without(past + 2, past - 3))


@torch.no_grad()
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
def test_a_refused_mask_is_refused_again_and_leaves_the_cache_as_it_was(cache_kind: str, square: bool) -> None:
    model = make_model("qwen3", make_config(talan_layers=[0], talan_position="input"))
    length = RECORDED_TOKENS + 20
    tokens, cache = make_tokens(batch=1, tokens=length + 2), make_cache(model, cache_kind, length + 4)

    def go_on(tokens_more: int, hidden: int | None) -> torch.Tensor:
        mask = mask_without(length + tokens_more, hidden)
        given = causal(mask, length + tokens_more - int(cache.get_seq_length()), cache) if square else mask
        return call(model, tokens[:, : length + tokens_more], cache, given)

    go_on(0, hidden=1)
    for hidden in (3, 3, None):
        with pytest.raises(ValueError, match="attention_mask: it masks"):
            go_on(2, hidden)
    logits = torch.cat([go_on(1, hidden=1), go_on(2, hidden=1)], dim=1)
    whole = {"attention_mask": mask_without(length + 2, 1), "position_ids": torch.arange(length + 2)[None]}
    torch.testing.assert_close(logits, model(tokens, use_cache=False, **whole).logits[:, -2:], **rounding())


@torch.no_grad()
def test_a_token_that_was_taken_out_in_a_call_with_sample_numbers_stays_out() -> None:
    model, hidden = make_model("qwen3"), LENGTH - 1
    tokens, cache = make_tokens(batch=1, tokens=LENGTH + 3), make_cache(model, "dynamic")
    call(model, tokens[:, :LENGTH], cache, None)
    given = {"position_ids": torch.arange(LENGTH, LENGTH + 2)[None], "seq_idx": torch.zeros(1, 2, dtype=torch.int)}
    mask = mask_without(LENGTH + 2, hidden)
    model(tokens[:, LENGTH : LENGTH + 2], attention_mask=mask, past_key_values=cache, **given)
    with pytest.raises(ValueError, match="attention_mask: it masks"):
        call(model, tokens, copy.deepcopy(cache), mask_without(LENGTH + 3, None))
    mask = mask_without(LENGTH + 3, hidden)
    logits = call(model, tokens, cache, mask)
    whole = model(tokens, attention_mask=mask, position_ids=torch.arange(LENGTH + 3)[None], use_cache=False).logits
    torch.testing.assert_close(logits[:, 0], whole[:, -1], **rounding())


@torch.no_grad()
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("after", [1, 2])
def test_no_mask_after_masked_tokens_is_refused(after: int, cache_kind: str, square: bool) -> None:
    model = make_model("qwen3")
    tokens, cache = make_tokens(batch=1, tokens=LENGTH + after), make_cache(model, cache_kind)
    mask = mask_without(LENGTH, 0)
    call(model, tokens[:, :LENGTH], cache, causal(mask, LENGTH, cache) if square else mask)
    with pytest.raises(ValueError, match="attention_mask=None"):
        call(model, tokens, cache, None)


@torch.no_grad()
def test_another_mask_after_a_square_one_and_a_crop_is_refused() -> None:
    model = make_model("qwen3")
    tokens, cache = make_tokens(batch=1, tokens=LENGTH), make_cache(model, "dynamic")
    call(model, tokens, cache, causal(mask_without(LENGTH, 0), LENGTH, cache))
    cache.crop(-1)
    with pytest.raises(ValueError, match="attention_mask: it masks"):
        call(model, tokens, cache, mask_without(LENGTH, None))


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
def test_packed_samples_go_on_without_a_mask_unless_some_token_was_masked(cache_kind: str, padded: bool) -> None:
    model, start = make_model("qwen3"), 4
    tokens, cache = make_tokens(batch=1, tokens=LENGTH + 1), make_cache(model, cache_kind)
    square = causal(mask_without(LENGTH, 0 if padded else None), LENGTH, cache)
    square[..., start:, :start] = False
    call(model, tokens[:, :LENGTH], cache, square)
    if padded:
        with pytest.raises(ValueError, match="attention_mask=None"):
            call(model, tokens, cache, None)
    else:
        call(model, tokens, cache, None)


@torch.no_grad()
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
def test_a_caller_may_write_to_its_mask_and_leave_it_out_where_nothing_is_masked(cache_kind: str) -> None:
    model = make_model("qwen3")
    tokens, cache = make_tokens(batch=1, tokens=LENGTH + 4), make_cache(model, cache_kind)
    expected = model(tokens, use_cache=False).logits
    whole = torch.ones(1, LENGTH + 4, dtype=torch.bool)
    logits = [call(model, tokens[:, :LENGTH], cache, whole[:, :LENGTH])]
    for end, mask in ((LENGTH + 1, None), (LENGTH + 2, whole), (LENGTH + 3, whole), (LENGTH + 4, None)):
        logits.append(call(model, tokens[:, :end], cache, None if mask is None else mask[:, :end]))
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **rounding())
    cache = make_cache(model, cache_kind)
    call(model, tokens[:, :LENGTH], cache, whole[:, :LENGTH])
    call(model, tokens[:, : LENGTH + 1], cache, whole[:, : LENGTH + 1])
    whole[0, 2] = False
    with pytest.raises(ValueError, match="attention_mask: it masks"):
        call(model, tokens[:, : LENGTH + 2], cache, whole[:, : LENGTH + 2])


@torch.no_grad()
def test_after_a_crop_the_tokens_that_went_may_be_masked_otherwise() -> None:
    model = make_model("qwen3")
    tokens, cache = make_tokens(batch=1, tokens=LENGTH + 1), make_cache(model, "dynamic")
    call(model, tokens[:, :LENGTH], cache, mask_without(LENGTH, LENGTH - 2))
    cache.crop(-3)
    call(model, tokens[:, :LENGTH], cache, mask_without(LENGTH, None))
    logits = call(model, tokens, cache, mask_without(LENGTH + 1, None))
    torch.testing.assert_close(logits[:, 0], model(tokens, use_cache=False).logits[:, -1], **rounding())


@torch.no_grad()
@pytest.mark.parametrize("crop", [2, 5])
def test_after_a_crop_of_packed_samples_the_mask_shows_the_last_one_that_is_left(crop: int) -> None:
    model, start, left = make_model("qwen3"), 4, LENGTH - crop
    tokens, cache = make_tokens(batch=1, tokens=LENGTH), make_cache(model, "dynamic")
    square = causal(mask_without(LENGTH, None), LENGTH, cache)
    square[..., start:, :start] = False
    call(model, tokens, cache, square)
    cache.crop(-crop)
    mask = mask_without(left + 1, None)
    if left > start:
        with pytest.raises(ValueError, match="attention_mask: it masks"):
            call(model, tokens[:, : left + 1], copy.deepcopy(cache), mask)
        mask[0, :start] = 0
    first = start if left > start else 0
    logits = call(model, tokens[:, : left + 1], cache, mask)
    alone = tokens[:, first : left + 1]
    positions = torch.arange(first, left + 1)[None]
    expected = model(alone, position_ids=positions, use_cache=False).logits[:, -1]
    torch.testing.assert_close(logits[:, 0], expected, **rounding())


def operations_of_a_mask(model: PeftModel, tokens: torch.Tensor, mask: torch.Tensor) -> int:
    """How many more operations a decoded token takes with a mask than without."""
    operations = []
    for with_mask in (True, False):
        cache = make_cache(model, "dynamic")
        for start, end in ((0, LENGTH), (LENGTH, LENGTH + 1), (LENGTH + 1, LENGTH + 2)):
            given = {"attention_mask": mask[:, :end]} if with_mask else {}
            positions = torch.arange(start, end).unsqueeze(0)
            with OperationCounter() as counter:
                model(tokens[:, start:end], position_ids=positions, past_key_values=cache, **given)
        operations.append(counter.operations)
    return operations[0] - operations[1]


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_a_mask_that_grows_by_ones_costs_two_operations_a_token(batch: int) -> None:
    """However many side paths there are: one comparison tells all of them that nothing is masked anew."""
    model, tokens = make_model("qwen3", make_config(talan_layers="all")), make_tokens(batch, tokens=LENGTH + 2)
    mask = torch.ones(batch, LENGTH + 2, dtype=torch.long)
    mask[0, :2] = 0
    # The base model makes a mask of its own of what it is given.
    with model.disable_adapter():
        own = operations_of_a_mask(model, tokens, mask)
    assert operations_of_a_mask(model, tokens, mask) == own + 2
