"""Lets `pip install` be enough: `import torch` calls `prepare`, and PEFT knows TALAN from its own import on.

This folder is installed as the package `peft_talan_autoload`, apart from `peft_talan`, whose import costs seconds. It
uses the standard library alone and imports neither torch nor peft. `PEFT_TALAN_AUTOLOAD=0` switches it off.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Registration:
    """Finds a module as the other finders do, and registers TALAN right after it was executed."""

    def __init__(self, awaited: str) -> None:
        self.awaited = awaited

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the awaited module."""
        if name != self.awaited:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        # On the loader itself, which was made for this spec: the module keeps the loader that it would have had.
        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _warn(error: Exception) -> None:
    warnings.warn(
        f"peft_talan could not register itself with PEFT ({type(error).__name__}: {error}); TALAN adapters will not "
        "load. Import peft_talan to see why, or set PEFT_TALAN_AUTOLOAD=0.",
        stacklevel=3,
    )


def _register() -> None:
    try:
        importlib.import_module("peft_talan")
    except Exception as error:  # noqa: BLE001 - whatever is wrong with this package, `import peft` must work
        _warn(error)


def prepare() -> None:
    """Wait for PEFT; whatever fails is one warning, since `import torch` must work."""
    if os.environ.get("PEFT_TALAN_AUTOLOAD") == "0":
        return
    try:
        # Where peft is importing torch, one of its last modules is awaited: what is needed of peft is there by then.
        awaited = "peft.mapping_func" if "peft" in sys.modules else "peft"
        sys.meta_path.insert(0, _Registration(awaited))
    except Exception as error:  # noqa: BLE001 - the same for `import torch`
        _warn(error)
