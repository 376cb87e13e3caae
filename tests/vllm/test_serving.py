"""vLLM serves a folder with an embedded side path and gives the tokens of `generate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from . import engines
from .adapters import Family

pytest.importorskip("vllm", reason="vLLM is installed in an environment of its own: make test-vllm")

KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gemma3": {"talan_position": "input", "talan_mixer": "mlp", "talan_writeback": "gated"},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "eager, 64 tokens a step": {"enforce_eager": True, "max_num_batched_tokens": 64},
    "eager, 24 pages": {"enforce_eager": True, "num_gpu_blocks_override": 24},
    "compiled": {},
}
SHARD = "100KB"
"""Weights of several files, with an index."""
OTHERS: dict[str, dict[str, Any]] = {
    "qwen2": {"talan_position": "input", "talan_mixer": "linear", "shard": SHARD},
    "qwen3_moe": {"talan_writeback": "capped"},
    "llama": {"talan_writeback": "orthogonal", "talan_layers": [0, 2]},
    "mistral": {"talan_position": "input", "talan_layers": [0]},
    "cohere": {"talan_mixer": "delta"},
    "gpt2": {"talan_mixer": "mlp", "talan_soft_cap": 10.0},
}


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return engines.make_prompts()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]]) -> Callable[..., Any]:
    """Folders by architecture and options, each with the answers of `generate`."""
    known: dict[str, tuple[Path, list[list[int]]]] = {}

    def save(architecture: str, **options: Any) -> tuple[Path, list[list[int]]]:
        key = json.dumps([architecture, options])
        if key not in known:
            folder = tmp_path_factory.mktemp(architecture)
            engines.save_model(folder, architecture, **options)
            answers = engines.generate(folder, prompts)
            # Else an engine without the side path would do as well.
            if options.get("merged", True):
                without = engines.generate(folder, prompts, strength=0.0)
                assert sum(one != other for one, other in zip(answers, without, strict=True)) >= 6
            known[key] = folder, answers
        return known[key]

    return save


def check(folder: Path, prompts: list[list[int]], expected: list[list[int]], **options: Any) -> int:
    """Two passes, the second with a warm prefix cache; gives how often a request was preempted."""
    with engines.engine(folder, **options) as served:
        answers, _ = engines.ask(served, prompts)
        assert answers == expected
        answers, cached = engines.ask(served, prompts)
        assert answers == expected
        assert sum(cached) >= engines.PAGE * len(prompts) // 2
        return engines.preemptions(served)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("architecture", KINDS)
def test_answers_are_those_of_generate(
    architecture: str, setting: str, saved: Callable[..., Any], prompts: list[list[int]]
) -> None:
    folder, expected = saved(architecture, **KINDS[architecture])
    preempted = check(folder, prompts, expected, **SETTINGS[setting])
    assert (preempted > 0) == ("24 pages" in setting)


def test_compiled_graphs_are_kept_apart(saved: Callable[..., Any], prompts: list[list[int]]) -> None:
    """Without a side path, and with another one than elsewhere: the cache on the disk tells the graphs apart."""
    for options in ({"merged": False}, {"talan_layers": [2]}):
        folder, expected = saved("qwen3", **options)
        check(folder, prompts, expected)


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_architectures(architecture: str, saved: Callable[..., Any], prompts: list[list[int]]) -> None:
    folder, expected = saved(architecture, **OTHERS[architecture])
    check(folder, prompts, expected, enforce_eager=True)


def test_transformers_backend(saved: Callable[..., Any], prompts: list[list[int]]) -> None:
    # Made first, and of a type of its own: vLLM changes the class of transformers, which no other test of this process
    # could build afterwards.
    models = [saved("olmo2", talan_position=position) for position in ("input", "output")]
    for folder, expected in models:
        check(folder, prompts, expected, enforce_eager=True, model_impl="transformers")


def test_requests_one_by_one_are_those_side_by_side(saved: Callable[..., Any], prompts: list[list[int]]) -> None:
    """No request sees another's memory: not in its batch, and not in the pages that it left."""
    folder, expected = saved("qwen3")
    with engines.engine(folder, enforce_eager=True, num_gpu_blocks_override=10) as served:
        for prompt, answer in [*zip(prompts, expected, strict=True)][::-1]:
            assert engines.ask(served, [prompt])[0] == [answer]


