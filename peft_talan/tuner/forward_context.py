"""One forward pass of a decoder: what it is called with is read once, before its first block, for all side paths.

A block's own arguments say less: its mask may be of one kind of attention only, or use True for masked; its cache
layer may hold the keys of an image, or none.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..memory.cache import note_recurrent_state, recurrent_state_is_new, tokens_before
from ..memory.state_cache import StateCache, is_state
from ..memory.token_layout import TokenLayout
from ..serving.paged_cache import PagedCall, find_paged_call
from .blocks import is_from_transformers
from .call_arguments import CallArguments, argument_names, read_arguments, tensors_of_call


def _is_set(config: object, name: str) -> bool:
    """Whether a field is set, be it for some blocks only."""
    try:
        return bool(getattr(config, name, None))
    except RuntimeError:
        # transformers refuses to read a field that differs from block to block.
        return True


class ForwardContext:
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
        self._new_state: StateCache | None = None

    def cache_of_state(self) -> Cache:
        """The cache that the state of the decoder's blocks is shown as; the decoder may make it in this call."""
        if self.arguments.cache is not None:
            return self.arguments.cache
        if self._new_state is None:
            self._new_state = StateCache()
        return self._new_state

    def bind_state(self, output: Any) -> None:
        """Give the decoder's new state, if it returned one, the memories of this call."""
        for value in output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ():
            if self._new_state is not None and is_state(value):
                self._new_state.show(value)


class DecoderHooks:
    """Opens a `ForwardContext` for each call of a decoder, while any of its blocks has a side path.

    Args:
        decoder: The module whose forward pass runs the blocks.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.names = argument_names(decoder)
        self.uses = 0
        self._handles: list[RemovableHandle] = []
        # By thread, so that two of them can use one model. A compiled graph knows no threads, and uses 0.
        self._running: dict[int, ForwardContext] = {}
        # By a tensor that a block's recomputed call is given again; None where two passes share the tensor.
        self._layouts = WeakIdKeyDictionary()
        config = getattr(decoder, "config", None)
        attention = str(getattr(config, "_attn_implementation", None))
        self.plain_module = not isinstance(decoder, PreTrainedModel)
        self.rule = "real" if self.plain_module else "zeros" if "flash" in attention else "steps"
        # How many tokens each of a call stands for; set at run time (peft_talan.tuner.token_counts).
        self.token_counts: torch.Tensor | None = None
        # Whether the residual stream is known to be [batch, tokens, hidden_size]: transformers' own models were tried.
        self.batch_first = is_from_transformers(decoder)
        # The masks of their blocks may show only a window or a chunk of the past.
        self.windowed = any(_is_set(config, name) for name in ("sliding_window", "attention_chunk_size"))
        self.chunked = _is_set(config, "attention_chunk_size")
        # xLSTM gives its blocks the parts of a state, which it is called with itself or makes.
        self.passes_on_state = "cache_params" in self.names
        # Gemma 4 gives its blocks with shared keys the last tokens only.
        self.slices = hasattr(decoder, "_maybe_slice_kv_shared_inputs")

    def __getstate__(self) -> dict[str, Any]:
        # A copy is in no forward pass.
        return {**self.__dict__, "_running": {}, "_layouts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _layouts=WeakIdKeyDictionary())

    @classmethod
    def of(cls, decoder: nn.Module) -> DecoderHooks:
        """The hooks that a decoder has already, or new ones; they count one more side path."""
        owners = (getattr(hook, "__self__", None) for hook in decoder._forward_pre_hooks.values())
        hooks = next((owner for owner in owners if isinstance(owner, cls)), None) or cls(decoder)
        hooks.uses += 1
        if not hooks._handles:
            hooks._handles = [
                decoder.register_forward_pre_hook(hooks._before, with_kwargs=True),
                decoder.register_forward_hook(hooks._after, always_call=True),
            ]
        return hooks

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
        self._running[self._thread()] = ForwardContext(
            arguments, past, find_paged_call(kwargs) if arguments.has_paged_cache else None
        )
        # A memory needs all tokens. What the decoder returns too much of, the model's head cuts off.
        if self.slices and any(getattr(module, "runs_side_paths", False) for module in decoder.modules()):
            return args, {**kwargs, "logits_to_keep": 0}
        return None

    def _after(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        context = self._running.pop(self._thread(), None)
        if context is not None:
            context.bind_state(output)
        if context is not None and context.cache is not None:
            note_recurrent_state(context.cache)

    @property
    def running(self) -> ForwardContext | None:
        """The decoder's forward pass that is under way in this thread; None if its blocks are called by themselves."""
        return self._running.get(self._thread())

    def remember(self, layout: TokenLayout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the layout for the recomputed call of a block, which comes when the decoder's call is over.

        A tensor that two forward passes share leads to neither of their layouts.
        """
        for tensor in tensors_of_call(args, kwargs):
            if self._layouts.setdefault(tensor, layout) is not layout:
                self._layouts[tensor] = None

    def remembered(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout | None:
        """The layout that `remember` noted for a block's call with these arguments, if there is exactly one."""
        if torch.compiler.is_compiling():
            return None
        found = [self._layouts.get(tensor) for tensor in tensors_of_call(args, kwargs)]
        layouts = {id(layout): layout for layout in found if layout is not None}
        return next(iter(layouts.values())) if len(layouts) == 1 else None
