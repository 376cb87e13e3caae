"""Lets vLLM serve models with an embedded TALAN adapter: the entry point of the group `vllm.general_plugins`.

vLLM calls `register` in each of its processes. It wraps one method, which configures engines: where a model embeds an
adapter, vLLM's own options then name the classes that serve its side path.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

_MARK = "_looks_for_talan"

_PARTS = ("checks", "loader", "scheduling")
"""Imported before an engine is configured, so that a name that this vLLM lacks is said before a model is built."""


def register() -> None:
    """Look for embedded TALAN adapters when vLLM configures an engine; there is no public hook for that.

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
        if has_embedded_adapter(model.model, model.revision):
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
