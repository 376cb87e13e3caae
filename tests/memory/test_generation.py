"""Invariant 3: with a cache the model computes what it computes without one, in every generation mode."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from peft_talan import TalanConfig

from ..small_models import (
    ARCHITECTURES,
    CONFIGS,
    make_base,
    make_config,
    make_lora_config,
    make_model,
    make_several,
    make_tokens,
    rounding,
)

NEW_TOKENS = 12
OF_EVERY_CACHE = ("qwen3", "gemma3")
"""Whole layers of keys alone, and mixed with sliding windows: what generation does to a cache is the same for all that
have one of these. What an architecture calls its blocks with is seen with one mode, which changes the rows, and with
one split, which has every kind of piece."""

MODES: dict[str, dict[str, object]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 3, "top_k": 0},
    "several returned": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 5},
}
WITH_CACHE_ONLY: dict[str, dict[str, object]] = {
    "static": {"cache_implementation": "static"},
    "prefill of 1": {"prefill_chunk_size": 1},
}


def left_padded(tokens: torch.Tensor, padding: int) -> dict[str, torch.Tensor]:
    """Two rows of unequal lengths: the first begins with padding."""
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(
    model: PeftModel, inputs: dict[str, torch.Tensor], **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the logits that they were chosen by."""
    torch.manual_seed(5)
    output = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True, **options
    )
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize(
    ("architecture_", "mode"),
    [
        *((architecture, "beams") for architecture in ARCHITECTURES),
        *((architecture, mode) for architecture in OF_EVERY_CACHE for mode in MODES if mode != "beams"),
    ],
)
def test_cached_generation_equals_uncached(architecture_: str, mode: str) -> None:
    model = make_model(architecture_)
    inputs = left_padded(make_tokens(), padding=7)
    options = dict(MODES[mode])
    tokens, logits = generate(model, inputs, use_cache=True, **options)
    options.pop("prefill_chunk_size", None)
    expected_tokens, expected_logits = generate(model, inputs, use_cache=False, **options)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, **rounding())


@pytest.mark.parametrize("mode", WITH_CACHE_ONLY)
def test_other_caches_equal_the_uncached_pass(architecture: str, mode: str) -> None:
    model = make_model(architecture)
    inputs = left_padded(make_tokens(), padding=7)
    tokens, logits = generate(model, inputs, do_sample=False, **WITH_CACHE_ONLY[mode])
    expected_tokens, expected_logits = generate(model, inputs, do_sample=False, use_cache=False)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, **rounding())


def test_beams_with_a_static_cache() -> None:
    model = make_model("qwen3")
    inputs = left_padded(make_tokens(), padding=7)
    options = {"do_sample": False, "num_beams": 3}
    tokens, logits = generate(model, inputs, cache_implementation="static", **options)
    expected_tokens, expected_logits = generate(model, inputs, use_cache=False, **options)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, **rounding())


@torch.no_grad()
def test_a_cache_looks_as_without_the_memories_that_it_carries() -> None:
    model = make_model("qwen3")
    for make in (DynamicCache, StaticCache):
        config = model.get_base_model().config
        caches = [make(config=config, **({"max_cache_len": 40} if make is StaticCache else {})) for _ in range(2)]
        model(make_tokens(), past_key_values=caches[0], use_cache=True)
        make_base("qwen3")(make_tokens(), past_key_values=caches[1], use_cache=True)
        ours, plain = caches
        for name in ("is_compileable", "is_initialized", "is_croppable", "is_sliding", "batch_size"):
            assert getattr(ours, name) == getattr(plain, name)
        assert ours.get_seq_length() == plain.get_seq_length()
        assert ours.get_max_length() == plain.get_max_length()
        assert len(ours) == len(plain)
        assert [type(layer) for layer in ours.layers] == [type(layer) for layer in plain.layers]
        assert [layer.keys.shape for layer in ours.layers] == [layer.keys.shape for layer in plain.layers]


@torch.no_grad()
def test_a_cache_may_leave_inference_mode() -> None:
    model = make_model("qwen3")
    tokens = make_tokens(batch=1, tokens=12)
    expected = model(tokens, use_cache=False).logits
    cache = DynamicCache(config=model.get_base_model().config)
    with torch.inference_mode():
        for part in tokens[:, :9].split([7, 1, 1], dim=1):
            model(part, past_key_values=cache, use_cache=True)
    for index in (9, 10, 11):
        logits = model(tokens[:, index : index + 1], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits[:, 0], expected[:, index], **rounding())


