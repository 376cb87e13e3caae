"""Lets `pip install` be enough: `import torch` calls `prepare`; PEFT and transformers know TALAN once imported.

It uses the standard library alone and imports neither torch nor peft. `PEFT_TALAN_AUTOLOAD=0` switches it off.

`import torch` fails where an entry point of the group `torch.backends` can't be imported, so it needs this file, the
package's `__init__.py` and `version.py`, and nothing else of ours. Where the whole folder is gone and its metadata is
left, as with an editable install whose clone was deleted, PyTorch fails before any code of ours could run: an entry
point names a module to import and a function to call without arguments, and nothing in the standard library or PyTorch
could stand there for ours. The remedy is `pip uninstall peft-talan`, or `TORCH_DEVICE_BACKEND_AUTOLOAD=0`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

IMPORTED_BY_TORCH = "torch" in sys.modules
"""If torch calls `prepare`, whether it was torch, not the program, that imported this package."""


MODELS = "transformers.modeling_utils"
"""What builds models, and has to know merged ones."""


class _Registration:
    """Finds modules as the other finders do, and registers TALAN right after those that it waits for were executed."""

    def __init__(self) -> None:
        self.busy = False
        self.knows_models = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find PEFT, what builds models, or a module of this package, which must be whole before it is registered."""
        if self.busy or not self._awaits(name):
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        loader = spec.loader

        def execute_and_register(module: ModuleType) -> None:
            del loader.exec_module  # the instance's; the class's own is left
            if name.startswith("transformers."):
                loader.exec_module(module)
                if _models_are_imported() and not self.knows_models:
                    self.knows_models = True
                    _or_warn(_know_merged_models)
                return
            self.busy = True
            try:
                loader.exec_module(module)
                if not name.startswith("peft_talan."):
                    _or_warn(register)
                elif _peft_is_imported():
                    register()
            finally:
                self.busy = False

        # On the loader itself, which was made for this spec: the module keeps the loader that it would have had.
        loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

    def _awaits(self, name: str) -> bool:
        # Where PEFT is importing torch, one of its last modules is awaited: what is needed of it is there by then.
        # Where transformers' models are, any later module of transformers: it imports one as it loads a merged model.
        models = (
            not self.knows_models and name.startswith("transformers.") and (name == MODELS or MODELS in sys.modules)
        )
        return models or name in ("peft", "peft.mapping_func") or name.startswith("peft_talan.")


def _models_are_imported() -> bool:
    return hasattr(sys.modules.get(MODELS), "PreTrainedModel")


def _peft_is_imported() -> bool:
    """Whether PEFT's own import is past all that is needed of it."""
    return hasattr(sys.modules.get("peft"), "get_peft_model")


def register() -> None:
    """Register TALAN with PEFT, and let continuous batching look at its models; a second call does nothing."""
    from .serving.continuous_batching import check_managers
    from .tuner.registry import register_talan

    register_talan()
    check_managers()
    _stop_waiting()


def _know_merged_models() -> None:
    from .tuner.merged_loading import let_transformers_build_merged_models

    let_transformers_build_merged_models()


def _or_warn(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with this package, `import peft` must work
        _stop_waiting()  # What fails once fails again: one warning.
        _warn(error)


def _warn(error: Exception) -> None:
    warnings.warn(
        f"peft_talan could not register itself with PEFT ({type(error).__name__}: {error}); TALAN adapters will not "
        "load. Call peft_talan.register_talan() to see why, or set PEFT_TALAN_AUTOLOAD=0.",
        stacklevel=3,
    )


def wait_for_peft() -> None:
    """Register as soon as PEFT is imported: at once where it is already; transformers' models likewise."""
    if _peft_is_imported():
        register()
        return
    if _models_are_imported():
        _know_merged_models()
    if not any(isinstance(finder, _Registration) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registration())


def _stop_waiting() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Registration)]


def prepare() -> None:
    """Wait for PEFT; whatever fails is one warning, since `import torch` must work."""
    try:
        if os.environ.get("PEFT_TALAN_AUTOLOAD") != "0":
            wait_for_peft()
        elif IMPORTED_BY_TORCH:
            # As though torch had not called: the program's own `import peft_talan` starts again.
            _stop_waiting()
            for name in [name for name in sys.modules if name.partition(".")[0] == "peft_talan"]:
                del sys.modules[name]
    except Exception as error:  # noqa: BLE001 - the same for `import torch`
        _warn(error)
