"""vLLM's worker on this machine, whose side paths know each request's strength: the option `worker_cls`."""

from __future__ import annotations

from typing import Any

from vllm.utils.import_utils import resolve_obj_by_qualname

from .checks import platform_worker
from .loader import side_paths_of


class SidePathWorker(resolve_obj_by_qualname(platform_worker())):  # type: ignore[misc]
    """Vllm's worker; importing its module registers the loaders that it needs."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, as vLLM does.

        Args:
            *args: As in vLLM.
            **kwargs: As in vLLM.
        """
        super().load_model(*args, **kwargs)
        # All side paths of a worker share them.
        self.page_strengths = next(iter(side_paths_of(self.get_model()).values())).strengths

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step, as vLLM does.

        Args:
            scheduler_output: vLLM's `SchedulerOutput`.

        Returns:
            What vLLM returns.
        """
        self.page_strengths.follow(scheduler_output)
        return super().execute_model(scheduler_output)
