"""What the side path costs in a whole model, beside matched LoRA and DoRA, the base model and merged models.

All conditions of a model live in one process and share its base weights. They take turns call by call, so that a
change of the machine's clock hits all of them; ratios are medians of the ratios within a turn. Operations are what
reaches the dispatcher, memory is the highest balance of allocated minus freed bytes (torch.profiler).

    python benchmarks/bench_overhead.py --models smollm2 qwen3-0.6b --measure decode prefill train

One JSON object a finished measurement is appended to the results; `--report` prints the tables and draws the plot.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import DispatchCounter, machine, peak_extra_bytes
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedConfig, Qwen3Config

from peft_talan import TalanConfig
from peft_talan.demo.base_model import default_model_folder

RESULTS = Path(__file__).parent / "results" / "overhead.jsonl"
QWEN3 = {"vocab_size": 151936, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
SHAPES: dict[str, PreTrainedConfig] = {
    "qwen3-0.6b": Qwen3Config(**QWEN3, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28),
    "qwen3-1.7b": Qwen3Config(**QWEN3, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
    ),
}
MODELS = ("smollm2", *SHAPES)
LOW_RANK = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
EIGHT = [index / 8 for index in range(8)]
ADAPTERS: dict[str, Callable[[], LoraConfig]] = {
    "lora": lambda: LoraConfig(**LOW_RANK),
    "talan": lambda: TalanConfig(**LOW_RANK),
    "talan, 8 blocks": lambda: TalanConfig(**LOW_RANK, talan_layers=EIGHT),
    "dora": lambda: LoraConfig(**LOW_RANK, use_dora=True),
    "dora + talan": lambda: TalanConfig(**LOW_RANK, use_dora=True),
}
MATCHED = {
    "talan": "lora",
    "talan, 8 blocks": "lora",
    "dora + talan": "dora",
    "kept": "merged",
    "merged": "base",
    "lora": "base",
}
MERGED = {"merged": "lora", "kept": "talan"}


def load_base(name: str, dtype: torch.dtype) -> nn.Module:
    """The real model, or random weights in a shape."""
    if name == "smollm2":
        return AutoModelForCausalLM.from_pretrained(default_model_folder(), dtype=dtype).eval()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(SHAPES[name], dtype=dtype).eval()


def make_conditions(base: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The model in each condition; all but the merged ones, which share theirs, share the base's tensors."""

    def sharing(model: nn.Module) -> nn.Module:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})

    models: dict[str, nn.Module] = {}
    merged = copy.deepcopy(base) if set(names) & set(MERGED) else None
    for name in names:
        torch.manual_seed(1)
        if name == "base":
            models[name] = sharing(base)
        elif name in MERGED and merged is not None:
            # A fresh low-rank half folds to the same weights, so both merged models can share them.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                models[name] = get_peft_model(sharing(merged), ADAPTERS[MERGED[name]]()).merge_and_unload()
        else:
            models[name] = get_peft_model(sharing(base), ADAPTERS[name]())
        models[name].eval()
    return models


def in_turns(
    calls: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of each call (medians), and its ratio to what it is matched with (median of the turns' ratios)."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(-warm_up, rounds):
        # Every second turn backwards: what comes after what is balanced.
        for name in names if turn % 2 else reversed(names):
            start = time.perf_counter()
            calls[name]()
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
        for name, other in MATCHED.items()
        if name in times and other in times
    }
    return {name: statistics.median(values) for name, values in times.items()}, ratios


def counted(calls: dict[str, Callable[[], object]]) -> dict[str, int]:
    """Operations that one call of each condition dispatches."""
    counts = {}
    for name, call in calls.items():
        with DispatchCounter() as counter:
            call()
        counts[name] = counter.count
    return counts


def prefill_calls(models: dict[str, nn.Module], tokens: int, batch: int = 1) -> dict[str, Callable[[], Any]]:
    """One forward pass over a prompt, with a fresh cache."""
    vocabulary = next(iter(models.values())).config.vocab_size
    prompt = torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(2))

    def prefill(model: nn.Module) -> DynamicCache:
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            return model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    return {name: partial(prefill, model) for name, model in models.items()}


def decode_calls(models: dict[str, nn.Module], context: int, batch: int) -> dict[str, Callable[[], object]]:
    """One decoded token a call, each condition going on with its own cache."""
    token = torch.full((batch, 1), 7)

    def step(model: nn.Module, cache: DynamicCache) -> object:
        with torch.no_grad():
            return model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    calls = {}
    for name, prefill in prefill_calls(models, context).items():
        cache = prefill()
        cache.batch_repeat_interleave(batch)
        calls[name] = partial(step, models[name], cache)
    return calls


