"""Runs the side paths of one decoder block around its calls, for any number of adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..functional import fused
from ..memory.cache_memories import MemoryRequest, continue_or_start_memory
from ..serving.paged_cache import SidePath, run_paged
from .block_call import argument_names, replace_recorded_state, replace_stream, stream_of
from .decoder_call import BlockCall, DecoderCall
from .tensors import AdapterTensors


class SidePaths(AdapterTensors):
    """Runs side paths around the calls of one block.

    The layer attaches to the block instead of wrapping it: it becomes a child of the block and acts through forward
    hooks, so the names of base and LoRA parameters and the block's class stay what they are.

    Args:
        hidden_size: H, the width of the residual stream.
        block_index: The block's index, by which the cache carries the memory.
        depth: The number of the model's blocks.
    """

    child_name: str

    def __init__(self, hidden_size: int, block_index: int, depth: int) -> None:
        super().__init__(hidden_size, block_index)
        self.depth = depth
        self.talan_alpha: dict[str, float] = {}
        self.talan_position: dict[str, str] = {}
        # Set at run time (peft_talan.tuner.strength) and never saved; a side path that is missing here has 1.
        self.talan_strength: dict[str, float] = {}
        self._handles: list[RemovableHandle] = []
        self._argument_names: tuple[str, ...] = ()
        self._decoder_call: DecoderCall | None = None

    @property
    def runs_side_paths(self) -> bool:
        """Whether the layer may change the residual stream."""
        return True

    def memory_name(self, name: str) -> str:
        """The name by which a cache carries the memory of one of the layer's side paths.

        Args:
            name: The side path's name in this layer.

        Returns:
            The name, which no other side path at this block has.
        """
        return name

    def alpha_at_run_time(self, adapter_name: str) -> float:
        """The strength that an adapter's perturbation has now: the trained alpha times that set at run time.

        Args:
            adapter_name: The adapter's name.

        Returns:
            The product.
        """
        return self.talan_alpha[adapter_name] * self.talan_strength.get(adapter_name, 1.0)

    def attach(self, block: nn.Module, decoder: nn.Module) -> None:
        """Become the block's child and act around its calls.

        Args:
            block: The decoder block.
            decoder: The module whose forward pass runs the blocks.
        """
        parameter = next(block.parameters(), None)
        if parameter is not None and not parameter.is_meta:
            # As LoRA's layers: quantized ones take the type that they compute in, if they say it.
            computes_in: Any = next((m.compute_dtype for m in block.modules() if hasattr(m, "compute_dtype")), None)
            dtype = parameter.dtype if parameter.is_floating_point() else computes_in or torch.float32
            self.placement = torch.empty(0, device=parameter.device, dtype=dtype)
        self._argument_names = argument_names(block)
        self._decoder_call = DecoderCall.of(decoder)
        earlier = [child for child in block.children() if isinstance(child, SidePaths)]
        block.add_module(self.child_name, self)
        # Before hooks that were there earlier: what they see (recorded hidden states, say) is after the write-back.
        self._handles = [
            block.register_forward_pre_hook(self._before_block, prepend=True, with_kwargs=True),
            block.register_forward_hook(self._after_block, prepend=True, with_kwargs=True),
        ]
        # To this layer, side paths that the block had before are a part of the block: they write first at its output.
        for layer in reversed(earlier):
            layer._handles.pop().remove()
            layer._handles.append(block.register_forward_hook(layer._after_block, prepend=True, with_kwargs=True))

    def detach(self, block: nn.Module) -> None:
        """Leave the block as it was before `attach`.

        Args:
            block: The decoder block.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._decoder_call is not None:
            self._decoder_call.release()
            self._decoder_call = None
        delattr(block, self.child_name)

    def _before_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if "input" not in self.talan_position.values():
            return None
        name = self._argument_names[0]
        hidden_states = args[0] if args else kwargs[name]
        written = self._called(block)(hidden_states, "input", self._call(block, args, kwargs, after=False))
        replace_recorded_state(hidden_states, written)
        return ((written, *args[1:]), kwargs) if args else (args, {**kwargs, name: written})

    def _after_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden_states = stream_of(output)
        written = self._called(block)(hidden_states, "output", self._call(block, args, kwargs, after=True))
        return output if written is hidden_states else replace_stream(output, written)

    def _call(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, after: bool) -> BlockCall:
        if self._decoder_call is None:
            raise RuntimeError("the side path is not attached to a block; attach it first")
        return BlockCall(self._decoder_call, block, self.block_index, self._argument_names, args, kwargs, after)

    def _called(self, block: nn.Module) -> nn.Module:
        """The block's child: this layer, or what a sharding library has wrapped it in to gather its parameters."""
        child: nn.Module = getattr(block, self.child_name)
        return child

    def apply_side_paths(
        self,
        hidden_states: torch.Tensor,
        position: str,
        call: BlockCall,
        running: dict[str, torch.Tensor | None],
    ) -> torch.Tensor:
        """Run side paths on the residual stream at one end of the block; the perturbations of several add up.

        Args:
            hidden_states: h, [batch, tokens, hidden_size].
            position: `input` or `output`: which end this is.
            call: What the block was called with.
            running: The names of the side paths that run, each with its rows as [batch], bool; None: all rows.

        Returns:
            h', [batch, tokens, hidden_size].

        Raises:
            ValueError: The cache holds tokens that did not pass through a side path, or the call is of a form that a
                side path can't follow.
        """
        written = hidden_states
        here = [name for name in running if self.talan_position[name] == position]
        if call.paged is not None:
            return run_paged(hidden_states, [self._side_path(name) for name in here], self.block_index, call.paged)
        for count, name in enumerate(here):
            rows = running[name]
            changed = self._run(name, hidden_states, call, rows)
            hidden_states = hidden_states.to(changed.device)
            if rows is not None:
                changed = torch.where(rows.to(changed.device)[:, None, None], changed, hidden_states)
            written = changed if count == 0 else written + (changed - hidden_states)
        return written

    def _side_path(self, name: str) -> SidePath:
        options, parameters = self.talan_options[name], self.parameters_of(name)
        return SidePath(self.memory_name(name), parameters, options, self.alpha_at_run_time(name))

    def _run(self, name: str, hidden_states: torch.Tensor, call: BlockCall, rows: torch.Tensor | None) -> torch.Tensor:
        options, layout = self.talan_options[name], call.layout(hidden_states)
        parameters = self.parameters_of(name)
        # accelerate moves what a block is called with to the block's device, but after the hooks that run side paths.
        device = hidden_states.device if hidden_states.is_meta else parameters.read.device
        hidden_states, layout = hidden_states.to(device), layout.to(device)
        if parameters.read.device != device:
            parameters = parameters.to(device)
        passed: dict[str, Any] = {
            "alpha": self.alpha_at_run_time(name),
            "valid": layout.valid,
            "segment_ids": layout.segment_ids,
            "training": self.training,
        }
        if call.cache is None:
            return fused.side_path(hidden_states, parameters, options, **passed).hidden_states
        batch, tokens = hidden_states.shape[:2]
        past = call.tokens_before(tokens)
        request = MemoryRequest(
            self.block_index,
            self.memory_name(name),
            past.to(device) if isinstance(past, torch.Tensor) else past,
            batch,
            options.scope,
            None if rows is None else rows.to(device),
            layout.attended_past,
        )
        return continue_or_start_memory(call.cache, request).append(hidden_states, parameters, options, **passed)
