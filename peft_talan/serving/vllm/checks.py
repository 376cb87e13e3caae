"""Configures an engine with side paths by vLLM's options, and refuses what they do not support."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.platforms import current_platform

from ...axes import check_causal
from ...checkpoint.merged_config import MergedSidePath, merged_side_paths
from ...tuner.merged import config_of
from .adapter_kinds import ROOM, make_room
from .adapter_options import named_adapters
from .strength import StrengthCheck, server_strength

logger = init_logger("vllm.peft_talan")

SCHEDULERS = {
    False: "peft_talan.serving.vllm.scheduling.PageScheduler",
    True: "peft_talan.serving.vllm.scheduling.AsyncPageScheduler",
}
"""The option `scheduler_cls`; True: with asynchronous scheduling."""

WORKER = "peft_talan.serving.vllm.worker.SidePathWorker"
"""The option `worker_cls`."""

REQUEST_CHECKS = {
    False: "peft_talan.serving.vllm.strength:StrengthCheck",
    True: "peft_talan.serving.vllm.checks:ProcessorCheck",
}
"""What is added to the option `logits_processors`; True: on a processor, with adapters."""

LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "dummy")
"""The values of the option `load_format` that side paths support."""

LOAD_PREFIX = "peft_talan:"
"""What stands before one of them where our loader builds the model."""

EXECUTORS = ("uni", "mp", "external_launcher")
"""The values of the option `distributed_executor_backend` whose workers are called step by step."""


def configure(vllm_config: Any) -> None:
    """Let an engine serve the side paths of its model: options name the scheduler, the worker and the loader.

    Args:
        vllm_config: vLLM's configuration.

    Raises:
        ValueError: An option of vLLM or of the adapter can't work; the message names the remedy.
    """
    room = make_room(named_adapters(vllm_config.additional_config), vllm_config.model_config)
    if room:
        if vllm_config.lora_config is None:
            raise ValueError('additional_config["talan"]: adapters by request need enable_lora (--enable-lora)')
        if vllm_config.lora_config.target_modules is not None:
            raise ValueError(
                f"lora_target_modules={vllm_config.lora_config.target_modules!r}: vLLM would leave out adapters' LoRA "
                "weights of all other modules; start it without"
            )
        vllm_config.additional_config[ROOM] = room
    elif not merged_side_paths(vllm_config.model_config.hf_config.to_dict()):
        return  # the adapters that were named are plain ones
    check_engine(vllm_config)
    _capture_no_side_path(vllm_config.compilation_config)
    scheduling, load, model = vllm_config.scheduler_config, vllm_config.load_config, vllm_config.model_config
    scheduling.scheduler_cls = SCHEDULERS[bool(scheduling.async_scheduling)]
    vllm_config.parallel_config.worker_cls = WORKER
    load.load_format = LOAD_PREFIX + load.load_format.removeprefix(LOAD_PREFIX)
    if model.runner_type != "pooling":
        check = REQUEST_CHECKS[current_platform.is_cpu() and vllm_config.lora_config is not None]
        model.logits_processors = [*(model.logits_processors or ()), check]


class ProcessorCheck(StrengthCheck):
    """Refuses requests that would end an engine with adapters on a processor, too."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Look at a request before it is taken."""
        super().validate_params(sampling_params)
        for name in ("prompt_logprobs", "prompt_logprob_token_ids"):
            # vLLM takes the head's LoRA weights by request there, also for the logits of all tokens of a prompt.
            if getattr(sampling_params, name, None) is not None:
                raise ValueError(
                    f"{name}: with enable_lora, vLLM can't compute them on a processor and would end the engine; "
                    "serve the adapter merged, or on a GPU"
                )


def _capture_no_side_path(compilation: Any) -> None:
    """Leave out CUDA graphs of whole steps: side paths would run inside of them, which was not shown to be exact."""
    mode = compilation.cudagraph_mode
    if not mode.has_full_cudagraphs():
        return
    if mode.has_piecewise_cudagraphs():
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    else:
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        compilation.max_cudagraph_capture_size, compilation.cudagraph_capture_sizes = 0, []
    logger.warning(
        "cudagraph_mode=%s: TALAN side paths were not run inside of CUDA graphs; it is %s now",
        mode.name,
        compilation.cudagraph_mode.name,
    )


def check_configured(vllm_config: Any) -> None:
    """Refuse an engine that was not configured by `configure`, or whose options were changed afterwards.

    Args:
        vllm_config: vLLM's configuration.

    Raises:
        ValueError: Another class would schedule or work.
    """
    for name, owner in (("scheduler_cls", vllm_config.scheduler_config), ("worker_cls", vllm_config.parallel_config)):
        if getattr(owner, name) not in (*SCHEDULERS.values(), WORKER):
            raise ValueError(
                f"{name}={getattr(owner, name)!r}: the engine was configured without the plugin of peft_talan; "
                "configure it by vllm.LLM, `vllm serve` or EngineArgs.create_engine_config, and leave this option"
            )


def platform_worker() -> str:
    """The name of the worker class that vLLM chooses on this machine."""
    if current_platform.is_cpu():
        return "vllm.v1.worker.cpu_worker.CPUWorker"
    if current_platform.is_xpu():
        return "vllm.v1.worker.xpu_worker.XPUWorker"
    return "vllm.v1.worker.gpu_worker.Worker"


def check_engine(vllm_config: Any) -> list[MergedSidePath]:
    """Refuse what can't give the answers of `generate`.

    Args:
        vllm_config: vLLM's configuration of a model that a side path belongs to.

    Returns:
        The side paths, in the order of their stages.

    Raises:
        ValueError: An option of vLLM or an axis of a side path can't work; the message names the remedy.
    """
    side_paths = merged_side_paths(vllm_config.model_config.hf_config.to_dict())
    for side_path in side_paths:
        check_causal(config_of(side_path).talan_memory_scope, side_path.adapter_name)
    server_strength(vllm_config)
    for reason in _reasons(vllm_config):
        raise ValueError(f"{reason} (for the TALAN side paths of {vllm_config.model_config.model!r})")
    return side_paths


def _reasons(vllm_config: Any) -> Iterator[str]:
    """Why this engine would not be exact, one sentence each."""
    parallel, model, cache = vllm_config.parallel_config, vllm_config.model_config, vllm_config.cache_config
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
        yield f"load_format={load_format!r}: its loader was not shown to build and fill side paths; use 'auto'"
