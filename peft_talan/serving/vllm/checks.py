"""Configures an engine with side paths by vLLM's options, and refuses what they do not support."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.utils import PeftType
from vllm.platforms import current_platform

from ...config import TalanConfig
from .strength import server_strength

SCHEDULERS: dict[bool, str] = {
    False: "peft_talan.serving.vllm.scheduling.PageScheduler",
    True: "peft_talan.serving.vllm.scheduling.AsyncPageScheduler",
}
"""The option `scheduler_cls`; True: with asynchronous scheduling."""

WORKER = "peft_talan.serving.vllm.worker.SidePathWorker"
"""The option `worker_cls`."""

STRENGTH_CHECKS: dict[bool, str] = {
    False: "peft_talan.serving.vllm.strength:StrengthCheck",
    True: "peft_talan.serving.vllm.strength:StrengthCheckV2",
}
"""What is added to the option `logits_processors`; True: for vLLM's second model runner."""

LOAD_FORMATS: tuple[str, ...] = (
    "auto",
    "hf",
    "safetensors",
    "fastsafetensors",
    "instanttensor",
    "pt",
    "npcache",
    "dummy",
)
"""The values of the option `load_format` that side paths support."""

LOAD_PREFIX = "peft_talan:"
"""What stands before one of them where our loader reads the model."""

EXECUTORS: tuple[str, ...] = ("uni", "mp", "external_launcher")
"""The values of the option `distributed_executor_backend` whose workers are called step by step."""


def configure(vllm_config: Any) -> None:
    """Let an engine serve the side path that its model embeds: its scheduler, worker and loader are chosen by options.

    Args:
        vllm_config: vLLM's configuration.

    Raises:
        ValueError: An option of vLLM or of the adapter can't work; the message names the remedy.
    """
    check_engine(vllm_config)
    scheduling, load, model = vllm_config.scheduler_config, vllm_config.load_config, vllm_config.model_config
    scheduling.scheduler_cls = SCHEDULERS[bool(scheduling.async_scheduling)]
    vllm_config.parallel_config.worker_cls = WORKER
    load.load_format = LOAD_PREFIX + load.load_format.removeprefix(LOAD_PREFIX)
    if model.runner_type != "pooling":
        check = STRENGTH_CHECKS[bool(vllm_config.use_v2_model_runner)]
        model.logits_processors = [*(model.logits_processors or ()), check]


def check_configured(vllm_config: Any) -> None:
    """Refuse an engine that was not configured by `configure`, or whose options were changed afterwards.

    Args:
        vllm_config: vLLM's configuration.

    Raises:
        ValueError: Another class would schedule or work.
    """
    found = {
        "scheduler_cls": vllm_config.scheduler_config.scheduler_cls,
        "worker_cls": vllm_config.parallel_config.worker_cls,
    }
    for name, value in found.items():
        if value not in (*SCHEDULERS.values(), WORKER):
            raise ValueError(
                f"{name}={value!r}: the engine was configured without the plugin of peft_talan; configure it by "
                "vllm.LLM, `vllm serve` or EngineArgs.create_engine_config, and leave this option as it is"
            )


def platform_worker() -> str:
    """Find the worker class that vLLM chooses on this machine.

    Returns:
        Its name.
    """
    if current_platform.is_cpu():
        return "vllm.v1.worker.cpu_worker.CPUWorker"
    if current_platform.is_xpu():
        return "vllm.v1.worker.xpu_worker.XPUWorker"
    return "vllm.v1.worker.gpu_worker.Worker"


def read_config(model_config: Any) -> TalanConfig:
    """Read the configuration of the adapter that a model embeds.

    Args:
        model_config: vLLM's configuration of the model.

    Returns:
        The adapter's configuration, which knows where its tensors are.

    Raises:
        ValueError: It is not a TALAN adapter, or its low-rank half is not merged into the model.
    """
    options = {} if model_config.revision is None else {"revision": model_config.revision}
    config = TalanConfig.from_pretrained(model_config.model, **options)
    if config.peft_type != PeftType("TALAN"):
        raise ValueError(f"model={model_config.model!r}: the adapter is of type {config.peft_type}, not TALAN")
    if config.has_low_rank_half:
        raise ValueError(
            f"model={model_config.model!r}: the low-rank half of its adapter is not merged; run `peft-talan merge` "
            "and serve the folder that it writes"
        )
    return config


