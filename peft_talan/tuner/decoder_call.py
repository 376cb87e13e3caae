"""What the whole decoder was called with: read once a forward pass, before its first block, for every side path in it.

A block's own arguments say less: its mask may be of one kind of attention only, or use True for masked; its cache
layer may hold the keys of an image, or none.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ..memory.cache_memories import memories_of, note_recurrent_state, recurrent_state_is_new
from ..memory.token_layout import TokenLayout
from ..serving.paged_cache import PagedCall, find_paged_call
from .block_call import (
    CallArguments,
    argument_names,
    check_stream,
    read_arguments,
    tensors_of_call,
    withholds_cache,
)
from .segments import Positions, token_layout

LAYOUT = "_talan_layout"
"""The attribute of a block's mask or positions that leads a recomputed call to its layout."""

BEFORE_ALL = 2**40
"""In place of an unknown number of earlier tokens: more than any mask has columns, so the call's are its last ones."""


def _is_set(config: object, name: str) -> bool:
    """Whether a field is set, be it for some blocks only."""
    try:
        return bool(getattr(config, name, None))
    except RuntimeError:
        # transformers refuses to read a field that differs from block to block.
        return True


class ModelCall:
    """One forward pass of a decoder.

    Args:
        arguments: What the decoder was called with.
        past: The number of tokens that the cache held before; a scalar tensor if it is on the device; None if no layer
            of the cache counts them.
        paged: What a server with a paged cache adds; None without one.
    """

    def __init__(self, arguments: CallArguments, past: int | torch.Tensor | None, paged: PagedCall | None) -> None:
        self.arguments = arguments
        self.past = past
        self.paged = paged
        self.cache: Cache | None = None
        self.layout: TokenLayout | None = None


class DecoderCall:
    """Watches the calls of a decoder while any of its blocks has a side path.

    Args:
        decoder: The module whose forward pass runs the blocks.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.names = argument_names(decoder)
        self.uses = 0
        self._handles: list[RemovableHandle] = []
        # By thread, so that two of them can use one model. A compiled graph knows no threads, and uses 0.
        self._calls: dict[int, ModelCall] = {}
        config = getattr(decoder, "config", None)
        attention = str(getattr(config, "_attn_implementation", None))
        self.plain_module = not isinstance(decoder, PreTrainedModel)
        self.rule = "real" if self.plain_module else "zeros" if "flash" in attention else "steps"
        # Whether the residual stream is known to be [batch, tokens, hidden_size]: transformers' own models were tried.
        defines_forward = next(base for base in type(decoder).__mro__ if "forward" in vars(base))
        self.batch_first = defines_forward.__module__.startswith("transformers.")
        # The masks of their blocks may show only a window or a chunk of the past.
        self.windowed = any(_is_set(config, name) for name in ("sliding_window", "attention_chunk_size"))
        self.chunked = _is_set(config, "attention_chunk_size")
        # Gemma 4 gives its blocks with shared keys the last tokens only.
        self.slices = hasattr(decoder, "_maybe_slice_kv_shared_inputs")

    @classmethod
    def of(cls, decoder: nn.Module) -> DecoderCall:
        """The object that watches a decoder already, or a new one.

        Args:
            decoder: The decoder.

        Returns:
            The object, which counts one more side path.
        """
        owners = (getattr(hook, "__self__", None) for hook in decoder._forward_pre_hooks.values())
        call = next((owner for owner in owners if isinstance(owner, cls)), None) or cls(decoder)
        call.uses += 1
        if not call._handles:
            call._handles = [
                decoder.register_forward_pre_hook(call._before, with_kwargs=True),
                decoder.register_forward_hook(call._after, always_call=True),
            ]
        return call

    def release(self) -> None:
        """Count one side path less; the last one leaves the decoder as it was."""
        self.uses -= 1
        if not self.uses:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def _thread(self) -> int:
        return 0 if torch.compiler.is_compiling() else threading.get_ident()

    def _before(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        arguments = read_arguments(self.names, args, kwargs)
        past = 0 if arguments.cache is None else tokens_before(arguments.cache)
        if past is None and arguments.cache is not None and recurrent_state_is_new(arguments.cache):
            past = 0
        self._calls[self._thread()] = ModelCall(arguments, past, find_paged_call(kwargs))
        # A memory needs all tokens. What the decoder returns too much of, the model's head cuts off.
        if self.slices and any(getattr(module, "runs_side_paths", False) for module in decoder.modules()):
            return args, {**kwargs, "logits_to_keep": 0}
        return None

    def _after(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self._calls.pop(self._thread(), None)
        if call is not None and call.cache is not None:
            note_recurrent_state(call.cache)

    @property
    def running(self) -> ModelCall | None:
        """The decoder's forward pass that is under way in this thread; None if its blocks are called by themselves."""
        return self._calls.get(self._thread())


