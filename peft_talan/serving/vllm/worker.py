"""vLLM's worker on this machine, whose side paths know each request's strength: the option `worker_cls`."""

from __future__ import annotations

from typing import Any

from vllm.utils.import_utils import resolve_obj_by_qualname

from .checks import platform_worker
from .loader import side_paths_of


class SidePathWorker(resolve_obj_by_qualname(platform_worker())):  # type: ignore[misc]
    """The platform's worker; it also registers the loaders, which are imported with it."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, as vLLM does."""
        super().load_model(*args, **kwargs)
        # All side paths of a worker share them.
        self.page_strengths = side_paths_of(self.get_model())[0].strengths

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step, as vLLM does, once the strengths of its requests are known."""
        self.page_strengths.follow(scheduler_output)
        return super().execute_model(scheduler_output)
