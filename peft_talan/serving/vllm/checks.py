"""What of vLLM a side path can't go along with: refused before a model is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.utils import PeftType

from ...config import TalanConfig
from .strength import server_strength

SCHEDULERS: dict[bool, str] = {
    False: "peft_talan.serving.vllm.scheduling.PageScheduler",
    True: "peft_talan.serving.vllm.scheduling.AsyncPageScheduler",
}
"""The schedulers that hold back what a side path can't run yet; True: with asynchronous scheduling."""


def choose_scheduler(vllm_config: Any) -> None:
    """Let vLLM schedule an engine with side paths by one of `SCHEDULERS`.

    Args:
        vllm_config: vLLM's configuration; its option `scheduler_cls` is set.

    Raises:
        ValueError: It has another one already.
    """
    options = vllm_config.scheduler_config
    if options.scheduler_cls not in (None, *SCHEDULERS.values()):
        raise ValueError(
            f"scheduler_cls={options.scheduler_cls!r}: a side path needs the scheduler of peft_talan, which lets no "
            "request go on from a page that is written in the same step; leave the option out"
        )
    options.scheduler_cls = SCHEDULERS[bool(options.async_scheduling)]


def check_scheduler(vllm_config: Any) -> None:
    """Refuse an engine that is scheduled in another way.

    Args:
        vllm_config: vLLM's configuration.

    Raises:
        ValueError: `choose_scheduler` did not choose its scheduler.
    """
    found = vllm_config.scheduler_config.scheduler_cls
    if found not in SCHEDULERS.values():
        raise ValueError(
            f"scheduler_cls={found!r}: the engine was configured without the plugin of peft_talan; configure it by "
            "vllm.LLM, `vllm serve` or EngineArgs.create_engine_config"
        )


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
    loader = vllm_config.load_config.load_format
    if not _builds_with_base_loader(vllm_config.load_config):
        yield f"load_format={loader!r}: this loader does not build the model in vLLM's usual way; use 'auto'"


def _builds_with_base_loader(load_config: Any) -> bool:
    from vllm.model_executor.model_loader import BaseModelLoader, get_model_loader

    return type(get_model_loader(load_config)).load_model is BaseModelLoader.load_model