def train_calls(models: dict[str, nn.Module], tokens: int) -> dict[str, Callable[[], object]]:
    """One step: forward, backward, optimizer."""
    vocabulary = next(iter(models.values())).config.vocab_size
    sample = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(3))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> object:
        loss = model(input_ids=sample, labels=sample, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    calls = {}
    for name, model in models.items():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        calls[name] = partial(step, model.train(), torch.optim.AdamW(trained))
    return calls


def attach_calls(base: nn.Module, folder: Path) -> dict[str, dict[str, Callable[[], object]]]:
    """Attaching a fresh adapter, and loading a saved one."""

    def attach(config: Callable[[], LoraConfig]) -> object:
        return get_peft_model(base, config()).unload()

    def load(path: Path) -> object:
        return PeftModel.from_pretrained(base, path).unload()

    calls: dict[str, dict[str, Callable[[], object]]] = {"attach": {}, "load": {}}
    for name in ("lora", "talan"):
        attached = get_peft_model(base, ADAPTERS[name]())
        attached.save_pretrained(folder / name)
        attached.unload()
        calls["attach"][name] = partial(attach, ADAPTERS[name])
        calls["load"][name] = partial(load, folder / name)
    return calls


def measurements(arguments: argparse.Namespace, name: str, dtype: str) -> Iterator[dict[str, Any]]:
    """Measure one model in one dtype."""
    base = load_base(name, getattr(torch, dtype))
    backbone = sum(parameter.numel() for parameter in base.parameters())
    if "attach" in arguments.measure:
        with tempfile.TemporaryDirectory() as folder:
            for what, calls in attach_calls(base, Path(folder)).items():
                milliseconds, ratios = in_turns(calls, arguments.rounds)
                yield {"measure": what, "milliseconds": milliseconds, "ratios": ratios}
    if "prefill" in arguments.measure:
        models = make_conditions(base, arguments.conditions)
        for tokens in arguments.tokens:
            calls = prefill_calls(models, tokens)
            milliseconds, ratios = in_turns(calls, arguments.rounds, warm_up=1)
            peak = {key: peak_extra_bytes(call) for key, call in calls.items()} if tokens <= 2048 else {}
            yield {
                "measure": "prefill",
                "tokens": tokens,
                "milliseconds": milliseconds,
                "ratios": ratios,
                "peak_bytes": peak,
            }
    if "decode" in arguments.measure:
        models = make_conditions(base, arguments.conditions)
        for context in arguments.contexts:
            for batch in arguments.batches:
                calls = decode_calls(models, context, batch)
                operations = counted(calls)
                milliseconds, ratios = in_turns(calls, arguments.decode_rounds, warm_up=4)
                yield {
                    "measure": "decode",
                    "context": context,
                    "batch": batch,
                    "milliseconds": milliseconds,
                    "ratios": ratios,
                    "operations": operations,
                }
    if "train" in arguments.measure:
        models = make_conditions(base, [key for key in arguments.conditions if key in ADAPTERS])
        trained = {
            key: sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            for key, model in models.items()
        }
        calls = train_calls(models, arguments.train_tokens)
        milliseconds, ratios = in_turns(calls, arguments.rounds, warm_up=1)
        yield {
            "measure": "train",
            "tokens": arguments.train_tokens,
            "milliseconds": milliseconds,
            "ratios": ratios,
            "peak_bytes": {key: peak_extra_bytes(call) for key, call in calls.items()},
            "operations": counted(calls),
            "trained_share": {key: count / backbone for key, count in trained.items()},
        }


def main() -> None:
    """Measure what was asked for, print it and store it."""
    conditions = ["base", *ADAPTERS, *MERGED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--measure", nargs="+", choices=["attach", "prefill", "decode", "train"], default=["decode"])
    parser.add_argument("--conditions", nargs="+", choices=conditions, default=conditions)
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048], help="lengths of prompts")
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 2048], help="tokens before those decoded")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="rows that are decoded at once")
    parser.add_argument("--train-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9, help="turns of a prefill, a training step, an attachment")
    parser.add_argument("--decode-rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    facts = {**machine(), "rounds": arguments.rounds, "decode_rounds": arguments.decode_rounds}
    print(json.dumps(facts))
    for name in arguments.models:
        for dtype in arguments.dtypes:
            for result in measurements(arguments, name, dtype):
                line = json.dumps({"model": name, "dtype": dtype, **result, "machine": facts})
                print(json.dumps({"model": name, "dtype": dtype, **result}), flush=True)
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
