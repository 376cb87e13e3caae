"""One call of a decoder block: its residual stream, which of its tokens are real, and the memory it goes on from."""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version
from torch import nn
from transformers import __version__ as transformers_version
from transformers.cache_utils import CacheLayerMixin

from ..functional.parameters import SidePathOptions
from ..memory.cache import MemoryRequest, continue_or_start_memory, memories_of, tokens_before
from ..memory.interface import Memory, NoMemory
from ..memory.token_layout import Positions, TokenLayout, token_layout
from ..memory.token_tree import TreeMemory
from ..serving.paged_cache import find_paged_call
from .call_arguments import CallArguments, find_cache, read_arguments
from .forward_context import DecoderHooks, ForwardContext
from .residual_streams import ResidualStreams, check_same_shape

BEFORE_ALL = 2**40
"""In place of an unknown number of earlier tokens: more than any mask has columns, so the call's are its last ones."""

KEEPS_CACHE_WITHOUT_GRADIENTS = Version(transformers_version).release >= (5, 24)
"""Whether a block with gradient checkpointing keeps its cache if gradients are off."""


def withholds_cache(block: nn.Module) -> bool:
    """Whether transformers hides the cache, in a call made now, from a block that it recomputes in the backward pass.

    Hooks outside of the checkpoint still see the cache.
    """
    checkpoints = block.training and bool(getattr(block, "gradient_checkpointing", False))
    return checkpoints and (torch.is_grad_enabled() or not KEEPS_CACHE_WITHOUT_GRADIENTS)


