"""Tiny models whose folders embed a side path, the tokens that `generate` gives for them, and vLLM engines.

`python -m tests.vllm.engines RUNS FILE` runs engines, one after the other, in processes of its own. Runs (folder,
options of the engine, requests: prompts, strengths and adapters) are JSON, and so is the file of results.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from peft_talan import TalanConfig, set_talan_strength
from peft_talan.tuner.merged import merged_layers

from . import pieces

VOCABULARY = 128
NEW_TOKENS = 32
WINDOW = 32
PAGE = 32
"""Tokens a page: vLLM's attention on processors takes multiples of it."""

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHAPE = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_WITH_HEADS = {**_SHAPE, "head_dim": 32, "num_attention_heads": 4}

CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen3": Qwen3Config(**_WITH_HEADS),
    "qwen3_moe": Qwen3MoeConfig(**_WITH_HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "llama": LlamaConfig(**_WITH_HEADS),
    "olmo2": Olmo2Config(**_WITH_HEADS),
    "mistral": MistralConfig(**_WITH_HEADS, sliding_window=WINDOW),
    "gemma3": Gemma3TextConfig(
        **_WITH_HEADS, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "cohere": CohereConfig(**_SHAPE),
    "gpt2": GPT2Config(**_TOKENS, n_embd=64, n_layer=4, n_head=2, n_positions=512),
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""One process for all engines of a test run: each would import vLLM anew."""


def make_base(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model that tells tokens apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in base.parameters():
                # Small random weights hardly tell one token from another.
                if parameter.dim() > 1:
                    parameter.mul_(4.0)
    return base


def adapt(model: PreTrainedModel | PeftModel, name: str, seed: int = 0, **options: object) -> PeftModel:
    """Give a model a random side path that changes what it says."""
    shared = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    side_path = {"talan_layers": [1, -1], "init_talan_weights": False}
    config = TalanConfig(**{**shared, **side_path, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "talan_write" in key and f".{name}." in key:
                    parameter.mul_(4.0)
    return model


def make_model(config: PreTrainedConfig, seed: int = 0, **options: object) -> PeftModel:
    """A random model with a random side path."""
    return adapt(make_base(config, seed), "default", seed, **options)


def save_model(
    folder: Path, architecture: str, merged: bool = True, seed: int = 0, shard: str = "5GB", **options: object
) -> None:
    """Write a folder with a random side path."""
    model = make_model(CONFIGS[architecture], seed, **options)
    model.merge_and_unload(side_path="keep" if merged else "drop").save_pretrained(folder, max_shard_size=shard)


def make_prompts() -> list[list[int]]:
    """Prompts of several lengths; every second one begins as the others of these do, with more than a page."""
    generator = torch.Generator().manual_seed(5)

    def draw(tokens: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (tokens,), generator=generator).tolist()

    shared = draw(PAGE + 8)
    return [(shared if number % 2 else []) + draw(5 + 13 * number) for number in range(8)]


def generate(
    folder: Path, prompts: list[list[int]], strength: float = 1.0, adapter: Path | None = None
) -> list[list[int]]:
    """What transformers gives, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if any(merged_layers(model)):
        set_talan_strength(model, strength)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
        if strength != 1.0:
            set_talan_strength(model, strength)
    answers = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        mask = torch.ones_like(tokens)
        answer = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(answer[0, len(prompt) :].tolist())
    return answers


def engine_options(folder: Path, **options: Any) -> dict[str, Any]:
    """An engine of a few pages, without tokenizer."""
    return {
        "model": str(folder),
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "block_size": PAGE,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 64,
        "disable_log_stats": False,
        **options,
    }


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """An engine in this process, gone afterwards."""
    from vllm import LLM

    served = LLM(**engine_options(folder, distributed_executor_backend="uni", **options))
    try:
        yield served
    finally:
        served.llm_engine.engine_core.shutdown()
        del served
        clean_up()


def clean_up() -> None:
    """Take down what an engine that is gone leaves in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def greedy(**options: Any) -> Any:
    """vLLM's parameters of what `generate` does."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, stop_token_ids=[_TOKENS["eos_token_id"]], **options)


def ask(
    served: Any,
    prompts: list[list[int]],
    strengths: list[float | None] | None = None,
    adapters: list[tuple[str, int, str] | None] | None = None,
    **options: Any,
) -> tuple[list[list[int]], list[int]]:
    """The answers of an engine, and how many tokens of each prompt it had in its cache.

    An adapter is a name, a number and a folder; options are vLLM's for each of them.
    """
    from vllm.lora.request import LoRARequest

    parameters = [
        greedy(extra_args=None if strength is None else {"talan_strength": strength})
        for strength in strengths or [None] * len(prompts)
    ]
    loras = [None if one is None else LoRARequest(*one, **options) for one in adapters or [None] * len(prompts)]
    requests: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = served.generate(requests, parameters, lora_request=loras, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], [output.num_cached_tokens for output in outputs]


def preemptions(served: Any) -> int:
    """How often an engine took a running request's pages away."""
    return sum(metric.value for metric in served.get_metrics() if metric.name == "vllm:num_preemptions")


def in_processes(runs: list[Any], folder: Path, **environment: str) -> tuple[list[Any], str]:
    """Run engines in processes of their own; gives their results, if there are any, and the end of what is printed."""
    report, printed = folder / "results", folder / "printed"
    command = [sys.executable, "-m", "tests.vllm.engines", json.dumps(runs), str(report)]
    with printed.open("w") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout=900)
        finally:
            # vLLM's workers outlive a process that is killed.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return json.loads(report.read_text()) if report.exists() else [], printed.read_text()[-40000:]


def answer_in_this_process(folder: str, options: dict[str, Any], requests: list[Any], uni: bool) -> dict[str, Any]:
    """Start an engine and ask it twice, the second time with a warm prefix cache."""
    from vllm import LLM
    from vllm.compilation.counter import compilation_counter

    if uni:
        options = {"distributed_executor_backend": "uni", **options}
    before = compilation_counter.num_piecewise_graphs_seen
    llm = LLM(**engine_options(Path(folder), **options))
    if llm.llm_engine.vllm_config.use_v2_model_runner:
        llm.collective_rpc(warm_up)
    answers = [ask(llm, *requests) for _ in range(2)]
    result = {
        "answers": [found for found, _ in answers],
        "cached": sum(answers[1][1]),
        "preempted": preemptions(llm),
        "second_runner": llm.llm_engine.vllm_config.use_v2_model_runner,
        "pieces": compilation_counter.num_piecewise_graphs_seen - before,
    }
    if uni:
        llm.llm_engine.engine_core.shutdown()
        del llm
        clean_up()
    return result


def warm_up(worker: Any) -> None:
    """Run the steps with which a GPU's worker starts, and that of processors does not."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    # Triton's interpreter can't run the kernels of structured outputs and of top-k and top-p sampling.
    with patch.object(SamplingParams, "for_sampler_warmup", greedy):
        warmup_kernels(worker.model_runner, worker.execute_model, lambda grammar: worker.sample_tokens(None))


def interpret_triton() -> None:
    """Let Triton run its kernels on a processor, as its interpreter does, before vLLM is imported."""
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))


if __name__ == "__main__":
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ.get("TRITON_INTERPRET"):
        interpret_triton()
    if os.environ.get("COMPILE_IN_PIECES"):
        pieces.compile_in_pieces()
    several = json.loads(sys.argv[1])
    results = [answer_in_this_process(*one, uni=len(several) > 1) for one in several]
    Path(sys.argv[2]).write_text(json.dumps(results))
