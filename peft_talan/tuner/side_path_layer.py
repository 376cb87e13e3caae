"""The side paths of one decoder block: their tensors, and the hooks that run them around the block's calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config import TalanConfig
from ..functional.initialization import initial_parameters
from ..functional.parameters import MIXER_PARAMETERS, SidePathOptions, SidePathParameters
from .block_context import BlockContext
from .call_arguments import argument_names
from .checkpointed_block import CheckpointWithSidePaths, leaves_hooks_outside, writes_input_inside
from .forward_context import DecoderHooks
from .residual_streams import ResidualStreams, replace_recorded_state, replace_stream, stream_of

TENSOR_NAMES: tuple[str, ...] = (
    "read",
    "gate_bias",
    "slot_bias",
    "slot_readout",
    "slot_in",
    "slot_out",
    "channel_in",
    "channel_out",
    "write",
    "gate",
)
"""The tensors that side paths can have, as their operators name them."""


class AdapterTensor(nn.Module):
    """One tensor of one adapter, held by a module so that its name contains `.ADAPTER.`, as those of LoRA's layers do.

    Others find an adapter's tensors by that: TRL copies a trained adapter into its frozen reference adapter so. They
    are not called `weight`: PEFT's policy for FSDP would make each such module a unit of its own.

    Args:
        tensor: The initial values.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(tensor)

    def forward(self) -> torch.Tensor:
        """Return the tensor: accelerate fetches offloaded weights around the call of the module that holds them."""
        return self.values


