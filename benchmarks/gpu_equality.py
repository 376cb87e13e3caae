"""Whether every way to run a side path says the same, in float32: asked by bench_gpu.py before it times anything.

The whole text at once is the measure. Beside it: token by token with a cache, the same compiled for CUDA graphs, in a
captured CUDA graph, `generate` with a static cache, and vLLM on the merged model, where there are such things.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from calls import compiled_call, token_ids
from conditions import ADAPTERS
from peft import get_peft_model
from torch import nn
from transformers import Cache, DynamicCache, StaticCache

ROOT = Path(__file__).parents[1]
CONDITIONS = ("lora", "talan", "talan, all blocks")
COMPILED = CONDITIONS[-1]
"""Compiling takes long, so it is checked where most can be wrong."""
LIMIT = 1e-4
"""The largest difference of two logits, beside the largest logit, that may be rounding in float32."""
ROWS, READ, DECODED = 2, 24, 6
Step = Callable[[torch.Tensor, Cache], torch.Tensor]


def acting(base: nn.Module, name: str) -> nn.Module:
    """The base model with an adapter whose halves both change the output; it is taken off by `unload()`."""
    config = ADAPTERS[name]()
    config.init_lora_weights = config.init_talan_weights = False
    torch.manual_seed(1)
    return get_peft_model(base, config).eval()


def eager_step(model: nn.Module) -> Step:
    return lambda token, cache: model(input_ids=token, past_key_values=cache, use_cache=True).logits


def compiled_step(model: nn.Module) -> Step:
    """As `torch.compile(mode="reduce-overhead")` runs it: on a GPU in CUDA graphs."""
    token, caches = torch.zeros(ROWS, 1, dtype=torch.long, device=model.device), []
    calls: list[Callable[[], torch.Tensor]] = []

    def step(given: torch.Tensor, cache: Cache) -> torch.Tensor:
        token.copy_(given)
        if not calls:
            caches.append(cache)
            calls.append(compiled_call(lambda model: eager_step(model)(token, caches[0]), model, "reduce-overhead"))
        return calls[0]().clone()

    return step


def captured_step(model: nn.Module) -> Step:
    """In a CUDA graph that torch captured at the second token, as a server does it."""
    token = torch.zeros(ROWS, 1, dtype=torch.long, device=model.device)
    graph, outputs, calls = torch.cuda.CUDAGraph(), [], [0]

    def step(given: torch.Tensor, cache: Cache) -> torch.Tensor:
        token.copy_(given)
        calls[0] += 1
        if calls[0] == 1:  # What is made at the first call must lie outside of the graph.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                logits = eager_step(model)(token, cache)
            torch.cuda.current_stream().wait_stream(side)
            return logits
        if not outputs:
            with torch.cuda.graph(graph):
                outputs.append(eager_step(model)(token, cache))
        graph.replay()
        return outputs[0].clone()

    return step


@torch.no_grad()
def decoded(model: nn.Module, tokens: torch.Tensor, cache: Cache, step: Step) -> torch.Tensor:
    """The logits of all tokens: of the first ones in one call, of the others one by one."""
    parts = [model(input_ids=tokens[:, :READ], past_key_values=cache, use_cache=True).logits]
    parts += [step(tokens[:, place : place + 1], cache) for place in range(READ, READ + DECODED)]
    return torch.cat(parts, dim=1)


def ways(model: nn.Module, compiled: bool) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """What is compared with the whole text at once, as logits."""
    tokens = token_ids(model, ROWS, READ + DECODED)

    def static() -> StaticCache:
        return StaticCache(config=model.config, max_cache_len=READ + DECODED)

    yield "cached", lambda: decoded(model, tokens, DynamicCache(config=model.config), eager_step(model))
    yield "static cache", lambda: decoded(model, tokens, static(), eager_step(model))
    if compiled:
        yield "torch.compile(mode='reduce-overhead')", lambda: decoded(model, tokens, static(), compiled_step(model))
    if model.device.type == "cuda":
        yield "CUDA graph", lambda: decoded(model, tokens, static(), captured_step(model))


def compare(model: nn.Module, compiled: bool) -> dict[str, float]:
    """The largest difference of each way, beside the largest logit."""
    with torch.no_grad():
        whole = model(input_ids=token_ids(model, ROWS, READ + DECODED), use_cache=False).logits
    found = {}
    for name, run in ways(model, compiled):
        torch._dynamo.reset()
        found[name] = float((run() - whole).abs().max() / whole.abs().max())
    prompt = token_ids(model, ROWS, READ)
    options = {"input_ids": prompt, "max_new_tokens": DECODED, "do_sample": False, "eos_token_id": None}
    kinds = ({}, {"cache_implementation": "static", "disable_compile": True})
    answers = [model.generate(**options, attention_mask=torch.ones_like(prompt), **kind) for kind in kinds]
    found["generate, static cache"] = float((answers[0] != answers[1]).float().mean())
    return found


def vllm_differences() -> float | None:
    """The share of answers in which vLLM and transformers differ on a small merged model; None without vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:  # No origin: some folder of this name.
        return None
    sys.path.insert(0, str(ROOT))
    from tests.vllm import engines

    with tempfile.TemporaryDirectory() as place:
        folder, answers = Path(place) / "merged", Path(place) / "answers.json"
        engines.save_model(folder, "llama")
        prompts = engines.make_prompts()
        command = [sys.executable, "-m", engines.__name__, str(folder), '{"gpu_memory_utilization": 0.3}']
        subprocess.run([*command, json.dumps([prompts]), str(answers)], cwd=ROOT, check=True)
        # Twice: with an empty and with a filled cache of prefixes.
        expected = engines.generate(folder, prompts)
        found = [answer for answers_of_run in json.loads(answers.read_text()) for answer in answers_of_run]
    return sum(one != other for one, other in zip(found, 2 * expected, strict=True)) / len(found)


def check(base: nn.Module, compiled: bool) -> dict[str, Any]:
    """Compare every way for every condition; `equal` is whether all differences are rounding."""
    differences = {}
    for name in CONDITIONS:
        model = acting(base, name)
        differences[name] = compare(model, compiled and name == COMPILED)
        model.unload()
    served = vllm_differences()
    equal = not served and all(value <= LIMIT for found in differences.values() for value in found.values())
    return {"equal": equal, "differences": differences, "vllm": served}
