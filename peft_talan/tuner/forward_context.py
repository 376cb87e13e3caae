"""What a forward pass of a decoder is called with: read once, before its first block, for every side path in it.

A block's own arguments say less: its mask may be of one kind of attention only, or use True for masked; its cache
layer may hold the keys of an image, or none.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation.continuous_batching import PagedAttentionCache

from ..memory.cache import note_recurrent_state, recurrent_state_is_new, tokens_before
from ..memory.state_cache import StateCache, cache_of_state, is_state
from ..memory.token_layout import TokenLayout
from ..memory.token_tree import TokenTree
from ..serving.paged_cache import PagedCall, find_paged_call
from .blocks import is_from_transformers

STATE_ARGUMENTS = frozenset(
    {
        "cache",
        "cache_params",
        "caches",
        "inference_params",
        "kv_cache",
        "layer_past",
        "layer_state",
        "mems",
        "past",
        "past_buckets_states",
        "past_key_value",
        "past_key_values",
        "past_state",
        "past_states",
        "state",
        "states",
    }
)
"""The arguments by which models pass a state from one call to the next: those of transformers, and common ones."""


class CallArguments(NamedTuple):
    """The arguments of one call, as far as a side path needs them.

    Args:
        attention_mask: In any of the forms that attention implementations take.
        position_ids: Positions of any rank, or None.
        cu_seq_lens: [samples + 1]: where packed samples start, or None.
        seq_idx: [batch, tokens]: the sample of each token, or None.
        cache: The cache of the self-attention, or None.
        shape: (batch, tokens) of the model's input, if it is known; None in place of an unknown number of tokens.
        unknown_state: The name of an argument with a state that is not a transformers cache, or None.
        has_paged_cache: Whether a server gives the cache of many requests in pages.
        tree: How samples share the tokens of a row, or None.
    """

    attention_mask: object = None
    position_ids: torch.Tensor | None = None
    cu_seq_lens: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None
    cache: Cache | None = None
    shape: tuple[int, int | None] | None = None
    unknown_state: str | None = None
    has_paged_cache: bool = False
    tree: TokenTree | None = None


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's positional arguments in their order; one in place of `*args` and `**kwargs`, too."""
    return tuple(inspect.signature(module.forward).parameters)


def find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache of the self-attention among a call's arguments."""
    cache: Cache | None = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            cache = value.self_attention_cache if isinstance(value, EncoderDecoderCache) else cache or value
        elif not isinstance(value, torch.Tensor) and is_state(value):
            cache = cache_of_state(value)
    return cache


def read_arguments(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallArguments:
    """Gather what a side path needs from a call."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    unknown: str | None = None
    paged = False
    for name, value in given.items():
        if isinstance(value, PagedAttentionCache):
            paged = True
        elif name in STATE_ARGUMENTS and not is_state(value) and _holds_state(value):
            unknown = name
    positions = given.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.dim() == 3 and positions.shape[0] == 4:
        # Multimodal positions [4, batch, tokens]: the first row is that of the text, by which the model separates
        # packed samples; the other three (time, height, width) repeat inside one sample.
        positions = positions[0]
    return CallArguments(
        _mask_of(given, names),
        positions if isinstance(positions, torch.Tensor) else None,
        given.get("cu_seq_lens_q"),
        given.get("seq_idx"),
        find_cache(args, kwargs),
        _shape_of_input(given, names),
        unknown,
        paged,
        TokenTree.of_call(given),
    )


def _mask_of(given: dict[str, Any], names: tuple[str, ...]) -> object:
    """The mask of the tokens; FSMT's decoder and XLNet take others, too, in which 1 or True masks."""
    mask, padding, hidden = given.get("attention_mask"), None, None
    if "decoder_causal_mask" in names:
        padding = given.get("decoder_padding_mask")
    elif "perm_mask" in names:
        padding, hidden = given.get("input_mask"), given.get("perm_mask")
    if isinstance(padding, torch.Tensor) and padding.dim() == 2:
        mask = padding == 0
    if isinstance(hidden, torch.Tensor) and hidden.dim() == 3:
        visible = hidden == 0
        mask = visible & (mask != 0).unsqueeze(1) if isinstance(mask, torch.Tensor) and mask.dim() == 2 else visible
    return mask


def _shape_of_input(given: dict[str, Any], names: tuple[str, ...]) -> tuple[int, int | None] | None:
    """(batch, tokens) by the token ids or the embeddings."""
    tokens, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    if isinstance(tokens, torch.Tensor) and tokens.dim() == 2:
        return tokens.shape[0], tokens.shape[1]
    if isinstance(embeddings, torch.Tensor) and embeddings.dim() == 3:
        return embeddings.shape[0], embeddings.shape[1]
    # Token ids by a name of the model's own: it may add tokens to them.
    first = given.get(names[0]) if names else None
    if isinstance(first, torch.Tensor) and first.dim() == 2 and not first.is_floating_point():
        return first.shape[0], None
    return None


def _holds_state(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() > 0
    if isinstance(value, (list, tuple, dict)):
        return any(_holds_state(part) for part in (value.values() if isinstance(value, dict) else value))
    return value is not None and not isinstance(value, (bool, int, float, str, Cache))


def _is_set(config: object, name: str) -> bool:
    """Whether a field is set, be it for some blocks only."""
    try:
        return bool(getattr(config, name, None))
    except RuntimeError:
        # transformers refuses to read a field that differs from block to block.
        return True


def tensors_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The masks, positions and embeddings of positions that a block is called with; a recomputed call has the same."""
    for value in (*args[1:], *(value for name, value in kwargs.items() if name != "hidden_states")):
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, torch.Tensor):
                yield tensor


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