class SidePathLayer(nn.Module):
    """Holds the side paths of one block and runs them around its calls.

    It becomes a child of the block instead of wrapping it and acts through forward hooks, so the names of base and
    LoRA parameters and the block's class stay what they are.

    Args:
        hidden_size: H, the width of the residual stream.
        block_index: The block's index, by which a cache carries the memory.
        depth: The number of the model's blocks. Default 0: not known.
    """

    child_name: str
    tensor_prefix: str = ""
    """What the names of the containers add to those of the operators' parameters."""
    adapter_layer_names: tuple[str, ...] = TENSOR_NAMES
    """A container for each tensor, with an entry for each adapter."""

    def __init__(self, hidden_size: int, block_index: int, depth: int = 0) -> None:
        super().__init__()
        self.in_features = self.out_features = hidden_size
        self.block_index, self.depth = block_index, depth
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())
        self.talan_options: dict[str, SidePathOptions] = {}
        self.talan_alpha: dict[str, float] = {}
        self.talan_position: dict[str, str] = {}
        # Set at run time (peft_talan.tuner.strength) and never saved; a side path that is missing here has 1.
        self.talan_strength: dict[str, float] = {}
        # Follows the model's device and dtype, so that adapters that are added or loaded later are like it.
        self.placement: torch.Tensor
        self.register_buffer("placement", torch.empty(0), persistent=False)
        self._handles: list[RemovableHandle] = []
        self._argument_names: tuple[str, ...] = ()
        self._decoder_hooks: DecoderHooks | None = None
        self.streams = ResidualStreams()

    @property
    def runs_side_paths(self) -> bool:
        """Whether the layer may change the residual stream."""
        return True

    def add_side_path(self, adapter_name: str, config: TalanConfig) -> None:
        """Add an adapter's side path, fresh."""
        options = config.side_path_options
        tensors = initial_parameters(
            options, self.in_features, config.talan_slots, config.talan_dim, zero_write=config.init_talan_weights
        )
        for name, tensor in tensors.items():
            container = getattr(self, f"{self.tensor_prefix}{name}")
            container[adapter_name] = AdapterTensor(tensor.to(self.placement.dtype))
        self.talan_options[adapter_name] = options
        self.talan_alpha[adapter_name] = float(config.talan_alpha)
        self.talan_position[adapter_name] = config.talan_position
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = self.placement.device if device is None else device
        for name in self.adapter_layer_names:
            container = getattr(self, name)
            if adapter_name in container and not container[adapter_name].values.is_meta:
                # The dtype, too: PEFT gives a loaded tensor that of the file where it fills the meta device.
                container[adapter_name].to(device, self.placement.dtype)

    def alpha_at_run_time(self, adapter_name: str) -> float:
        """The strength of an adapter's perturbation now: the trained alpha times what was set at run time."""
        return self.talan_alpha[adapter_name] * self.talan_strength.get(adapter_name, 1.0)

    def parameters_of(self, adapter_name: str) -> SidePathParameters:
        """The tensors of an adapter's side path, as its operators take them."""
        options = self.talan_options[adapter_name]
        return SidePathParameters(
            read=self._tensor("read", adapter_name),
            mixer=tuple(self._tensor(name, adapter_name) for name in MIXER_PARAMETERS[options.mixer]),
            write=self._tensor("write", adapter_name),
            gate=self._tensor("gate", adapter_name) if options.writeback == "gated" else None,
        )

    def _tensor(self, name: str, adapter_name: str) -> torch.Tensor:
        # Decoding asks for them at every token; `self.lora_talan_read[adapter_name]` takes several times as long.
        container: Any = self._modules[f"{self.tensor_prefix}{name}"]
        holder = container._modules[adapter_name]
        tensor: torch.Tensor = holder.values
        if not tensor.is_meta:
            return tensor
        try:
            fetched: torch.Tensor = holder()
        except KeyError as error:
            raise ValueError(
                f"device_map: block {self.block_index} is on the disk, where PEFT does not write the side path of "
                f"adapter {adapter_name!r}; load the adapter before the model goes to disk (accelerate's "
                "dispatch_model or disk_offload), or map this block to a device or to 'cpu'"
            ) from error
        return fetched

    def attach(self, block: nn.Module, decoder: nn.Module, streams: ResidualStreams) -> None:
        """Become the block's child and act around its calls."""
        parameter = next(block.parameters(), None)
        if parameter is not None and not parameter.is_meta:
            dtype = parameter.dtype
            if not parameter.is_floating_point():
                # As LoRA's layers: quantized ones take the type that they compute in, if they say it.
                found: Any = next((m.compute_dtype for m in block.modules() if hasattr(m, "compute_dtype")), None)
                dtype = found or torch.float32
            self.placement = torch.empty(0, device=parameter.device, dtype=dtype)
        self._argument_names = argument_names(block)
        self._decoder_hooks = DecoderHooks.of(decoder)
        self.streams = streams
        earlier = [child for child in block.children() if isinstance(child, SidePathLayer)]
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
        """Leave the block as it was before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._decoder_hooks is not None:
            self._decoder_hooks.release()
            self._decoder_hooks = None
        CheckpointWithSidePaths.remove(block)
        delattr(block, self.child_name)

    def _before_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if leaves_hooks_outside(block):
            CheckpointWithSidePaths.install(block)
        if not self.acts_at_input or writes_input_inside(block):
            return None
        return self.write_at_input(block, args, kwargs, self.context(block, args, kwargs, "input"))

    @property
    def acts_at_input(self) -> bool:
        """Whether any of the side paths reads and writes what the block receives."""
        return "input" in self.talan_position.values()

    def write_at_input(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], context: BlockContext
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The block's arguments as the side paths at this end leave them."""
        name = self._argument_names[0]
        hidden_states = args[0] if args else kwargs[name]
        written = self._call(block, hidden_states, "input", context)
        replace_recorded_state(hidden_states, written)
        return ((written, *args[1:]), kwargs) if args else (args, {**kwargs, name: written})

    def _after_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if leaves_hooks_outside(block):
            return output  # It was written inside.
        return self.write_at_output(block, output, self.context(block, args, kwargs, "output"))

    def write_at_output(self, block: nn.Module, output: Any, context: BlockContext) -> Any:
        """The block's output as the side paths at this end leave it."""
        hidden_states = stream_of(output)
        written = self._call(block, hidden_states, "output", context)
        return output if written is hidden_states else replace_stream(output, written)

    def context(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], position: str) -> BlockContext:
        """What is known about one call of the block, before it has run or after."""
        if self._decoder_hooks is None:
            raise RuntimeError("the side path is not attached to a block; attach it first")
        return BlockContext(
            self._decoder_hooks,
            self.streams,
            block,
            self.block_index,
            self._argument_names,
            args,
            kwargs,
            has_run=position == "output",
        )

    def _call(self, block: nn.Module, hidden_states: Any, position: str, context: BlockContext) -> Any:
        """Call this layer as the block's child: a sharding library may have wrapped it to gather its parameters."""
        stream = self.streams.read(hidden_states)
        written: torch.Tensor = getattr(block, self.child_name)(stream, position, context)
        return hidden_states if written is stream else self.streams.write(hidden_states, stream, written)

    def forward(self, hidden_states: torch.Tensor, position: str, context: BlockContext) -> torch.Tensor:
        """Run every side path of the layer on the residual stream at one end of the block; see `run`."""
        return self.run(hidden_states, position, context, dict.fromkeys(self.talan_options))

    def run(
        self,
        hidden_states: torch.Tensor,
        position: str,
        context: BlockContext,
        running: Mapping[str, torch.Tensor | None],
    ) -> torch.Tensor:
        """Run some of the side paths; the perturbations of several add up.

        Args:
            hidden_states: h, [batch, tokens, hidden_size].
            position: `input` or `output`: which end of the block this is.
            context: What the block was called with.
            running: The names of the side paths that run, each with its rows as [batch], bool; None: all rows.

        Returns:
            h', [batch, tokens, hidden_size].
        """
        written = hidden_states
        here = [name for name in running if self.talan_position[name] == position]
        for count, name in enumerate(here):
            rows = running[name]
            changed = self._run_one(name, hidden_states, context, rows)
            hidden_states = hidden_states.to(changed.device)
            if rows is not None:
                changed = torch.where(rows.to(changed.device)[:, None, None], changed, hidden_states)
            written = changed if count == 0 else written + (changed - hidden_states)
        return written

    def _run_one(
        self, name: str, hidden_states: torch.Tensor, context: BlockContext, rows: torch.Tensor | None
    ) -> torch.Tensor:
        options, layout, parameters = self.talan_options[name], context.layout(hidden_states), self.parameters_of(name)
        # accelerate moves what a block is called with to the block's device, but after the hooks that run side paths.
        device = hidden_states.device if hidden_states.is_meta else parameters.read.device
        hidden_states, layout = hidden_states.to(device), layout.to(device)
        if parameters.read.device != device:
            parameters = parameters.to(device)
        memory = context.memory(self.child_name, name, options, hidden_states, layout, rows)
        alpha = self.alpha_at_run_time(name)
        return memory.append(hidden_states, parameters, options, layout, alpha=alpha, training=self.training)

    def extra_repr(self) -> str:
        """Name the block and the axes."""
        return f"block_index={self.block_index}, side_paths={self.talan_options}"
