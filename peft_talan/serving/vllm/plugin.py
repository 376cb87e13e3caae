"""Lets vLLM serve models with an embedded TALAN adapter: the entry point of the group `vllm.general_plugins`.

vLLM calls `register` in each of its processes. It only wraps four methods of vLLM's; what serves the side paths is
imported where a model has one.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

_MARK = "_looks_for_talan"


def register() -> None:
    """Look for embedded TALAN adapters when vLLM configures an engine and builds a model, and for requests' strengths.

    Where this vLLM lacks a method, a warning says so; such models are then refused by vLLM itself.
    """
    # Where engines are configured, vLLM has imported this module by now; other processes have no use for it.
    arguments = sys.modules.get("vllm.engine.arg_utils")
    try:
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader
        from vllm.v1.engine.input_processor import InputProcessor
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        methods: list[tuple[type, str, Callable[..., Any]]] = [
            (BaseModelLoader, "create_model", _create_model),
            (InputProcessor, "process_inputs", _process_inputs),
            (WorkerWrapperBase, "execute_model", _execute_model),
        ]
        if arguments is not None:
            methods.append((arguments.EngineArgs, "create_engine_config", _create_engine_config))
        # All or none.
        wrapped = [(owner, name, _wrapped(getattr(owner, name), wrapper)) for owner, name, wrapper in methods]
        for owner, name, method in wrapped:
            setattr(owner, name, method)
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"peft_talan does not know this version of vLLM ({error}); models with a TALAN adapter will not load. "
            "Install a version of vLLM that the documentation of peft_talan names",
            stacklevel=2,
        )


def _wrapped(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(original, _MARK):
        return original  # vLLM may load its plugins more than once in a process.

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    return wrapped


def has_embedded_adapter(model: str, revision: str | None) -> bool:
    """Whether a model folder or a repository on the hub holds a TALAN adapter.

    Args:
        model: The folder, or the repository's name.
        revision: The repository's branch, tag or commit. None: the main one.

    Returns:
        True where its `adapter_config.json` is one of TALAN.
    """
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    config = get_hf_file_to_dict("adapter_config.json", model, revision)
    return config is not None and config.get("peft_type") == "TALAN"


def _create_engine_config(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    vllm_config = original(self, *args, **kwargs)
    model = vllm_config.model_config
    if has_embedded_adapter(model.model, model.revision):
        from .checks import check_engine, choose_scheduler

        check_engine(vllm_config)
        choose_scheduler(vllm_config)
    return vllm_config


def _create_model(
    original: Callable[..., Any], self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any
) -> Any:
    if not has_embedded_adapter(model_config.model, model_config.revision):
        return original(self, vllm_config, model_config, *args, **kwargs)
    try:
        from peft_talan.serving.vllm.loader import model_with_side_paths
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"model={model_config.model!r}: this version of vLLM lacks what its TALAN side path needs ({error}); "
            "install a version of vLLM that the documentation of peft_talan names"
        ) from error

    create = functools.partial(original, self, vllm_config, model_config, *args, **kwargs)
    return model_with_side_paths(create, vllm_config, model_config)


def _process_inputs(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(self, *args, **kwargs)
    if str(self.vllm_config.scheduler_config.scheduler_cls).startswith("peft_talan."):
        from .strength import check_request

        check_request(self.vllm_config, request)
    return request


def _execute_model(original: Callable[..., Any], self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    # Imported by now in the workers of a model with a side path.
    strength = sys.modules.get("peft_talan.serving.vllm.strength")
    if strength is not None:
        strength.follow(self.vllm_config, scheduler_output)
    return original(self, scheduler_output, *args, **kwargs)
