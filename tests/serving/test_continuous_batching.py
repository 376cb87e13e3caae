"""Answers of transformers' continuous batching equal those of `generate`, whatever the server does with its pages."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

from peft_talan import set_talan_strength
from peft_talan.serving.paged_cache import page_pools
from peft_talan.serving.pages import PagePools
from tests.small_models import VOCABULARY, make_config, make_model, make_several

NEW_TOKENS = 9
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
LIKELIEST = {"do_sample": True, "top_k": 1}
PAGES = {"page_size": 8, "num_blocks": 64, "max_batch_tokens": 16}


def make_prompts() -> list[list[int]]:
    """Longer and shorter than pages and batches; two begin with the same tokens, more than a page of them."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in (19, 1, 8, 37, 5)]
    return [*drawn, drawn[0] + drawn[4], drawn[3][:17] + drawn[1]]


PROMPTS = make_prompts()


def expected_answers(model: Any, prompts: Sequence[list[int]] = PROMPTS) -> list[list[int]]:
    """What `generate` answers to each prompt."""
    outputs = [model.generate(input_ids=torch.tensor([prompt]), eos_token_id=None, **GREEDY) for prompt in prompts]
    return [output[0, len(prompt) :].tolist() for prompt, output in zip(prompts, outputs, strict=True)]


def answers(model: Any, prompts: Sequence[list[int]] = PROMPTS, forks: int = 1, **options: Any) -> list[list[int]]:
    """What continuous batching answers; the manager is kept where `options` say so."""
    kept = options.pop("persistent_manager", False)
    outputs = model.generate_batch(
        list(prompts),
        # Greedy search gives one sequence; the likeliest of one token is the same.
        generation_config=GenerationConfig(
            eos_token_id=-1, num_return_sequences=forks, **(GREEDY if forks == 1 else {**GREEDY, **LIKELIEST})
        ),
        continuous_batching_config=ContinuousBatchingConfig(**{**PAGES, **options}),
        persistent_manager=kept,
    )
    assert [output.error for output in outputs.values()] == [None] * len(prompts) * forks
    return [output.generated_tokens for output in outputs.values()]


def make_manager(model: Any, **options: Any) -> ContinuousBatchingManager:
    config = ContinuousBatchingConfig(**{**PAGES, **options})
    return model.init_continuous_batching(GenerationConfig(eos_token_id=-1, **GREEDY), config)


def collect(manager: ContinuousBatchingManager) -> dict[str, list[int]]:
    """The answers to as many requests as there are prompts."""
    found: dict[str, list[int]] = {}
    while len(found) < len(PROMPTS):
        output = manager.get_result(timeout=1)
        if output is not None and output.is_finished():
            assert output.error is None
            found[output.request_id] = output.generated_tokens
    return found


@pytest.mark.parametrize(
    ("architecture", "attention", "axes", "pages"),
    [
        ("qwen3", "sdpa", {}, {}),
        ("qwen3", "sdpa", {"talan_mixer": "delta"}, {"max_batch_tokens": 33}),
        (
            "gemma3",
            "eager",
            {"talan_mixer": "mlp", "talan_writeback": "gated"},
            {"page_size": 16, "max_batch_tokens": 33, "allow_block_sharing": False},
        ),
        (
            "llama",
            "sdpa",
            {
                "talan_position": "input",
                "talan_mixer": "linear",
                "talan_writeback": "orthogonal",
                "talan_soft_cap": 10.0,
            },
            {"page_size": 32, "max_batch_tokens": 256},
        ),
    ],
)
def test_answers_equal_those_of_generate(
    architecture: str, attention: str, axes: dict[str, Any], pages: dict[str, Any]
) -> None:
    model = make_model(architecture, make_config(**axes), attention=attention)
    expected = expected_answers(model)
    assert answers(model, **pages) == expected
    set_talan_strength(model, 0.0)
    assert expected_answers(model) != expected  # else nothing was tested


