"""Side paths in vLLM: one state per page, read and written by one operator per call of a block's layer."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from ...memory.token_layout import TokenLayout
from ...tuner.merged import MergedSidePaths
from ..pages import PagedMemory, PagePools, Pages
from .blocks import StreamPlace
from .strength import PageStrengths

NULL_PAGE = 0
"""The page that vLLM assigns to no request."""

_PAGES = "peft_talan.pages"
"""Where the context of a forward pass keeps the pages of its calls."""


def _find_pages(
    metadata: Any, tokens: int, num_pages: int, page_size: int, strengths: PageStrengths
) -> tuple[Pages, torch.Tensor]:
    """The pages of a forward pass, and the strength of each token, from the metadata of some blocks' attention."""
    cu_seqlens, block_table = metadata.query_start_loc, metadata.block_table
    requests = cu_seqlens.shape[0] - 1
    past = metadata.seq_lens[:requests] - cu_seqlens.diff()
    last = (past - 1).clamp_(min=0) // page_size
    previous = block_table[:requests].gather(1, last.long().unsqueeze(1)).squeeze(1).long()
    # Padding has no place in a page, and a batch that is padded for a CUDA graph may have no places for it at all.
    slots = F.pad(metadata.slot_mapping, (0, tokens - metadata.slot_mapping.shape[0]), value=-1)
    page_of_token = torch.where(slots < 0, NULL_PAGE, slots // page_size).long()
    pages = Pages.of_call(
        num_pages,
        page_of_token,
        cu_seqlens,
        metadata.max_query_len,
        previous,
        past == 0,
        page_size=page_size,
        unused_page=NULL_PAGE,
    )
    return pages, strengths.per_token(page_of_token, num_pages)


class AroundBlock(nn.Module):
    """Acts around a block's calls by one operator, with a state per page of the block's attention."""

    child_name: str

    def set_up(self, child_name: str, positions: Collection[str], attention: Any, strengths: PageStrengths) -> None:
        """Say what it needs, once the module is initialized.

        Args:
            child_name: The name as the block's child.
            positions: At which ends of the block it acts.
            attention: The block's attention layer, whose pages the states follow.
            strengths: The requests' strengths.
        """
        # In a tuple: it is the block's module.
        self._attention = (attention,)
        self.child_name, self.positions = child_name, positions
        self.layer_name = f"{attention.layer_name}.{child_name}"
        self.pools = PagePools()
        self.strengths = strengths

    def attach_to(self, block: nn.Module, place: StreamPlace) -> None:
        """Become the block's child and act around its calls.

        Args:
            block: The block.
            place: Where its calls carry the residual stream.
        """
        block.add_module(self.child_name, self)
        at_input, at_output = partial(self, position="input"), partial(self, position="output")
        if "input" in self.positions:
            # To this layer, what earlier ones left is a part of the block.
            block.register_forward_pre_hook(
                lambda _, args, kwargs: place.change_input(at_input, args, kwargs), with_kwargs=True, prepend=True
            )
        if "output" in self.positions:
            block.register_forward_hook(lambda _, __, output: place.change_output(at_output, output))

    def forward(self, hidden_states: torch.Tensor, position: str) -> torch.Tensor:
        """Change the residual stream of a batch of requests.

        Args:
            hidden_states: h, [tokens, hidden_size] or [1, tokens, hidden_size].
            position: `input` or `output`: which end of the block this is.

        Returns:
            h', likewise.
        """
        # vLLM's Transformers backend has a batch of one.
        flat = hidden_states if hidden_states.dim() == 2 else hidden_states.squeeze(0)
        if flat.dim() != 2:
            raise ValueError(f"hidden states of shape {tuple(hidden_states.shape)} are not one residual stream")
        # Created outside of the operator: CUDA graphs around it then find the output in the same place every time.
        output = torch.empty_like(flat)
        torch.ops.peft_talan.paged_side_paths(flat, output, self.layer_name, position)
        return output.view_as(hidden_states)

    def run_step(self, hidden_states: torch.Tensor, position: str, forward_context: ForwardContext) -> torch.Tensor:
        """Compute what `forward` returns, for the requests of one step.

        Args:
            hidden_states: h, [tokens, hidden_size].
            position: `input` or `output`.
            forward_context: vLLM's, which also carries from block to block what is the same for several.

        Returns:
            h', [tokens, hidden_size].

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
        metadata = forward_context.attn_metadata[attention.layer_name]
        # Blocks whose attention has the same pages share its object.
        known, key = forward_context.additional_kwargs.setdefault(_PAGES, {}), id(metadata)
        if key not in known:
            known[key] = _find_pages(metadata, hidden_states.shape[0], cache.shape[0], cache.shape[2], self.strengths)
        return self.run_requests(hidden_states, position, *known[key])

    def run_requests(
        self, hidden_states: torch.Tensor, position: str, pages: Pages, strength: torch.Tensor
    ) -> torch.Tensor:
        """Run the side paths of a step's requests, whose pages, and strengths by token, are known."""
        raise NotImplementedError


class _StepContext:
    """Stands for the context of a block's call: one step's requests, whose pages and strengths are known."""

    def __init__(self, layer: PagedSidePaths, pages: Pages, strength: torch.Tensor) -> None:
        self.layer, self.pages, self.strength = layer, pages, strength

    def layout(self, hidden_states: torch.Tensor) -> TokenLayout:
        return TokenLayout()

    def memory(self, child_name: str, name: str, *_: Any) -> PagedMemory:
        return PagedMemory(self.layer.pools, self.pages, self.layer.block_index, name, self.strength)


# Both bases define `forward`; that of `AroundBlock` is the one to call.
class PagedSidePaths(AroundBlock, MergedSidePaths):  # type: ignore[misc]
    """The side paths that one merge left on a block.

    Args:
        hidden_size: H, the width of the residual stream.
        block_index: The block's index.
        depth: The number of the model's blocks.
        stage: Which merge left them.
        attention: The block's attention layer, whose pages the states follow.
        strengths: The requests' strengths.
    """

    def __init__(
        self, hidden_size: int, block_index: int, depth: int, stage: int, attention: Any, strengths: PageStrengths
    ) -> None:
        super().__init__(hidden_size, block_index, depth, stage)
        self.set_up(self.child_name, self.talan_position.values(), attention, strengths)

    def run_requests(
        self, hidden_states: torch.Tensor, position: str, pages: Pages, strength: torch.Tensor
    ) -> torch.Tensor:
        """Run all side paths on all requests; see `AroundBlock.run_step`."""
        context: Any = _StepContext(self, pages, strength)
        return self.run(hidden_states, position, context, dict.fromkeys(self.talan_options))


def _paged_side_paths(hidden_states: torch.Tensor, output: torch.Tensor, layer_name: str, position: str) -> None:
    """Run the side paths of a layer: what vLLM's compiler sees of it; `output` is written in place."""
    context = get_forward_context()
    if context.attn_metadata is None:  # vLLM warms up, without requests.
        output.copy_(hidden_states)
    else:
        output.copy_(context.no_compile_layers[layer_name].run_step(hidden_states, position, context))


def _paged_side_paths_fake(hidden_states: torch.Tensor, output: torch.Tensor, layer_name: str, position: str) -> None:
    return


OPERATOR = "peft_talan::paged_side_paths"
_LIBRARY = torch.library.Library("peft_talan", "FRAGMENT")

direct_register_custom_op(
    op_name="paged_side_paths",
    op_func=eager_break_during_capture(_paged_side_paths),
    mutates_args=["output"],
    fake_impl=_paged_side_paths_fake,
    target_lib=_LIBRARY,
)
