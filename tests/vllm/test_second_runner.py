"""What vLLM does on GPUs gives the tokens of `generate`: its Model Runner V2, and models that are cut into pieces.

The runner has no kernels for processors, so they are interpreted. The worker is that of processors; the steps with
which a GPU's worker warms its kernels up are run by the test, without those of sampling. Pieces are traced and cut as
on GPUs; they are neither compiled to kernels nor captured in CUDA graphs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from . import engines
from .adapters import PLAIN, Family

pytest.importorskip("vllm", reason="vLLM is installed in an environment of its own: make test-vllm")

INTERPRETED = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


def test_answers_are_those_of_generate(family: Family, tmp_path: Path) -> None:
    """Of a merged model, at two strengths, and of adapters by request; a few tokens a step, and a few pages."""
    few: dict[str, Any] = {"enforce_eager": True, "num_gpu_blocks_override": 12, "max_num_batched_tokens": 64}
    strengths, merged = (None, 0.5), tmp_path / "merged"
    engines.save_model(merged, "qwen3")
    prompts = family.prompts[:4]
    pairs = [(prompt, strength) for prompt in prompts for strength in strengths]
    by_request = [(number, name) for number in range(len(prompts)) for name in ("first", PLAIN, "second")]
    runs: list[Any] = [
        (str(merged), few, [list(part) for part in zip(*pairs, strict=True)]),
        (
            str(family.base),
            family.options(**few),
            [[prompts[number] for number, _ in by_request], None, [family.request(name) for _, name in by_request]],
        ),
    ]
    results, printed = engines.in_processes(runs, tmp_path, **INTERPRETED)
    assert results, printed
    assert all(result["second_runner"] and result["preempted"] for result in results)
    of_strength = {strength: engines.generate(merged, prompts, strength or 1.0) for strength in strengths}
    expected = [
        [of_strength[strength][number] for number in range(len(prompts)) for strength in strengths],
        [family.answers[name][number] for number, name in by_request],
    ]
    assert [result["answers"] for result in results] == [[answers] * 2 for answers in expected]


@pytest.mark.parametrize("environment", [{}, INTERPRETED], ids=["first runner", "second runner"])
def test_models_in_pieces(environment: dict[str, str], family: Family, tmp_path: Path) -> None:
    """A merged model, and adapters by request: side paths lie between the pieces, as attention does."""
    merged, prompts, options = tmp_path / "merged", family.prompts[:3], {"max_num_batched_tokens": 64}
    engines.save_model(merged, "qwen3")
    pairs = [(number, name) for number in range(len(prompts)) for name in ("first", PLAIN, "third")]
    runs: list[Any] = [
        (str(merged), options, [prompts]),
        (
            str(family.base),
            family.options(**options),
            [[prompts[number] for number, _ in pairs], None, [family.request(name) for _, name in pairs]],
        ),
    ]
    results, printed = engines.in_processes(runs, tmp_path, COMPILE_IN_PIECES="1", **environment)
    assert results, printed
    assert [result["second_runner"] for result in results] == [bool(environment)] * 2
    expected = [engines.generate(merged, prompts), [family.answers[name][number] for number, name in pairs]]
    assert [result["answers"] for result in results] == [[answers] * 2 for answers in expected]
    # Four blocks have attention; two have a merged side path, and three those of adapters.
    assert [result["pieces"] for result in results] == [2 * (4 + side_paths) + 1 for side_paths in (2, 3)]
