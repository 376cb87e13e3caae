"""Refuses a merged model where an adapter is expected, and names the call that loads it.

PEFT and transformers say of such a folder only that it has no `adapter_config.json`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedConfig
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from .merged_config import merged_side_paths, say_what_loads

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""The arguments that transformers finds files by."""


@contextmanager
def merged_models_refused(argument: str, name: object, options: Mapping[str, Any]) -> Iterator[None]:
    """Name the call that loads a merged model, if the body fails because `name` is one; a file is only read then."""
    try:
        yield
    except (ValueError, OSError):
        given = {option: options[option] for option in HUB_OPTIONS if options.get(option) is not None}
        config = _merged_config(str(name), given)
        if config is None:
            raise
        raise ValueError(say_what_loads(argument, str(name), config, given)) from None


def _merged_config(name: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration of a merged model without an adapter beside it; None of anything else."""
    # What failed has asked the hub for this file. If the hub answered, that is in the cache; else it can't be reached.
    file = Path(options.get("subfolder") or "", ADAPTER_CONFIG_NAME)
    try:
        if Path(name).is_dir():
            answer = str(file) if Path(name, file).is_file() else None
        else:
            answer = try_to_load_from_cache(name, str(file), options.get("cache_dir"), options.get("revision"))
        if isinstance(answer, str):
            return None
        local = {"local_files_only": True} if answer is None else {}
        config: dict[str, Any] = PreTrainedConfig.get_config_dict(name, **{**options, **local})[0]
    except (OSError, HFValidationError):
        return None
    return config if merged_side_paths(config) else None


def let_peft_refuse_merged_models() -> None:
    """Wrap the two methods by which PEFT reads the configuration of whatever it loads."""
    from peft.config import PeftConfigMixin

    methods: Any = PeftConfigMixin
    get_type, read = methods._get_peft_type.__func__, methods.from_pretrained.__func__

    @functools.wraps(get_type)
    def _get_peft_type(cls: Any, model_id: Any, **options: Any) -> Any:
        with merged_models_refused("model_id", model_id, options):
            return get_type(cls, model_id, **options)

    @functools.wraps(read)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, subfolder: str | None = None, **options: Any
    ) -> Any:
        place = {"subfolder": subfolder, **options}
        with merged_models_refused("pretrained_model_name_or_path", pretrained_model_name_or_path, place):
            return read(cls, pretrained_model_name_or_path, **place)

    # mypy takes methods for final, and what `wraps` returns for no function.
    PeftConfigMixin._get_peft_type = classmethod(_get_peft_type)  # type: ignore[method-assign, assignment, arg-type]
    PeftConfigMixin.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign, assignment, arg-type]


def let_transformers_refuse_merged_models() -> None:
    """Wrap transformers' `load_adapter`, which looks for an adapter's configuration before it calls PEFT."""
    from transformers.integrations.peft import PeftAdapterMixin

    load = PeftAdapterMixin.load_adapter

    @functools.wraps(load)
    def load_adapter(self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        options = {**kwargs, **(kwargs.get("adapter_kwargs") or {})}
        with merged_models_refused("peft_model_id", peft_model_id, options):
            return load(self, peft_model_id, *args, **kwargs)

    # As above.
    PeftAdapterMixin.load_adapter = load_adapter  # type: ignore[method-assign]
