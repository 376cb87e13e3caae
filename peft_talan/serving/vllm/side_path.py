"""A block's side path in vLLM: one state per page, read and written by one operator per call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from ...config import TalanConfig
from ...functional.initialization import empty_parameters
from ...functional.parameters import MIXER_PARAMETERS, SidePathParameters
from ..pages import PagedMemory, Pages, run_on_pages
from .strength import PageStrengths

ADAPTER_NAME = "default"
NULL_PAGE = 0
"""The page that vLLM gives to no request."""

_ENDING = ".talan"
"""What a layer's name has after that of its block's attention."""

_PAGES = "peft_talan.pages"
"""Where the context of a forward pass keeps the pages of its calls."""


def find_pages(
    metadata: Any, tokens: int, num_pages: int, page_size: int, strengths: PageStrengths
) -> tuple[Pages, torch.Tensor]:
    """Find the pages of a forward pass.

    Args:
        metadata: What vLLM tells the attention of some blocks about the batch.
        tokens: The number of tokens, with padding.
        num_pages: The number of pages.
        page_size: Tokens per page.
        strengths: The strengths of the pages' tokens.

    Returns:
        The pages, and the alpha of each token, [tokens], float32.
    """
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


class PagedSidePath(nn.Module):
    """The side path of one block, with the states of all requests in a pool of pages as the block's attention has it.

    Its tensors are buffers: vLLM requires of parameters that the model itself loads them.

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
        super().__init__()
        self.hidden_size, self.block_index, self.config, self.strengths = hidden_size, block_index, config, strengths
        self.options = config.side_path_options
        shapes = empty_parameters(self.options, hidden_size, config.talan_slots, config.talan_dim)
        for name, shape in shapes.items():
            self.register_buffer(name, torch.empty(shape.shape))
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
        # Created outside of the operator: CUDA graphs around it then find the output in the same place every time.
        output = torch.empty_like(flat)
        torch.ops.peft_talan.paged_side_path(flat, output, self.layer_name)
        return output.view_as(hidden_states)

    def run(self, hidden_states: torch.Tensor, output: torch.Tensor, context: Any) -> None:
        """Compute what `forward` returns.

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
        pages, alpha = known[key]
        parameters = SidePathParameters(
            self.read,
            tuple(getattr(self, name) for name in MIXER_PARAMETERS[self.options.mixer]),
            self.write,
            getattr(self, "gate", None),
        )
        pool = self.memory.pool(self.block_index, ADAPTER_NAME, pages.num_pages, parameters, hidden_states)
        output.copy_(run_on_pages(hidden_states, parameters, self.options, pool, pages, alpha))


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
