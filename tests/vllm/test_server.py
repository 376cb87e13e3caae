"""The OpenAI server with adapters by request, which are loaded and unloaded while its two engines run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..offline_hub import make_tokenizer
from . import engines
from .adapters import PLAIN, Family
from .servers import WITH_ADAPTERS, complete, post, serving

pytest.importorskip("vllm", reason="vLLM is installed in an environment of its own: make test-vllm")

ENGINES = 2


@pytest.fixture(scope="module")
def port(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    make_tokenizer().save_pretrained(family.base)
    modules = [f"{name}={family.folder / name}" for name in ("first", PLAIN)]
    printed = tmp_path_factory.mktemp("server") / "printed"
    words = [*WITH_ADAPTERS, "--data-parallel-size", ENGINES, "--max-loras", 3, "--lora-modules", *modules]
    with serving(family.base, words, printed) as port:
        yield port


def check(port: int, adapter: str, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """Ask both engines."""
    for engine in range(ENGINES):
        assert complete(port, adapter, prompts, engine) == expected


def test_adapters_are_loaded_and_unloaded(family: Family, port: int, tmp_path: Path) -> None:
    """Those of the command line; one more, under a new name for each version, as TRL does it; and one in place."""
    prompts = family.prompts
    for name in ("first", PLAIN):
        check(port, name, prompts, family.answers[name])
    # It has the kind of the first one, at one of its blocks.
    load = {"lora_name": "policy-v1", "lora_path": str(family.folder / "second")}
    assert post(port, "/v1/load_lora_adapter", load)[0] == 200
    check(port, "policy-v1", prompts, family.answers["second"])
    folder = tmp_path / "policy"
    adapted = engines.adapt(engines.make_base(engines.CONFIGS["qwen3"]), "default", 7)
    adapted.save_pretrained(folder)
    load = {"lora_name": "policy-v2", "lora_path": str(folder)}
    assert post(port, "/v1/load_lora_adapter", load)[0] == 200
    assert post(port, "/v1/unload_lora_adapter", {"lora_name": "policy-v1"})[0] == 200
    before = engines.generate(family.base, prompts, adapter=folder)
    check(port, "policy-v2", prompts, before)
    # The same name and folder with other tensors: in place, and after it was unloaded.
    for seed, in_place in ((8, True), (9, True), (10, False)):
        engines.adapt(engines.make_base(engines.CONFIGS["qwen3"]), "default", seed).save_pretrained(folder)
        check(port, "policy-v2", prompts, before)
        if not in_place:
            assert post(port, "/v1/unload_lora_adapter", {"lora_name": "policy-v2"})[0] == 200
        assert post(port, "/v1/load_lora_adapter", {**load, "load_inplace": in_place})[0] == 200
        after = engines.generate(family.base, prompts, adapter=folder)
        assert after != before
        for _ in range(2):
            check(port, "policy-v2", prompts, after)
        before = after
    engines.adapt(engines.make_base(engines.CONFIGS["qwen3"]), "default", talan_layers=[0]).save_pretrained(folder)
    status, text = post(port, "/v1/load_lora_adapter", {"lora_name": "elsewhere", "lora_path": str(folder)})
    assert status == 500
    assert "has no room; name the adapter" in text
    nowhere = {"lora_name": "nowhere", "lora_path": str(tmp_path / "nowhere")}
    assert post(port, "/v1/load_lora_adapter", nowhere)[0] == 404
    check(port, "first", prompts, family.answers["first"])
    _, metrics = post(port, "/metrics", None)
    counted = [line.split() for line in metrics.splitlines() if line.startswith("vllm:request_success_total{")]
    for engine in range(ENGINES):
        assert sum(float(number) for name, number in counted if f'engine="{engine}"' in name) > 0
