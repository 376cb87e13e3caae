"""vLLM's schedulers, but no request continues from a page that another request writes in the same step.

vLLM shares a page as soon as its tokens are scheduled: attention writes all keys and values before it reads any. A
side path reads the state of every request before it writes any, so such a request waits for the next step. vLLM
does the same for its own recurrent layers (`MambaManager.get_num_blocks_to_allocate`).
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import RequestStatus

from ...private_names import OURS
from .adapter_versions import NEEDED_ADAPTERS, AdapterVersions
from .strength import SESSION_REFUSAL, STRENGTH_OPTION, keep_prefixes_apart, request_strength


class _DependentPages:
    """Stands before vLLM's manager of pages, and holds requests back that need a page which this step writes."""

    def __init__(self, manager: KVCacheManager) -> None:
        self.manager = manager
        self.written: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.manager, name)

    def new_step_starts(self) -> None:
        self.written.clear()
        self.manager.new_step_starts()

    def allocate_slots(
        self,
        request: Any,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Give a request the pages for its next tokens; None where it can't run in this step."""
        found = () if new_computed_blocks is None else new_computed_blocks.blocks
        if any(pages and pages[-1].block_id in self.written for pages in found):
            return None
        given = self.manager.allocate_slots(
            request, num_new_tokens, num_new_computed_tokens, new_computed_blocks, *args, **kwargs
        )
        if given is not None:
            first = request.num_computed_tokens + num_new_computed_tokens
            for number, manager in enumerate(self.manager.coordinator.single_type_managers):
                # Other requests find full pages alone.
                full = slice(first // manager.block_size, (first + num_new_tokens) // manager.block_size)
                if full.start < full.stop:
                    pages = self.manager.get_blocks(request.request_id).blocks[number]
                    self.written.update(page.block_id for page in pages[full])
        return given


class PageScheduler(Scheduler):
    """vLLM's scheduler, where no request needs a page of the same step; pages are shared at equal strengths only."""

    kv_cache_manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kv_cache_manager = _DependentPages(self.kv_cache_manager)
        self.refused: set[str] = set()
        self.needed: Counter[int] = Counter()
        self.versions = AdapterVersions(0 if self.lora_config is None else self.lora_config.max_cpu_loras)
        _tell_schedulers_of_loads()

    def add_request(self, request: Any) -> None:
        """Take a request, as vLLM does; a prompt that comes in pieces is refused if it has a strength."""
        if request.resumable and request_strength(request.sampling_params) is not None:
            self.refused.add(request.request_id)
            # What it computes before it ends lies in pages of the server's strength.
            given = request.sampling_params.extra_args.items()
            request.sampling_params.extra_args = {name: value for name, value in given if name != STRENGTH_OPTION}
        if request.lora_request is not None:
            request.lora_request = self.versions.named_by(request.lora_request)
        keep_prefixes_apart(request)
        # Further pieces of a prompt come under the name of the first, whose adapter stays that of all.
        is_new = request.request_id not in self.requests
        super().add_request(request)
        if is_new and request.lora_request is not None:
            self.needed[request.lora_request.lora_int_id] += 1

    def _free_blocks(self, request: Any) -> None:
        """Let a request go, as vLLM does: here all of them end, be it later than they are said to be finished."""
        super()._free_blocks(request)
        if request.lora_request is not None:
            number = request.lora_request.lora_int_id
            self.needed[number] -= 1
            if not self.needed[number]:
                del self.needed[number]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Plan a step, as vLLM does; workers hear which adapters requests need, those among them that wait."""
        scheduled = super().schedule(*args, **kwargs)
        if self.lora_config is not None:
            setattr(scheduled, NEEDED_ADAPTERS, {*self.needed, *self.versions.kept})
        return scheduled

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        """End the step, as vLLM does, and refused requests: their output is an error, whose `stop_reason` says why."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(*args, **kwargs)
        for request in self.finish_requests(self.refused, RequestStatus.FINISHED_ERROR) if self.refused else ():
            error = EngineCoreOutput(
                request.request_id, [], finish_reason=request.get_finished_reason(), stop_reason=SESSION_REFUSAL
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(error)
        self.refused.clear()
        return outputs


class AsyncPageScheduler(PageScheduler, AsyncScheduler):
    """The same for asynchronous scheduling."""


def _tell_schedulers_of_loads() -> None:
    """Let an engine load adapters by way of its scheduler, which names those of requests; vLLM has no hook for it."""
    original = EngineCore.add_lora
    if hasattr(original, OURS):
        return

    @functools.wraps(original)
    def add_lora(self: Any, lora_request: Any) -> bool:
        load = functools.partial(original, self)
        if not isinstance(self.scheduler, PageScheduler):
            return bool(load(lora_request))
        return self.scheduler.versions.load(lora_request, load)

    setattr(add_lora, OURS, True)
    EngineCore.add_lora = add_lora