def check_engine(vllm_config: Any) -> TalanConfig:
    """Refuse what can't give the answers of `generate`.

    Args:
        vllm_config: vLLM's configuration of a model that embeds a TALAN adapter.

    Returns:
        The adapter's configuration.

    Raises:
        ValueError: An option of vLLM or of the adapter can't work; the message names the remedy.
    """
    config = read_config(vllm_config.model_config)
    server_strength(vllm_config)
    for reason in _reasons(vllm_config, config):
        raise ValueError(f"{reason} (the model {vllm_config.model_config.model!r} has a TALAN side path)")
    return config


def _reasons(vllm_config: Any, config: TalanConfig) -> Iterator[str]:
    """Why this engine would not be exact, one sentence each."""
    parallel, model, cache = vllm_config.parallel_config, vllm_config.model_config, vllm_config.cache_config
    if config.talan_memory_scope != "causal":
        yield (
            f"talan_memory_scope={config.talan_memory_scope!r}: a token would see later ones; vLLM runs causal side "
            "paths only"
        )
    scheduler = vllm_config.scheduler_config.scheduler_cls
    if scheduler not in (None, *SCHEDULERS.values()):
        yield (
            f"scheduler_cls={scheduler!r}: a side path needs the scheduler of peft_talan, which lets no request "
            "continue from a page that is written in the same step; leave the option out"
        )
    if parallel.worker_cls not in (platform_worker(), WORKER):
        yield (
            f"worker_cls={parallel.worker_cls!r}: a side path needs the worker of peft_talan, which knows each "
            "request's strength; leave the option out"
        )
    if parallel.distributed_executor_backend not in EXECUTORS:
        yield (
            f"distributed_executor_backend={parallel.distributed_executor_backend!r}: it does not call a worker step "
            "by step, as a side path needs it; use 'mp'"
        )
    if vllm_config.speculative_config is not None:
        yield (
            "speculative_config: rejected draft tokens would stay in the latent memory; start vLLM without "
            "speculative decoding"
        )
    if vllm_config.kv_transfer_config is not None:
        yield (
            f"kv_connector={vllm_config.kv_transfer_config.kv_connector!r}: it moves keys and values without the "
            "latent memory; start vLLM without kv_transfer_config and kv_offloading_size"
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            yield f"{name}={getattr(parallel, name)}: a process would see a part of each sequence only; leave it at 1"
    if parallel.pipeline_parallel_size > 1:
        yield (
            f"pipeline_parallel_size={parallel.pipeline_parallel_size}: several steps would be under way at once, "
            "and their answers were not shown to be those of generate; use tensor_parallel_size"
        )
    if parallel.enable_elastic_ep:
        yield "enable_elastic_ep: new workers would build the model without its side path; start vLLM without it"
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 1:
        yield "enable_dbo: batches are not split between two streams here; start vLLM without it"
    if cache.kv_sharing_fast_prefill:
        yield "kv_sharing_fast_prefill: blocks would not see all tokens; start vLLM without it"
    if getattr(getattr(vllm_config, "attention_config", None), "hisparse_config", None) is not None:
        yield "hisparse_config: it moves pages without the latent memory; start vLLM without it"
    if model.is_hybrid or model.is_attention_free:
        yield (
            f"architecture {model.architecture}: its recurrent layers share prefixes inside a page, which the latent "
            "memory can't follow; serve it with transformers"
        )
    if not isinstance(vllm_config.additional_config, dict):
        yield "additional_config: it must be a dictionary, so that compiled graphs are kept apart by their side paths"
    load_format = vllm_config.load_config.load_format.removeprefix(LOAD_PREFIX)
    if load_format not in LOAD_FORMATS:
        yield f"load_format={load_format!r}: it does not read the adapter's tensors; use 'auto'"