class BlockContext:
    """One call of a block, which knows the decoder's forward pass that it is part of.

    Args:
        hooks: Those of the block's decoder.
        streams: How the block lays out its hidden states.
        block: The block.
        block_index: The block's index.
        names: The block's positional arguments, as returned by `argument_names`.
        args: The block's positional arguments.
        kwargs: The block's keyword arguments.
        has_run: Whether the block has run, so that its cache layer counts the call's tokens.
    """

    def __init__(
        self,
        hooks: DecoderHooks,
        streams: ResidualStreams,
        block: nn.Module,
        block_index: int,
        names: tuple[str, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        has_run: bool,
    ) -> None:
        self._hooks = hooks
        self._forward = hooks.running
        # HRM runs a block several times in a forward pass, each with a cache layer of its own.
        self.block_index = block_index + int(kwargs.get("cycle_offset") or 0)
        self._has_run = has_run
        self._names, self._args, self._kwargs = names, args, kwargs
        received = args[0] if args else kwargs.get(names[0])
        self._received = streams.shape_of_one(received.shape) if isinstance(received, torch.Tensor) else None
        self._training = block.training
        # The side paths that run, each with its rows; None before the layer has told it.
        self.running: dict[str, torch.Tensor | None] | None = None
        cache = find_cache(args, kwargs)
        if cache is None and hooks.passes_on_state and self._arguments.unknown_state == "state":
            cache = None if self._forward is None else self._forward.cache_of_state()
        self.cache = None if withholds_cache(block) else cache
        if self._forward is not None:
            self._paged = self._forward.paged
        else:
            self._paged = find_paged_call(kwargs) if self._arguments.has_paged_cache else None

    @property
    def _arguments(self) -> CallArguments:
        """The block's own arguments; every decoded token has as many contexts as side paths, and few ask for them."""
        return read_arguments(self._names, self._args, self._kwargs)

    @property
    def _given(self) -> CallArguments:
        """The arguments of the forward pass, or the block's own where it runs in none."""
        return self._arguments if self._forward is None else self._forward.arguments

    def memory(
        self,
        child_name: str,
        adapter_name: str,
        options: SidePathOptions,
        hidden_states: torch.Tensor,
        layout: TokenLayout,
        rows: torch.Tensor | None,
    ) -> Memory:
        """Find the memory that a side path goes on from.

        Args:
            child_name: The name of the block's child that has the side path.
            adapter_name: The adapter's name.
            options: The side path's axes.
            hidden_states: h, [batch, tokens, hidden_size], on the side path's device.
            layout: As returned by `layout`, on the same device.
            rows: The rows that the adapter runs for, [batch], bool; None: all.

        Returns:
            The memory.

        Raises:
            ValueError: The cache holds tokens that did not pass through this side path.
        """
        if self._paged is not None:
            return self._paged.memory(self.block_index, f"{child_name}.{adapter_name}")
        if (tree := self._given.tree) is not None:
            return TreeMemory(tree)
        if self.cache is None:
            return NoMemory()
        batch, tokens = hidden_states.shape[:2]
        past, device = self._past(tokens), hidden_states.device
        request = MemoryRequest(
            self.block_index,
            child_name,
            adapter_name,
            past.to(device) if isinstance(past, torch.Tensor) else past,
            batch,
            tokens,
            options.scope,
            None if rows is None else rows.to(device),
            layout.attended_past,
        )
        return continue_or_start_memory(self.cache, request)

    def _past(self, tokens: int) -> int | torch.Tensor | None:
        """The number of tokens that the cache held before this call of `tokens` tokens; see `tokens_before`."""
        if self.cache is None:
            return 0
        if self._forward is not None:
            return self._forward.past
        layers: list[Any] = self.cache.layers
        index = self.block_index
        if index < len(layers) and isinstance(layers[index], CacheLayerMixin):
            length, has_call = layers[index].get_seq_length(), self._has_run
        else:
            found = tokens_before(self.cache)
            if found is None:
                return None
            length, has_call = found, self._has_run or index > 0
        past: int | torch.Tensor = length - tokens if has_call else length + 0
        return past

    def layout(self, hidden_states: torch.Tensor) -> TokenLayout:
        """Which of the call's tokens are real, and where packed samples start.

        Args:
            hidden_states: The residual stream that is read from what the block receives or returns.

        Returns:
            The layout, computed once for all blocks of a forward pass; a server's requests need none.

        Raises:
            TypeError: The block did not return hidden states of the shape that it received.
            ValueError: The hidden states are not [batch, tokens, hidden_size] of the model's input, or the model
                carries a state from call to call that is not a transformers cache.
        """
        if self._paged is not None:
            self._refuse_counts()
            return TokenLayout()
        check_same_shape(hidden_states, self._received)
        forward, given = self._forward, self._given
        if given.tree is not None:
            self._refuse_counts()
        if forward is not None and self._hooks.plain_module:
            # The whole model may call by its own names what it gives to its blocks.
            pairs = zip(given, self._arguments, strict=True)
            given = CallArguments._make(own if value is None else value for value, own in pairs)
        shape = tuple(hidden_states.shape)
        self._check_order(shape, given.shape)
        if given.unknown_state is not None:
            remedy = "use_cache=False (or no state), or a cache such as DynamicCache"
            raise ValueError(
                f"{given.unknown_state}: it is not a transformers Cache, so the side path can't carry its memory from "
                f"call to call with it; pass {'use_mems=False' if given.unknown_state == 'mems' else remedy}"
            )
        batch, tokens, _ = shape
        if forward is None:
            layout = self._remembered(batch, tokens)
            return layout or self._counted(self._layout_of_block(batch, tokens), (batch, tokens))
        if forward.layout is None:
            forward.layout = self._counted(self._layout_of_decoder(forward, given, batch, tokens), (batch, tokens))
        if self._training and not torch.compiler.is_compiling():
            self._hooks.remember(forward.layout, self._args, self._kwargs)
        return forward.layout

    def _refuse_counts(self) -> None:
        if self._hooks.token_counts is not None:
            raise ValueError("token_counts: not for a server's requests, nor for rows that are packed as a tree")

    def _counted(self, layout: TokenLayout, shape: tuple[int, int]) -> TokenLayout:
        """The layout with the counts that were set for calls of this shape."""
        counts = self._hooks.token_counts
        if counts is None:
            return layout
        if counts.shape != shape:
            raise ValueError(
                f"token_counts of shape {list(counts.shape)}: the call has [batch, tokens] = {list(shape)}; give each "
                "of its tokens a count, and those of a call alone"
            )
        return layout._replace(counts=counts)

    def _layout_of_decoder(
        self, forward: ForwardContext, given: CallArguments, batch: int, tokens: int
    ) -> TokenLayout:
        """Read the decoder's arguments, and note which of the call's tokens enter the cache's memories."""
        if given.tree is not None:
            return given.tree.layout_of_paths()
        memories = None if self.cache is None else memories_of(self.cache)
        if memories is not None:
            forward.cache = self.cache
            if tokens == 1 and memories.goes_on_with(given.attention_mask, forward.past):
                return TokenLayout()
        hooks, has_cache = self._hooks, find_cache(self._args, self._kwargs) is not None
        layout = token_layout(
            given.attention_mask,
            Positions(given.position_ids, given.cu_seq_lens, given.seq_idx, hooks.rule),
            batch,
            tokens,
            (BEFORE_ALL if forward.past is None else forward.past) if has_cache else 0,
            has_cache=has_cache,
            chunked=hooks.chunked and given.position_ids is not None,
        )
        if hooks.windowed and getattr(given.attention_mask, "ndim", 0) != 2:
            layout = layout._replace(attended=None)
        if memories is not None and forward.past is not None:
            memories.enter(forward.past, batch, tokens, layout)
        return layout.copy() if self._training and not torch.compiler.is_compiling() else layout

    def _check_order(self, shape: tuple[int, ...], given: tuple[int, int | None] | None) -> None:
        """Refuse a residual stream that is not, or can't be seen to be, [batch, tokens, hidden_size]."""
        batch, tokens = given or (None, None)
        fits = len(shape) == 3 and (batch is None or batch == shape[0]) and (tokens is None or tokens == shape[1])
        if not fits:
            raise ValueError(
                f"talan_layers: block {self.block_index} has hidden states of shape {list(shape)}, expected "
                f"[{batch or 'batch'}, {tokens or 'tokens'}, hidden_size]: the model lays its residual stream out "
                "differently, has several, or gives this block only some of the tokens; choose other blocks, or use "
                "plain LoRA for this model"
            )
        if self._hooks.batch_first or given is None:
            return
        if shape[0] != shape[1]:
            self._hooks.batch_first = True
        elif shape[0] > 1:
            raise ValueError(
                f"talan_layers: block {self.block_index} has hidden states of shape {list(shape)}, which do not show "
                "whether their rows or their tokens come first in this model, which is none of transformers'; call it "
                "once with another number of rows than tokens, such as one row"
            )

    def _layout_of_block(self, batch: int, tokens: int) -> TokenLayout:
        """Read the block's own arguments, where no decoder's call is under way."""
        own, rule = self._arguments, self._hooks.rule
        if own.tree is not None:
            return own.tree.layout_of_paths()
        past = self._past(tokens)
        if self.cache is not None:
            # Tokens are noted once per forward pass, which these calls are not known to be part of.
            memories_of(self.cache).entered_is_known = False
        return token_layout(
            own.attention_mask,
            # transformers has made a mask of positions that separate samples, except for flash attention.
            Positions(own.position_ids, own.cu_seq_lens, own.seq_idx, None if rule == "steps" else rule),
            batch,
            tokens,
            BEFORE_ALL if past is None else past,
            has_cache=own.cache is not None,
            chunked=True,
        )

    def _remembered(self, batch: int, tokens: int) -> TokenLayout | None:
        """The layout of the call that is recomputed now, if there was one of this shape."""
        layout = self._hooks.remembered(self._args, self._kwargs)
        if layout is None:
            return None
        fits = all(part is None or part.shape == (batch, tokens) for part in (layout.valid, layout.segment_ids))
        return layout if fits else None
