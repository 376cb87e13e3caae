"""vLLM's schedulers, but no request goes on from a page that another request writes in the same step.

vLLM shares a page as soon as its tokens are scheduled: attention writes all keys and values before it reads any. A
side path reads the memory of every request before it writes any, so such a request waits for the next step. vLLM
does the same for its own recurrent layers (`MambaManager.get_num_blocks_to_allocate`).
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from .strength import keep_prefixes_apart


class PageDependencies:
    """Knows the pages that are written in the current step of a scheduler, and holds back requests that need them.

    Args:
        manager: The scheduler's manager of pages; its two methods are replaced by those of this class.
    """

    def __init__(self, manager: KVCacheManager) -> None:
        self.manager = manager
        self.written: set[int] = set()
        self._allocate_slots, self._new_step_starts = manager.allocate_slots, manager.new_step_starts
        manager.allocate_slots = self.allocate_slots
        manager.new_step_starts = self.new_step_starts

    def new_step_starts(self) -> None:
        """Forget the pages of the step before."""
        self.written.clear()
        self._new_step_starts()

    def allocate_slots(
        self,
        request: Any,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Give a request the pages for its next tokens, as vLLM does.

        Args:
            request: The request.
            num_new_tokens: The tokens to compute.
            num_new_computed_tokens: The tokens found in the prefix cache.
            new_computed_blocks: The pages of these.
            *args: As in vLLM.
            **kwargs: As in vLLM.

        Returns:
            The new pages, or None where the request can't run in this step.
        """
        found = () if new_computed_blocks is None else new_computed_blocks.blocks
        if any(pages and pages[-1].block_id in self.written for pages in found):
            return None
        given = self._allocate_slots(
            request, num_new_tokens, num_new_computed_tokens, new_computed_blocks, *args, **kwargs
        )
        if given is not None:
            first = request.num_computed_tokens + num_new_computed_tokens
            managers = self.manager.coordinator.single_type_managers
            for manager, pages in zip(managers, self.manager.get_block_ids(request.request_id), strict=True):
                self.written.update(pages[first // manager.block_size :])
        return given


class PageScheduler(Scheduler):
    """vLLM's scheduler, with `PageDependencies`; requests share pages only at equal strengths."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dependencies = PageDependencies(self.kv_cache_manager)

    def add_request(self, request: Any) -> None:
        """Take a request, as vLLM does.

        Args:
            request: The request.
        """
        keep_prefixes_apart(request)
        super().add_request(request)


class AsyncPageScheduler(AsyncScheduler):
    """vLLM's asynchronous scheduler, with `PageDependencies`; requests share pages only at equal strengths."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dependencies = PageDependencies(self.kv_cache_manager)

    def add_request(self, request: Any) -> None:
        """Take a request, as vLLM does.

        Args:
            request: The request.
        """
        keep_prefixes_apart(request)
        super().add_request(request)