def test_answers_from_a_warm_prefix_cache_equal_those_of_generate() -> None:
    model = make_model("qwen3")
    expected = expected_answers(model)
    try:
        for _ in range(2):
            assert answers(model, persistent_manager=True) == expected
        longer = [prompt + answer[:4] for prompt, answer in zip(PROMPTS, expected, strict=True)]
        assert answers(model, longer, persistent_manager=True) == expected_answers(model, longer)
    finally:
        model.destroy_cached_continuous_batching_manager()


@pytest.mark.parametrize(("architecture", "sharing"), [("llama", True), ("llama", False), ("gemma3", True)])
def test_forks_of_a_request_equal_generate(architecture: str, sharing: bool) -> None:
    model = make_model(architecture)
    expected = [answer for answer in expected_answers(model) for _ in range(3)]
    assert answers(model, forks=3, allow_block_sharing=sharing) == expected


def test_requests_that_are_preempted_are_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    preempted: list[str] = []
    offload = OffloadingManager.offload_requests

    def note(self: OffloadingManager, *args: Any, **kwargs: Any) -> Any:
        preempted.append("")
        return offload(self, *args, **kwargs)

    monkeypatch.setattr(OffloadingManager, "offload_requests", note)
    model = make_model("qwen3")
    assert answers(model, num_blocks=9, max_batch_tokens=64) == expected_answers(model)
    assert preempted


def test_padding_of_the_calls_changes_nothing() -> None:
    """With CUDA graphs or compilation, calls have sizes of a few kinds; here the sizes alone."""
    model = make_model("qwen3")
    manager = make_manager(model, q_padding_interval_size=8, kv_padding_interval_size=16)
    manager.warmup()
    manager.batch_processor.model_runner.pad_inputs = True
    manager.start()
    names = manager.add_requests(PROMPTS)
    found = collect(manager)
    manager.stop()
    manager.destroy()
    assert [found[name] for name in names] == expected_answers(model)


def test_several_active_adapters_add_up() -> None:
    model = make_several({"one": {}, "other": {"talan_slots": 2, "talan_position": "input", "talan_layers": [1, 2]}})
    model.base_model.set_adapter(["one", "other"])
    assert answers(model) == expected_answers(model)


def test_a_kept_side_path_answers_as_the_adapter() -> None:
    model = make_model("qwen3")
    expected = expected_answers(model)
    assert answers(model.merge_and_unload()) == expected


def test_a_disabled_adapter_answers_as_the_base_model() -> None:
    model = make_model("qwen3")
    with model.disable_adapter():
        expected = expected_answers(model)
        assert answers(model, cpu_offload_space=0.0) == expected
    assert expected_answers(model) != expected


def test_a_neighbour_changes_no_answer() -> None:
    model = make_model("qwen3")
    alone = answers(model, PROMPTS[:1])
    assert answers(model, [PROMPTS[0], PROMPTS[3]])[:1] == alone
    assert answers(model, [PROMPTS[0], PROMPTS[2], PROMPTS[2]])[:1] == alone


def test_two_managers_of_one_model_stay_apart_and_free_their_memory() -> None:
    model = make_model("llama")
    expected = expected_answers(model)
    managers = [make_manager(model), make_manager(model)]
    for manager in managers:
        manager.start()
    # Both run their requests at once, each in a thread of its own.
    names = [managers[0].add_requests(PROMPTS), managers[1].add_requests(PROMPTS[::-1])]
    found = [collect(manager) for manager in managers]
    memories = [weakref.ref(page_pools(manager.batch_processor.cache)) for manager in managers]
    assert all(isinstance(memory(), PagePools) and memory().pools for memory in memories)
    while managers:
        manager = managers.pop()
        manager.stop()
        manager.destroy()
    del manager
    gc.collect()
    assert [memory() for memory in memories] == [None, None]
    assert [found[0][name] for name in names[0]] == expected
    assert [found[1][name] for name in names[1]] == expected[::-1]