class BlockCall:
    """One call of a block, which knows the decoder's call that it is part of.

    Args:
        decoder_call: What watches the block's decoder.
        block: The block.
        block_index: The block's index.
        names: The block's positional arguments, as returned by `argument_names`.
        args: The block's positional arguments.
        kwargs: The block's keyword arguments.
        after: Whether the block has run, so that its cache layer counts the call's tokens.
    """

    def __init__(
        self,
        decoder_call: DecoderCall,
        block: nn.Module,
        block_index: int,
        names: tuple[str, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        after: bool,
    ) -> None:
        self._decoder_call = decoder_call
        self._model_call = decoder_call.running
        self._arguments = read_arguments(names, args, kwargs)
        self._block_index = block_index
        self._after = after
        self._args, self._kwargs = args, kwargs
        self._received = args[0] if args else kwargs.get(names[0])
        self._training = block.training
        self._has_cache = self._arguments.cache is not None
        self.cache = None if withholds_cache(block) else self._arguments.cache
        call = self._model_call
        self.paged: PagedCall | None = find_paged_call(kwargs) if call is None else call.paged

    def tokens_before(self, tokens: int) -> int | torch.Tensor | None:
        """The number of tokens that the cache held before this call.

        Args:
            tokens: The number of tokens of this call.

        Returns:
            The number; a scalar tensor if the cache keeps it on the device; None if no layer of the cache counts.
        """
        if self.cache is None:
            return 0
        if self._model_call is not None:
            return self._model_call.past
        layers: list[Any] = self.cache.layers
        index = self._block_index
        if index < len(layers) and isinstance(layers[index], CacheLayerMixin):
            length, counted = layers[index].get_seq_length(), self._after
        else:
            found = tokens_before(self.cache)
            if found is None:
                return None
            length, counted = found, self._after or index > 0
        past: int | torch.Tensor = length - tokens if counted else length + 0
        return past

    def layout(self, hidden_states: torch.Tensor) -> TokenLayout:
        """Which of the call's tokens are real, and where packed samples start.

        Args:
            hidden_states: What the block receives or returns.

        Returns:
            The layout, worked out once for all blocks of a forward pass.

        Raises:
            TypeError: The block did not return hidden states of the shape that it received.
            ValueError: The hidden states are not [batch, tokens, hidden_size] of the model's input, or the model
                carries a state from call to call that is not a transformers cache.
        """
        check_stream(hidden_states, self._received)
        call = self._model_call
        given = self._arguments if call is None else call.arguments
        if call is not None and self._decoder_call.plain_module:
            # The whole model may call by its own names what it gives to its blocks.
            pairs = zip(given, self._arguments, strict=True)
            given = CallArguments._make(own if value is None else value for value, own in pairs)
        shape = tuple(hidden_states.shape)
        self._check_order(shape, given.shape)
        if given.unknown_state is not None:
            raise ValueError(
                f"{given.unknown_state}: it is not a transformers Cache, so the side path can't carry its memory from "
                "call to call with it; pass use_cache=False (or no state), or a cache such as DynamicCache"
            )
        batch, tokens, _ = shape
        if call is None:
            return self._remembered(batch, tokens) or self._layout_of_block(batch, tokens)
        if call.layout is None:
            rule = self._decoder_call.rule
            past = BEFORE_ALL if call.past is None else call.past
            call.layout = token_layout(
                given.attention_mask,
                Positions(given.position_ids, given.cu_seq_lens, given.seq_idx, rule),
                batch,
                tokens,
                past if self._has_cache else 0,
                has_cache=self._has_cache,
                chunked=self._decoder_call.chunked and given.position_ids is not None,
            )
            if self._decoder_call.windowed and getattr(given.attention_mask, "ndim", 0) != 2:
                call.layout = call.layout._replace(attended=None)
            if self.cache is not None:
                call.cache = self.cache
                if call.past is not None:
                    memories_of(self.cache).count(call.past, batch, tokens, call.layout)
        if self._training and not torch.compiler.is_compiling():
            self._remember(call.layout)
        return call.layout

    def _check_order(self, shape: tuple[int, ...], given: tuple[int, int | None] | None) -> None:
        """Refuse a residual stream that is not, or can't be seen to be, [batch, tokens, hidden_size]."""
        batch, tokens = given or (None, None)
        fits = len(shape) == 3 and (batch is None or batch == shape[0]) and (tokens is None or tokens == shape[1])
        if not fits:
            raise ValueError(
                f"talan_layers: block {self._block_index} has hidden states of shape {list(shape)}, expected "
                f"[{batch or 'batch'}, {tokens or 'tokens'}, hidden_size]: the model lays its residual stream out "
                "differently, has several, or gives this block only some of the tokens; choose other blocks, or use "
                "plain LoRA for this model"
            )
        if self._decoder_call.batch_first or given is None:
            return
        if shape[0] != shape[1]:
            self._decoder_call.batch_first = True
        elif shape[0] > 1:
            raise ValueError(
                f"talan_layers: block {self._block_index} has hidden states of shape {list(shape)}, which do not show "
                "whether their rows or their tokens come first in this model, which is none of transformers'; call it "
                "once with another number of rows than tokens, such as one row"
            )

    def _layout_of_block(self, batch: int, tokens: int) -> TokenLayout:
        """Read the block's own arguments, where no decoder's call is under way."""
        own, rule = self._arguments, self._decoder_call.rule
        past = self.tokens_before(tokens)
        if self.cache is not None:
            # Tokens are counted once a forward pass, which these calls are not known to be part of.
            memories_of(self.cache).counted = False
        return token_layout(
            own.attention_mask,
            # transformers has made a mask of positions that separate samples, except for flash attention.
            Positions(own.position_ids, own.cu_seq_lens, own.seq_idx, None if rule == "steps" else rule),
            batch,
            tokens,
            BEFORE_ALL if past is None else past,
            has_cache=self._has_cache,
            chunked=True,
        )

    def _remember(self, layout: TokenLayout) -> None:
        """Leave the layout on what a recomputed call will be given again, when the decoder's call is over.

        A tensor that two forward passes share leads to neither of their layouts.
        """
        for tensor in tensors_of_call(self._args, self._kwargs):
            known = tensor.__dict__.setdefault(LAYOUT, layout)
            if known is not layout:
                tensor.__dict__[LAYOUT] = None

    def _remembered(self, batch: int, tokens: int) -> TokenLayout | None:
        if torch.compiler.is_compiling():
            return None
        found = [tensor.__dict__.get(LAYOUT) for tensor in tensors_of_call(self._args, self._kwargs)]
        layouts = {id(layout): layout for layout in found if layout is not None}
        layout = next(iter(layouts.values())) if len(layouts) == 1 else None
        if layout is None:
            return None
        fits = all(part is None or part.shape == (batch, tokens) for part in (layout.valid, layout.segment_ids))
        return layout if fits else None


def tokens_before(cache: Cache) -> int | torch.Tensor | None:
    """The number of tokens that a cache holds.

    The first layer with keys counts them: others may have none (recurrent, shared), or those of an image.

    Args:
        cache: The cache.

    Returns:
        The number; a scalar tensor if the cache keeps it on the device; None if no layer counts tokens.
    """
    counted: int | None = None if cache.layers else 0
    for layer in cache.layers:
        if isinstance(layer, CacheLayerMixin):
            length = layer.get_seq_length()
            if isinstance(length, torch.Tensor):
                # A copy: the cache counts on in place.
                return length + 0
            counted = int(length)
            if counted:
                break
    return counted
