"""The adapters that vLLM's option `additional_config` names; nothing of vLLM is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OPTION = "talan"
"""The key in vLLM's option `additional_config` whose entry `adapters` lists folders."""


def named_adapters(options: Any) -> list[str]:
    """Read the adapters that `additional_config` names.

    Args:
        options: vLLM's `additional_config`.

    Returns:
        The folders.

    Raises:
        ValueError: The entry is not what is documented.
    """
    entry = options.get(OPTION, {}) if isinstance(options, Mapping) else {}
    adapters = entry.get("adapters", []) if isinstance(entry, Mapping) and set(entry) <= {"adapters"} else None
    if not isinstance(adapters, list) or not all(isinstance(folder, str) for folder in adapters):
        raise ValueError(f'additional_config["talan"]={entry!r}: give {{"adapters": [FOLDER, ...]}}')
    return adapters
