"""Lets vLLM serve merged models with a side path: the entry point of the group `vllm.general_plugins`.

vLLM calls `register` in each of its processes. It wraps one method, which configures engines: vLLM's own options then
name the classes that serve side paths, if the model has any.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

from ...checkpoint.merged_config import merged_side_paths

_MARK = "_looks_for_side_paths"

_PARTS = ("checks", "loader", "scheduling")
"""Imported before an engine is configured, so that a name that this vLLM lacks is said before a model is built."""


def register() -> None:
    """Look for side paths when vLLM configures an engine; there is no public hook for that.

    Where this vLLM lacks the method, a warning says so; such models are then refused by vLLM itself.
    """
    # Where engines are configured, vLLM has imported this module by now; other processes have no use for it.
    arguments = sys.modules.get("vllm.engine.arg_utils")
    if arguments is None:
        return
    original = getattr(arguments.EngineArgs, "create_engine_config", None)
    if original is None:
        warnings.warn(
            "peft_talan does not know this version of vLLM (it lacks EngineArgs.create_engine_config); models with a "
            "TALAN adapter will not load. Install a version of vLLM that the documentation of peft_talan names",
            stacklevel=2,
        )
    elif not hasattr(original, _MARK):  # vLLM may load its plugins more than once in a process.
        arguments.EngineArgs.create_engine_config = _configuring(original)


def _configuring(original: Callable[..., Any]) -> Callable[..., Any]:
    """The method, and what a model with a side path needs."""

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        model = vllm_config.model_config
        if merged_side_paths(model.hf_config.to_dict()):
            try:
                checks, *_ = (importlib.import_module(f".{part}", __package__) for part in _PARTS)
            except (ImportError, AttributeError) as error:
                raise RuntimeError(
                    f"model={model.model!r}: this version of vLLM lacks what its TALAN side path needs ({error}); "
                    "install a version of vLLM that the documentation of peft_talan names"
                ) from error
            checks.configure(vllm_config)
        return vllm_config

    setattr(create_engine_config, _MARK, True)
    return create_engine_config
