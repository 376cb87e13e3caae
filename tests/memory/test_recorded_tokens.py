"""How many bytes a cache carries for the memories, and what can be taken out of them again."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from transformers import DynamicCache

from peft_talan.memory.recent_tokens import RECORDED_TOKENS

from ..small_models import make_config, make_lora_config, make_model, make_tokens, rounding

PIECE = 500


def make_cache(model: PeftModel) -> DynamicCache:
    return DynamicCache(config=model.get_base_model().config)


def pickled_bytes(cache: DynamicCache) -> int:
    return len(pickle.dumps(cache))


@torch.no_grad()
def bytes_of_caches(model: PeftModel, lengths: tuple[int, ...], decoded: int = 0) -> list[int]:
    """The size of one cache as it grows to each length, where the last tokens of each come one by one."""
    cache, sizes, past = make_cache(model), [], 0
    for length in lengths:
        while past < length:
            piece = min(PIECE, length - decoded - past) if past < length - decoded else 1
            model(make_tokens(batch=1, tokens=piece), past_key_values=cache, use_cache=True, logits_to_keep=1)
            past += piece
        sizes.append(pickled_bytes(cache))
    return sizes


@pytest.mark.parametrize("decoded", [0, 70])
def test_with_a_window_the_default_cache_has_the_same_bytes_at_any_length(decoded: int) -> None:
    model = make_model("mistral", make_config(talan_layers="all"))
    sizes = bytes_of_caches(model, (1_000, 2_000, 30_000), decoded)
    # A pickled length takes a byte or two more per layer when it is larger.
    assert max(sizes) - min(sizes) <= 4 * len(model.get_base_model().model.layers) * 2


def test_on_full_attention_nothing_grows_beyond_keys_and_values() -> None:
    lengths, beyond = (1_000, 1_500, 3_000), []
    talan, lora = (
        bytes_of_caches(make_model("qwen3", config), lengths)
        for config in (make_config(talan_layers="all"), make_lora_config())
    )
    beyond = [ours - plain for ours, plain in zip(talan, lora, strict=True)]
    assert beyond[0] > 0
    assert max(beyond) - min(beyond) <= 64


@torch.no_grad()
@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("mixer", ["attention", "delta"])
def test_a_crop_goes_back_as_far_as_tokens_are_recorded(recording: bool, mixer: str) -> None:
    model = make_model("qwen3", make_config(talan_mixer=mixer))
    tokens = make_tokens(batch=1, tokens=RECORDED_TOKENS + 100)
    cache = make_cache(model)
    if recording:
        cache.activate_past_recording()
    for part in tokens.split([RECORDED_TOKENS - 20, 50, 1, 1, 68], dim=1):
        model(part, past_key_values=cache, use_cache=True)
    expected = model(tokens, use_cache=False).logits
    for crop in (1, 90, RECORDED_TOKENS):
        fresh = copy.deepcopy(cache)
        fresh.crop(-crop)
        logits = model(tokens[:, -crop:], past_key_values=fresh, use_cache=True).logits
        torch.testing.assert_close(logits, expected[:, -crop:], **rounding())
    further = RECORDED_TOKENS + 1
    if recording:
        cache.crop(-further)
        logits = model(tokens[:, -further:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits, expected[:, -further:], **rounding())
        return
    length = cache.get_seq_length()
    with pytest.raises(ValueError, match=rf"tokens={further}: .*last {RECORDED_TOKENS}.*activate_past_recording"):
        cache.crop(-further)
    assert cache.get_seq_length() == length
    logits = model(tokens[:, :1], past_key_values=cache, use_cache=True).logits
    whole = torch.cat([tokens, tokens[:, :1]], dim=1)
    torch.testing.assert_close(logits[:, 0], model(whole, use_cache=False).logits[:, -1], **rounding())


@torch.no_grad()
@pytest.mark.parametrize("recording", [False, True])
def test_a_crop_with_a_window_asks_for_recording(recording: bool) -> None:
    model = make_model("mistral")
    tokens, cache = make_tokens(batch=1, tokens=60), make_cache(model)
    model(tokens[:, :40], past_key_values=cache, use_cache=True)
    if recording:
        cache.activate_past_recording()
    for part in tokens[:, 40:].split([1, 1, 18], dim=1):
        model(part, past_key_values=cache, use_cache=True)
    if not recording:
        with pytest.raises(ValueError, match="activate_past_recording"):
            cache.crop(-5)
        assert cache.get_seq_length() == 60
        return
    cache.crop(-5)
    logits = model(tokens[:, 55:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, model(tokens, use_cache=False).logits[:, 55:], **rounding())


@torch.no_grad()
@pytest.mark.parametrize("architecture_", ["qwen3", "mistral"])
@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("mixer", ["attention", "delta"])
def test_a_later_mask_reaches_back_as_far_as_tokens_are_recorded(
    architecture_: str, recording: bool, mixer: str
) -> None:
    model = make_model(architecture_, make_config(talan_mixer=mixer))
    length = RECORDED_TOKENS + 30
    tokens, cache = make_tokens(batch=2, tokens=length + 4), make_cache(model)
    if recording:
        cache.activate_past_recording()
    for part in tokens[:, :length].split([20, length - 20], dim=1):
        end = cache.get_seq_length() + part.shape[1]
        model(part, attention_mask=torch.ones(2, end), past_key_values=cache, use_cache=True)
    mask = torch.ones(2, length + 4, dtype=torch.long)
    mask[1, 10:length] = 0
    positions = (mask.cumsum(-1) - 1)[:, length:]
    call = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
    if not recording:
        with pytest.raises(ValueError, match=r"attention_mask: it masks earlier tokens.*activate_past_recording"):
            model(tokens[:, length:], **call)
        return
    logits = model(tokens[:, length:], **call).logits
    torch.testing.assert_close(logits[0], model(tokens[:1], use_cache=False).logits[0, length:], **rounding())
    if architecture_ == "qwen3":
        # With a window, attention itself does not see the ten tokens.
        real = tokens[1:, mask[1].bool()]
        torch.testing.assert_close(logits[1], model(real, use_cache=False).logits[0, -4:], **rounding())


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["attention", "delta"])
def test_beams_and_selections_keep_what_is_recorded(mixer: str) -> None:
    model = make_model("qwen3", make_config(talan_mixer=mixer))
    tokens, cache = make_tokens(batch=2, tokens=RECORDED_TOKENS + 40), make_cache(model)
    model(tokens[:, :-20], past_key_values=cache, use_cache=True)
    cache.batch_select_indices(torch.tensor([0, 1]))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    rows = tokens[torch.tensor([1, 1, 0, 0])]
    model(rows[:, -20:], past_key_values=cache, use_cache=True)
    cache.reorder_cache(torch.tensor([0, 2, 3, 1]))
    rows = rows[torch.tensor([0, 2, 3, 1])]
    cache.crop(-30)
    logits = model(rows[:, -30:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, model(rows, use_cache=False).logits[:, -30:], **rounding())


def decorated(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def wrapper(*args: object, **kwargs: object) -> None:
        method(*args, **kwargs)

    return wrapper


class OwnCache(DynamicCache):
    """A cache with methods of its own, which do not call those of `Cache`."""

    @decorated
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for layer in self.layers:
            layer.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self.layers:
            layer.crop(tokens_to_remove)


@torch.no_grad()
def test_memories_follow_the_methods_of_a_class_of_the_users_own() -> None:
    model = make_model("qwen3")
    tokens, cache = make_tokens(batch=2, tokens=30), OwnCache(config=model.get_base_model().config)
    model(tokens[:, :20], past_key_values=cache, use_cache=True)
    order = torch.tensor([1, 0])
    cache.reorder_cache(order)
    cache.crop(-5)
    logits = model(tokens[order][:, 15:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, model(tokens[order], use_cache=False).logits[:, 15:], **rounding())