def test_reloaded_weights(saved: Callable[..., Any], prompts: list[list[int]], tmp_path: Path) -> None:
    """vLLM reads a folder again that has changed since, and takes weights by their names: all of them follow."""
    (first, before), (second, after) = saved("qwen3"), saved("qwen3", seed=1)
    assert before != after
    for file in first.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with engines.engine(tmp_path, enforce_eager=True) as served:
        assert engines.ask(served, prompts)[0] == before
        for file in second.glob("*.safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        served.collective_rpc("reload_weights")
        served.reset_prefix_cache()
        assert engines.ask(served, prompts)[0] == after
        # As a trainer sends them.
        weights = [*load_file(first / "model.safetensors").items()]
        served.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        served.reset_prefix_cache()
        assert engines.ask(served, prompts)[0] == before


def test_strength_of_a_server(saved: Callable[..., Any], prompts: list[list[int]]) -> None:
    folder, trained = saved("qwen3")
    expected = engines.generate(folder, prompts, 0.5)
    assert expected != trained
    options = {"talan_strength": 0.5}
    check(folder, prompts, expected, enforce_eager=True, async_scheduling=False, additional_config=options)


def test_strength_of_each_request(saved: Callable[..., Any], prompts: list[list[int]]) -> None:
    """Requests with the same prompt, in one batch and in pages that others left."""
    from vllm.exceptions import VLLMClientError

    folder, _ = saved("qwen3")
    asked = [0.5, None, 0.0, 2.0]
    expected = {strength: engines.generate(folder, prompts[:4], strength or 0.0) for strength in (0.0, 0.5, 2.0)}
    expected[None] = engines.generate(folder, prompts[:4], 1.5)
    assert all(one != other for one, other in combinations(expected.values(), 2))
    strengths = [strength for strength in asked for _ in range(4)]
    answers = [answer for strength in asked for answer in expected[strength]]
    options = {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 64, "max_num_seqs": 16}
    with engines.engine(folder, enforce_eager=True, additional_config={"talan_strength": 1.5}, **options) as served:
        assert engines.ask(served, prompts[:4])[0] == expected[None]
        for _ in range(2):
            assert engines.ask(served, prompts[:4] * 4, strengths)[0] == answers
        assert engines.preemptions(served) > 0
        for strength in strengths[:1] * 2:
            found, cached = engines.ask(served, prompts[1:2], [strength])
            assert found == expected[strength][1:2]
        assert cached == [engines.PAGE]
        with pytest.raises(VLLMClientError, match="strength='much': give a finite number"):
            engines.ask(served, prompts[:1], ["much"])


def test_a_streamed_prompt_has_no_strength_of_its_own(saved: Callable[..., Any], prompts: list[list[int]]) -> None:
    """Its pieces' strengths could differ. It ends with the reason, and what it computed before is nobody's prefix."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest, FinishReason

    folder, expected = saved("qwen3")
    parameters = SamplingParams(temperature=0.0, max_tokens=4, extra_args={"talan_strength": 0.5})
    names = ("mm_features", "pooling_params", "lora_request", "cache_salt", "data_parallel_rank")
    request = EngineCoreRequest(
        request_id="0",
        prompt_token_ids=prompts[1],
        sampling_params=parameters,
        arrival_time=0.0,
        resumable=True,
        **dict.fromkeys(names),
    )
    with engines.engine(folder, enforce_eager=True) as served:
        core, ends = served.llm_engine.engine_core, []
        core.add_request(request)
        while not ends:
            ends = [output for output in core.get_output().outputs if output.finish_reason is not None]
        assert ends[0].finish_reason == FinishReason.ERROR
        assert "the prompt comes in pieces" in ends[0].stop_reason
        assert engines.ask(served, prompts[1:2]) == (expected[1:2], [engines.PAGE])


def test_side_paths_of_several_merges(prompts: list[list[int]], tmp_path: Path) -> None:
    """Those of the second merge see the sum of the first's; all at one block, at both of its ends."""
    base = engines.CONFIGS["qwen3"]
    stages = ({"talan_layers": [1]}, {"talan_layers": [1, 2], "talan_position": "input", "talan_alpha": 0.7})
    model: Any = engines.make_base(base)
    for stage, options in enumerate(stages):
        for position in ("output", "input"):
            model = engines.adapt(model, f"{position}{stage}", stage, **{**options, "talan_position": position})
        model.base_model.set_adapter([f"{position}{stage}" for position in ("output", "input")])
        model = model.merge_and_unload()
    model.save_pretrained(tmp_path)
    expected = engines.generate(tmp_path, prompts)
    assert expected != engines.generate(tmp_path, prompts, strength=0.0)
    check(tmp_path, prompts, expected)


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_load_formats(load_format: str, saved: Callable[..., Any], prompts: list[list[int]]) -> None:
    folder, expected = saved("qwen3")
    with engines.engine(folder, enforce_eager=True, load_format=load_format) as served:
        answers, _ = engines.ask(served, prompts)
        assert (answers == expected) == (load_format != "dummy")


def test_two_processes_share_the_model(saved: Callable[..., Any], prompts: list[list[int]], tmp_path: Path) -> None:
    """With the engine and its scheduler in a process of their own, too; requests of two strengths, and an adapter."""
    folder, trained = saved("qwen3")
    engines.adapt(AutoModelForCausalLM.from_pretrained(folder), "default", 5).save_pretrained(tmp_path / "adapter")
    adapter = ("adapter", 1, str(tmp_path / "adapter"))
    kinds: list[tuple[float | None, Any]] = [(None, None), (0.5, None), (None, adapter), (0.5, adapter)]
    answers = [trained, engines.generate(folder, prompts, 0.5)]
    answers += [engines.generate(folder, prompts, strength, tmp_path / "adapter") for strength in (1.0, 0.5)]
    asked = [kinds[number % 4] for number in range(len(prompts))]
    expected = [answers[number % 4][number] for number in range(len(prompts))]
    # On processors, requests without an adapter need an empty last slot.
    options = {
        "enforce_eager": True,
        "tensor_parallel_size": 2,
        "enable_lora": True,
        "max_loras": 2,
        "additional_config": {"talan": {"adapters": [adapter[2]]}},
    }
    runs = [(str(folder), options, [prompts, *zip(*asked, strict=True)])]
    results, printed = engines.in_processes(runs, tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert results, printed
    assert results[0]["answers"] == [expected, expected]


def test_two_processes_share_a_model_with_adapters(family: Family, tmp_path: Path) -> None:
    """Each of them holds side paths whole, and its part of the LoRA weights."""
    options = family.options(enforce_eager=True, tensor_parallel_size=2, max_num_batched_tokens=64)
    prompts = family.prompts[:4]
    pairs = [(number, name) for number in range(len(prompts)) for name in family.names]
    requests = [[prompts[number] for number, _ in pairs], None, [family.request(name) for _, name in pairs]]
    runs = [(str(family.base), options, requests)]
    results, printed = engines.in_processes(runs, tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert results, printed
    assert results[0]["answers"] == [[family.answers[name][number] for number, name in pairs]] * 2
    assert results[0]["cached"] > 0


@pytest.mark.parametrize("options", [{}, {"shard": SHARD}], ids=["one file", "several files"])
def test_without_the_plugin_the_folder_is_refused(
    options: dict[str, str], saved: Callable[..., Any], prompts: list[list[int]], tmp_path: Path
) -> None:
    folder, _ = saved("qwen3", **options)
    runs = [(str(folder), {"enforce_eager": True}, [prompts])]
    results, printed = engines.in_processes(runs, tmp_path, VLLM_PLUGINS="none")
    assert not results
    assert "no module or parameter named" in printed
    assert "merged_side_paths_0" in printed
