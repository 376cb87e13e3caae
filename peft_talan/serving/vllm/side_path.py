"""A block's side path in vLLM: one memory state a page, read and written by one operator a call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from ...config import TalanConfig
from ...functional.ragged import ragged_side_path
from ...tuner.layer import TalanLayer
from ..pages import PagedMemory, of_tokens, page_ends, read_states, request_ends, write_states
from .strength import PageStrengths

ADAPTER_NAME = "default"
NULL_PAGE = 0
"""The page that vLLM gives to no request."""

_ENDING = ".talan"
"""What a layer's name has after that of its block's attention."""

_PAGES = "peft_talan.pages"
"""Where the context of a forward pass keeps the pages of its calls."""


class Pages(NamedTuple):
    """The pages that one forward pass reads and writes, for all blocks of one kind of attention.

    Args:
        starts: Where each request starts and the last one ends, [requests + 1], int; None: each token is a request.
        longest: The number of tokens of the longest request, or more.
        before: The page of each request's previous token, [requests], int64.
        is_new: Whether the request begins with this call, [requests], bool.
        snapshot_positions: The tokens after which a state is stored, [snapshots], int64; None: each request's last.
        after: Their pages, [snapshots or requests], int64.
        alpha: The strength of each token's perturbation, [tokens], float32.
    """

    starts: torch.Tensor | None
    longest: int
    before: torch.Tensor
    is_new: torch.Tensor
    snapshot_positions: torch.Tensor | None
    after: torch.Tensor
    alpha: torch.Tensor


def find_pages(metadata: Any, tokens: int, pages: int, page_size: int, strengths: PageStrengths) -> Pages:
    """Find the pages of a forward pass.

    Args:
        metadata: What vLLM tells the attention of some blocks about the batch.
        tokens: The number of tokens, with padding.
        pages: The number of pages.
        page_size: Tokens a page.
        strengths: The strengths of the pages' tokens.

    Returns:
        The pages.
    """
    starts, block_table = metadata.query_start_loc, metadata.block_table
    requests = starts.shape[0] - 1
    before = metadata.seq_lens[:requests] - (starts[1:] - starts[:-1])
    last = (before - 1).clamp_(min=0) // page_size
    page_before = block_table[:requests].gather(1, last.long().unsqueeze(1)).squeeze(1).long()
    # Padding has no place in a page, and a batch that is padded for a CUDA graph may have no places for it at all.
    slots = F.pad(metadata.slot_mapping, (0, tokens - metadata.slot_mapping.shape[0]), value=-1)
    page_of_token = torch.where(slots < 0, NULL_PAGE, slots // page_size).long()
    alpha, is_new = strengths.of_tokens(page_of_token, pages), before == 0
    if metadata.max_query_len == 1:
        of_requests = (page_before, is_new, request_ends(page_of_token, starts, NULL_PAGE))
        page_before, is_new, after = (of_tokens(tensor, tokens, NULL_PAGE) for tensor in of_requests)
        return Pages(None, 1, page_before, is_new, None, after, alpha)
    snapshot_positions, after = page_ends(page_of_token, starts, page_size, NULL_PAGE)
    return Pages(starts, metadata.max_query_len, page_before, is_new, snapshot_positions, after, alpha)


class PagedSidePath(TalanLayer):
    """The side path of one block, with the memory of all requests in a pool of pages as the block's attention has it.

    Args:
        hidden_size: H, the width of the residual stream.
        block_index: The block's index.
        config: The adapter's configuration.
        strengths: What scales the perturbations.
        attention: The block's attention layer, whose pages the memory follows.
    """

    def __init__(
        self, hidden_size: int, block_index: int, config: TalanConfig, strengths: PageStrengths, attention: Any
    ) -> None:
        super().__init__(hidden_size, block_index)
        self.add_side_path(ADAPTER_NAME, config)
        self.requires_grad_(False)
        self.strengths = strengths
        self.position = config.talan_position
        self.slots, self.width = config.talan_slots, config.talan_dim
        # In a tuple: it is the block's module.
        self._attention = (attention,)
        self.layer_name = f"{attention.layer_name}{_ENDING}"
        self.memory = PagedMemory()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Change the residual stream of a batch of requests, at one end of the block.

        Args:
            hidden_states: h, [tokens, hidden_size] or [1, tokens, hidden_size].

        Returns:
            h', likewise.
        """
        # vLLM's Transformers backend has a batch of one.
        flat = hidden_states if hidden_states.dim() == 2 else hidden_states.squeeze(0)
        if flat.dim() != 2:
            raise ValueError(f"hidden states of shape {tuple(hidden_states.shape)} are not one residual stream")
        # Made outside of the operator: CUDA graphs around it then find the output in the same place every time.
        output = torch.empty_like(flat)
        torch.ops.peft_talan.paged_side_path(flat, output, self.layer_name)
        return output.view_as(hidden_states)

    def run(self, hidden_states: torch.Tensor, output: torch.Tensor, context: Any) -> None:
        """Compute what `forward` gives.

        Args:
            hidden_states: h, [tokens, hidden_size].
            output: h', likewise; written in place.
            context: vLLM's `ForwardContext`, which also carries from block to block what is the same for several.

        Raises:
            RuntimeError: This version of vLLM lays keys and values out in a way that is not known here.
        """
        (attention,) = self._attention
        cache = attention.kv_cache
        if cache.dim() != 4 or cache.shape[1] != attention.num_kv_heads:
            raise RuntimeError(
                f"keys and values of shape {tuple(cache.shape)} are not laid out as [pages, heads, tokens, channels]; "
                "install a version of vLLM that the documentation of peft_talan names"
            )
        metadata = context.attn_metadata[attention.layer_name]
        # Blocks whose attention has the same pages share its object.
        known, key = context.additional_kwargs.setdefault(_PAGES, {}), id(metadata)
        if key not in known:
            known[key] = find_pages(metadata, hidden_states.shape[0], cache.shape[0], cache.shape[2], self.strengths)
        pages: Pages = known[key]
        shape = (cache.shape[0], self.slots, self.width + 1)
        pool = self.memory.pool(self.block_index, ADAPTER_NAME, shape, hidden_states)
        result = ragged_side_path(
            hidden_states,
            self.parameters_of(ADAPTER_NAME),
            self.talan_options[ADAPTER_NAME],
            cu_seqlens=pages.starts,
            state=read_states(pool, pages.before, pages.is_new),
            max_query_length=pages.longest,
            snapshot_positions=pages.snapshot_positions,
            alpha=pages.alpha,
        )
        write_states(pool, pages.after, result.states)
        output.copy_(result.hidden_states)


def paged_side_path(hidden_states: torch.Tensor, output: torch.Tensor, layer_name: str) -> None:
    """Run the side path of a layer: what vLLM's compiler sees of it.

    Args:
        hidden_states: h, [tokens, hidden_size].
        output: h', likewise; written in place.
        layer_name: The layer's name.
    """
    context = get_forward_context()
    layer = context.no_compile_layers[layer_name]
    if context.attn_metadata is None:  # vLLM warms up, without requests.
        output.copy_(hidden_states)
        return
    layer.run(hidden_states, output, context)


def _paged_side_path_fake(hidden_states: torch.Tensor, output: torch.Tensor, layer_name: str) -> None:
    return


OPERATOR = "peft_talan::paged_side_path"
_LIBRARY = torch.library.Library("peft_talan", "FRAGMENT")

direct_register_custom_op(
    op_name="paged_side_path",
    op_func=eager_break_during_capture(paged_side_path),
    mutates_args=["output"],
    fake_impl=_paged_side_path_fake,
    target_lib=_LIBRARY,
)
