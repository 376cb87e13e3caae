"""The strength of the perturbations: one for a server, and for each request that asks for another.

A request's strength is kept per page, as its state is: the worker notes it as pages are given to the request, and a
token is written with the strength of its page. Requests of different strengths share no pages, since what a page holds
depends on it from the second side path on: the scheduler adds the strength to what a prefix is known by.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from ...tuner.strength import check_strength

STRENGTH_OPTION = "talan_strength"
"""The key in vLLM's option `additional_config`, for a server, and in `SamplingParams.extra_args`, for a request."""

SESSION_REFUSAL = (
    f"extra_args={{{STRENGTH_OPTION!r}: ...}}: the prompt comes in pieces, whose strengths could differ; send it "
    "whole, or start a server with that strength"
)
"""Why a prompt that is streamed in has no strength of its own."""


def server_strength(vllm_config: Any) -> float:
    """Read the strength that a server was started with.

    Args:
        vllm_config: vLLM's configuration.

    Returns:
        What scales the perturbations; 1 where nothing was said.

    Raises:
        ValueError: It is not a finite number.
    """
    options = vllm_config.additional_config
    return check_strength(options.get(STRENGTH_OPTION, 1.0) if isinstance(options, dict) else 1.0)


def request_strength(sampling_params: Any) -> float | None:
    """Read the strength that a request asks for.

    Args:
        sampling_params: vLLM's `SamplingParams`; None for a request that generates nothing.

    Returns:
        What scales the perturbations in place of the server's strength; None where nothing was said.

    Raises:
        ValueError: It is not a finite number.
    """
    arguments = getattr(sampling_params, "extra_args", None) or {}
    return check_strength(arguments[STRENGTH_OPTION]) if STRENGTH_OPTION in arguments else None


class StrengthCheck(LogitsProcessor, LogitsProcessorV2):
    """Refuses requests whose strength is no finite number, by vLLM's hook for such checks; it changes no logits.

    It has the methods that vLLM's first model runner asks for, and those of the second.
    """

    def __init__(self, *_: Any) -> None: ...

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Look at a request before it is taken."""
        request_strength(sampling_params)

    def apply(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        """Return the logits as they are."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Tell the first runner that the likeliest token stays what it is."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Take the first runner's news of the batch."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Tell the second runner that this request's logits stay what they are."""
        return False


def keep_prefixes_apart(request: Any) -> None:
    """Let a request share pages only with requests of the same strength, and of the same version of an adapter.

    Args:
        request: vLLM's `Request`, before it is scheduled; what its prefixes are known by is computed again.
    """
    strength = request_strength(request.sampling_params)
    if strength is not None or request.cache_salt is not None:
        # All salts are put in this form, so that no request can choose one that stands for another's strength.
        request.cache_salt = json.dumps([strength, request.cache_salt])
    elif request.lora_request is None:
        return
    # An adapter's name is a part of what vLLM knows a prefix by.
    request.block_hashes = []
    request.update_block_hashes()


class PageStrengths:
    """Knows the strength of each page's tokens, in one worker.

    Args:
        server: The strength of requests that ask for none.
        cache_config: vLLM's configuration of the cache, which knows the number of pages once they are created.
        device: Where the pages are.
    """

    def __init__(self, server: float, cache_config: Any, device: torch.device) -> None:
        self.server = server
        self._cache_config, self._device = cache_config, device
        self._of_request: dict[str, float] = {}
        self._table: torch.Tensor | None = None
        self._differ = False

    @property
    def table(self) -> torch.Tensor:
        """The strength of each page, [pages], float32; changed in place, since CUDA graphs read it."""
        pages = self._cache_config.num_gpu_blocks
        if self._table is None or self._table.shape[0] != pages:
            self._table = torch.full((pages,), self.server, dtype=torch.float32, device=self._device)
        return self._table

    @torch.inference_mode()
    def follow(self, scheduled: Any) -> None:
        """Note the strength of pages that a step gives to requests, before it runs.

        Args:
            scheduled: vLLM's `SchedulerOutput`.
        """
        for name in scheduled.finished_req_ids:
            self._of_request.pop(name, None)
        given: list[tuple[str, Any]] = []
        for request in scheduled.scheduled_new_reqs:
            strength = request_strength(request.sampling_params)
            if strength is not None:
                self._of_request[request.req_id] = strength
                self._differ = True
            given.append((request.req_id, request.block_ids))
        if not self._differ:
            return
        again = scheduled.scheduled_cached_reqs
        given.extend(zip(again.req_ids, again.new_block_ids, strict=True))
        pages: dict[int, float] = {}
        for name, groups in given:
            strength = self._of_request.get(name, self.server)
            pages.update((page, strength) for group in groups or () for page in group)
        if pages:
            index = torch.tensor([*pages], device=self._device)
            self.table.index_copy_(0, index, torch.tensor([*pages.values()], device=self._device))

    def per_token(self, page_of_token: torch.Tensor, num_pages: int) -> torch.Tensor:
        """The strength of each token by its page, [tokens], float32; attention may cut a page into several."""
        return self.table.index_select(0, page_of_token // (num_pages // self.table.shape[0]))