def test_gradients_flow_through_a_cache() -> None:
    model = make_model("qwen3")
    tokens, found = make_tokens(batch=1, tokens=12), []
    for pieces in ([12], [9, 1, 1, 1]):
        cache = DynamicCache(config=model.get_base_model().config)
        logits = [model(p, past_key_values=cache, use_cache=True).logits for p in tokens.split(pieces, dim=1)]
        torch.cat(logits, dim=1).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert any(".talan." in name for name in found[0])
    for name, expected in found[0].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[1][name], expected, rtol=rounding()["rtol"], atol=rounding()["atol"] * scale)


@pytest.mark.parametrize("mixer", ["attention", "linear", "mlp", "delta"])
@pytest.mark.parametrize(
    ("writeback", "position"),
    # A block's input and its output go through the same functions.
    [
        *((writeback, "output") for writeback in ("add", "gated", "capped", "orthogonal", "relative")),
        ("gated", "input"),
    ],
)
def test_every_axis_generates_with_the_cache(mixer: str, writeback: str, position: str) -> None:
    config = make_config(
        talan_mixer=mixer, talan_writeback=writeback, talan_position=position, talan_layers=[0, -1], talan_alpha=0.7
    )
    model = make_model("qwen3", config)
    inputs = left_padded(make_tokens(), padding=7)
    tokens, logits = generate(model, inputs, do_sample=False)
    expected_tokens, expected_logits = generate(model, inputs, do_sample=False, use_cache=False)
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, **rounding())


@pytest.mark.parametrize("architecture_", OF_EVERY_CACHE)
def test_prompt_lookup_crops_the_memory_with_the_cache(architecture_: str) -> None:
    model = make_model(architecture_)
    tokens = make_tokens(batch=1)
    # Repetitions give the lookup candidates to propose; random weights reject most, so every step crops.
    inputs = {"input_ids": torch.cat([tokens, tokens, tokens[:, :5]], dim=1)}
    torch.manual_seed(5)
    assisted = model.generate(**inputs, max_new_tokens=2 * NEW_TOKENS, do_sample=False, prompt_lookup_num_tokens=4)
    expected = model.generate(**inputs, max_new_tokens=2 * NEW_TOKENS, do_sample=False, use_cache=False)
    assert torch.equal(assisted, expected)


def test_assisted_generation_with_a_draft_model() -> None:
    model, draft = make_model("qwen3"), make_base("qwen3")
    tokens = make_tokens(batch=1)
    assisted = model.generate(input_ids=tokens, max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=draft)
    expected = model.generate(input_ids=tokens, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=False)
    assert torch.equal(assisted, expected)


EVERY_PIECE = (2, 1, 1, 17)
SPLITS = ((20, 1), (1, 20), (7, 7, 7), (1,) * 21)
CACHE_KINDS = ("dynamic", "without config", "static")


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture_", "cache_kind", "pieces"),
    [
        (architecture, cache_kind, pieces)
        for architecture in ARCHITECTURES
        for cache_kind in CACHE_KINDS
        for pieces in (EVERY_PIECE, *(SPLITS if architecture in OF_EVERY_CACHE else ()))
        # A sliding window needs a cache that is made from the model's config.
        if cache_kind != "without config" or architecture not in ("mistral", "gemma3")
    ],
)
def test_any_split_of_the_prompt(architecture_: str, cache_kind: str, pieces: tuple[int, ...]) -> None:
    model = make_model(architecture_)
    inputs = left_padded(make_tokens(), padding=3)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    config = model.get_base_model().config
    cache = {
        "dynamic": lambda: DynamicCache(config=config),
        "without config": lambda: DynamicCache(),
        "static": lambda: StaticCache(config=config, max_cache_len=40),
    }[cache_kind]()
    logits, seen = [], 0
    for piece in pieces:
        end = seen + piece
        output = model(
            tokens[:, seen:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, seen:end],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(output.logits)
        seen = end
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], expected[real], **rounding())


def test_several_turns_on_one_cache(architecture: str) -> None:
    model = make_model(architecture)
    cache = DynamicCache(config=model.get_base_model().config)
    conversation = make_tokens(batch=1, tokens=9)
    for turn in range(3):
        conversation = model.generate(input_ids=conversation, past_key_values=cache, max_new_tokens=5, do_sample=False)
        expected = model.generate(input_ids=conversation[:, :-5], max_new_tokens=5, do_sample=False, use_cache=False)
        assert torch.equal(conversation, expected), f"turn {turn}"
        conversation = torch.cat([conversation, make_tokens(batch=1, tokens=4, seed=turn)], dim=1)


