"""Lets vLLM serve merged models, and adapters, with a side path: the entry point of the group `vllm.general_plugins`.

vLLM calls `register` in each of its processes. It wraps two methods: one reads the command line, where adapters may be
named, and one configures engines. vLLM's own options then name the classes that serve side paths, if there are any.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from ...checkpoint.merged_config import merged_side_paths
from .adapter_options import OPTION, named_adapters

_MARK = "_looks_for_side_paths"

_PARTS = ("checks", "loader", "scheduling", "worker")
"""Imported before an engine is configured, so that a name that this vLLM lacks is said before a model is built."""


def register() -> None:
    """Look for side paths when vLLM configures an engine; there is no public hook for that.

    Where this vLLM lacks the method, a warning says so; such models are then refused by vLLM itself.
    """
    # Where engines are configured, vLLM has imported this module by now; other processes have no use for it.
    arguments = sys.modules.get("vllm.engine.arg_utils")
    if arguments is None:
        return
    configure = getattr(arguments.EngineArgs, "create_engine_config", None)
    from_command_line = getattr(arguments.EngineArgs, "from_cli_args", None)
    if configure is None or from_command_line is None:
        warnings.warn(
            "peft_talan does not know this version of vLLM (it lacks EngineArgs.create_engine_config or its "
            "from_cli_args); models with a TALAN adapter will not load. Install a version of vLLM that the "
            "documentation of peft_talan names",
            stacklevel=2,
        )
    elif not hasattr(configure, _MARK):  # vLLM may load its plugins more than once in a process.
        arguments.EngineArgs.create_engine_config = _configuring(configure)
        arguments.EngineArgs.from_cli_args = classmethod(_naming_adapters(from_command_line.__func__))


def _configuring(original: Callable[..., Any]) -> Callable[..., Any]:
    """The method, and what a model or adapters with a side path need."""

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        model, options = vllm_config.model_config, vllm_config.additional_config
        if merged_side_paths(model.hf_config.to_dict()) or (isinstance(options, dict) and OPTION in options):
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


def _naming_adapters(original: Callable[..., Any]) -> Callable[..., Any]:
    """The method, which hands the TALAN adapters of `--lora-modules` on to the engine."""

    @functools.wraps(original)
    def from_cli_args(cls: type, args: Any) -> Any:
        engine_args = original(cls, args)
        named = [module.path for module in getattr(args, "lora_modules", None) or () if _is_talan(module.path)]
        if named and isinstance(engine_args.additional_config, dict):
            adapters = [*named_adapters(engine_args.additional_config), *named]
            engine_args.additional_config = {**engine_args.additional_config, OPTION: {"adapters": adapters}}
        return engine_args

    return from_cli_args


def _is_talan(adapter: str) -> bool:
    """Whether a folder, or a repository on the hub, holds a TALAN adapter; what can't be read is left to vLLM."""
    file = Path(adapter).expanduser() / "adapter_config.json"
    try:
        found = file if file.exists() else Path(hf_hub_download(adapter, file.name))
        return bool(json.loads(found.read_text(encoding="utf-8")).get("peft_type") == "TALAN")
    except (OSError, ValueError, HfHubHTTPError):
        return False
