"""A mask that says something else about earlier tokens than the mask they were read with: right, or refused."""

from __future__ import annotations

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
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("after", [1, 2])
def test_no_mask_after_masked_tokens_is_refused(after: int, cache_kind: str) -> None:
    model = make_model("qwen3")
    tokens, cache = make_tokens(batch=1, tokens=LENGTH + after), make_cache(model, cache_kind)
    call(model, tokens[:, :LENGTH], cache, mask_without(LENGTH, 0))
    with pytest.raises(ValueError, match="attention_mask=None"):
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