@torch.no_grad()
def test_crop_at_any_point_and_go_on() -> None:
    model = make_model("qwen3")
    tokens = make_tokens(tokens=150)
    expected = model(tokens, use_cache=False).logits
    filled = DynamicCache(config=model.get_base_model().config)
    model(tokens[:, :50], past_key_values=filled, use_cache=True)
    for index in range(50, 140):
        model(tokens[:, index : index + 1], past_key_values=filled, use_cache=True)
    for crop in (1, 10, 64, 100, 120, 139):
        cache = copy.deepcopy(filled)
        cache.crop(-crop)
        rest = model(tokens[:, 140 - crop :], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(rest, expected[:, 140 - crop :], **rounding())


@torch.no_grad()
def test_rows_change_and_a_crop_goes_back_before_it() -> None:
    model = make_model("qwen3")
    tokens = make_tokens(batch=2, tokens=30)
    cache = DynamicCache(config=model.get_base_model().config)
    model(tokens[:, :20], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(2)
    rows = tokens.repeat_interleave(2, dim=0)
    model(rows[:, 20:25], past_key_values=cache, use_cache=True)
    order = torch.tensor([3, 0, 0, 2])
    cache.reorder_cache(order)
    rows = rows[order]
    keep = torch.tensor([0, 1, 3])
    cache.batch_select_indices(keep)
    rows = rows[keep]
    for crop in (0, 3, 8):
        fresh = copy.deepcopy(cache)
        fresh.crop(-crop)
        rest = model(rows[:, 25 - crop :], past_key_values=fresh, use_cache=True).logits
        expected = model(rows, use_cache=False).logits[:, 25 - crop :]
        torch.testing.assert_close(rest, expected, **rounding())


@torch.no_grad()
@pytest.mark.parametrize("change", ["repeat", "select"])
def test_rows_change_where_an_adapter_s_memory_is_empty(change: str) -> None:
    model = make_several({"one": {}, "two": {}})
    tokens = make_tokens(batch=2, tokens=12)
    cache = DynamicCache(config=model.get_base_model().config)
    model.set_adapter("one")
    model(tokens[:, :6], past_key_values=cache, use_cache=True)
    cache.crop(-6)
    model.set_adapter("two")
    model(tokens[:, :8], past_key_values=cache, use_cache=True)
    if change == "repeat":
        cache.batch_repeat_interleave(2)
        rows = tokens.repeat_interleave(2, dim=0)
    else:
        cache.batch_select_indices(torch.tensor([True, False]))
        rows = tokens[:1]
    rest = model(rows[:, 8:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, model(rows, use_cache=False).logits[:, 8:], **rounding())


@torch.no_grad()
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_carries_its_own_memory(copier: object) -> None:
    model = make_model("qwen3")
    tokens = make_tokens(tokens=20)
    expected = model(tokens, use_cache=False).logits[:, 10:]
    cache = DynamicCache(config=model.get_base_model().config)
    for part in tokens[:, :13].split([9, 1, 1, 1, 1], dim=1):
        model(part, past_key_values=cache, use_cache=True)
    twin = copier(cache)
    for one in (cache, twin):
        one.crop(-3)
        torch.testing.assert_close(
            model(tokens[:, 10:], past_key_values=one, use_cache=True).logits, expected, **rounding()
        )


@torch.no_grad()
def test_keys_that_are_offloaded_between_calls_leave_the_memory_alone() -> None:
    """`cache_implementation="offloaded"` needs CUDA streams, also without us; this is what it does to a layer."""
    model = make_model("qwen3")
    tokens = make_tokens(tokens=20)
    cache = DynamicCache(config=model.get_base_model().config)
    for index, part in enumerate(tokens.split(4, dim=1)):
        logits = model(part, past_key_values=cache, use_cache=True).logits
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        expected = model(tokens[:, : 4 * index + 4], use_cache=False).logits[:, -4:]
        torch.testing.assert_close(logits, expected, **rounding())


@torch.no_grad()
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
def test_a_reset_cache_starts_again(cache_kind: str) -> None:
    model = make_model("qwen3")
    config = model.get_base_model().config
    cache = DynamicCache(config=config) if cache_kind == "dynamic" else StaticCache(config=config, max_cache_len=40)
    for seed in (1, 2):
        tokens = make_tokens(seed=seed)
        for part in tokens.split([13, 8], dim=1):
            logits = model(part, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits, model(tokens, use_cache=False).logits[:, 13:], **rounding())
        cache.reset()


@torch.no_grad()
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("filled_by", ["disabled adapter", "another adapter", "another model"])
def test_a_cache_that_was_filled_otherwise_is_refused(filled_by: str, cache_kind: str) -> None:
    model = make_model("qwen3")
    model.add_adapter("other", make_config())
    model.to(torch.float64)
    config = model.get_base_model().config
    cache = DynamicCache(config=config) if cache_kind == "dynamic" else StaticCache(config=config, max_cache_len=40)
    tokens = make_tokens()
    if filled_by == "disabled adapter":
        with model.disable_adapter():
            model(tokens, past_key_values=cache, use_cache=True)
    elif filled_by == "another adapter":
        model.set_adapter("other")
        model(tokens, past_key_values=cache, use_cache=True)
        model.set_adapter("default")
    else:
        make_base("qwen3")(tokens, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"'default'.*empty cache"):
        model(tokens[:, :1], past_key_values=cache, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
def test_a_cache_that_went_on_without_the_side_path_is_refused(cache_kind: str) -> None:
    model = make_model("qwen3")
    config = model.get_base_model().config
    cache = DynamicCache(config=config) if cache_kind == "dynamic" else StaticCache(config=config, max_cache_len=40)
    tokens = make_tokens()
    model(tokens, past_key_values=cache, use_cache=True)
    with model.disable_adapter():
        model(tokens[:, :2], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="empty cache"):
        model(tokens[:, :1], past_key_values=cache, use_cache=True)


def test_bidirectional_memory_is_refused_in_generation() -> None:
    model = make_model("qwen3", make_config(talan_memory_scope="bidirectional", task_type="FEATURE_EXTRACTION"))
    with pytest.raises(ValueError, match="talan_memory_scope='bidirectional'"):
        model.base_model.generate(input_ids=make_tokens(), max_new_tokens=2)
    cache = DynamicCache(config=model.get_base_model().config)
    with torch.no_grad():
        model.get_base_model()(make_tokens(), past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="bidirectional"):
            model.get_base_model()(make_tokens(tokens=1), past_key_values=cache, use_cache=True)


def test_two_threads_do_not_touch_each_other() -> None:
    model = make_model("qwen3")
    prompts = [make_tokens(batch=1, tokens=15, seed=seed) for seed in range(4)]
    expected = [model.generate(input_ids=p, max_new_tokens=NEW_TOKENS, do_sample=False) for p in prompts]
    results: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        results[index] = model.generate(input_ids=prompts[index], max_new_tokens=NEW_TOKENS, do_sample=False)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, tokens in enumerate(expected):
        assert torch.equal(results[index], tokens)


@torch.no_grad()
def test_interleaved_generations_do_not_touch_each_other() -> None:
    model = make_model("qwen3")
    rows = make_tokens(batch=2, tokens=20)
    expected = model(rows, use_cache=False).logits
    caches = [DynamicCache(config=model.get_base_model().config) for _ in rows]
    for index in range(20):
        for row, cache in enumerate(caches):
            logits = model(rows[row : row + 1, index : index + 1], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(logits[:, 0], expected[row : row + 1, index], **rounding())


class OperationCounter(TorchDispatchMode):
    """Counts dispatched operations and the numbers that they produce."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.numbers = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        output = func(*args, **(kwargs or {}))
        self.operations += 1
        self.numbers += sum(leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
        return output


@torch.no_grad()
def test_decoding_costs_no_more_at_a_longer_context_because_of_us() -> None:
    """Beside LoRA, whose attention grows with the context, the extra work a token stays the same."""
    tokens = make_tokens(batch=1, tokens=200)
    extra = []
    for start in (20, 180):
        costs = []
        for config in (make_config(), make_lora_config()):
            model = make_model("qwen3", config)
            cache = DynamicCache(config=model.get_base_model().config)
            model(tokens[:, :start], past_key_values=cache, use_cache=True)
            with OperationCounter() as counter:
                for index in range(start, start + 10):
                    model(tokens[:, index : index + 1], past_key_values=cache, use_cache=True)
            costs.append((counter.operations, counter.numbers))
        extra.append((costs[0][0] - costs[1][0], costs[0][1] - costs[1][1]))
    assert extra[0] == extra[1]
    assert extra[0][0] > 0


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_a_decoded_token_takes_hardly_more_operations_than_with_lora(batch: int) -> None:
    """At the depth of Llama-3.2-1B and with the default axes; widths do not change the number."""
    base = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "num_hidden_layers": 16})
    low_rank = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    tokens, operations = make_tokens(batch), []
    for config in (LoraConfig(**low_rank), TalanConfig(**low_rank)):
        model = get_peft_model(AutoModelForCausalLM.from_config(base), config).eval()
        cache = DynamicCache(config=base)
        for part in tokens.split([18, 1, 1, 1], dim=1):
            with OperationCounter() as counter:
                model(part, past_key_values=cache, use_cache=True)
        operations.append(counter.operations)
    assert operations[0] < operations[1] <= 1.008 * operations[0]
