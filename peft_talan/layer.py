"""The side paths of one decoder block, for any number of adapters."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, CacheLayerMixin

from .config import TalanConfig
from .functional import fused
from .functional.parameters import SidePathOptions, SidePathOutput, SidePathParameters
from .initialization import initial_parameters
from .segments import TokenLayout, token_layout
from .state import LatentMemory, carry_memories, find_cache, memories_of, new_memory

CHILD_NAME = "talan"
"""The name under which a `TalanLayer` is a child of its block."""


class TalanLayer(nn.Module, BaseTunerLayer):
    """Holds one block's side paths and runs them around the block's call.

    The layer attaches to the block instead of wrapping it: it becomes the block's child `talan` and acts through
    forward hooks, so the names of base and LoRA parameters and the block's class stay what they are.

    Args:
        hidden_size: H, the width of the residual stream.
        block_index: The block's index; the cache carries the memory in its layer of the same index.
    """

    adapter_layer_names: tuple[str, ...] = (
        "lora_talan_read",
        "lora_talan_slot_bias",
        "lora_talan_slot_readout",
        "lora_talan_slot_in",
        "lora_talan_slot_out",
        "lora_talan_channel_in",
        "lora_talan_channel_out",
        "lora_talan_write",
        "lora_talan_gate",
    )
    other_param_names: tuple[str, ...] = ("talan_options", "talan_alpha", "talan_position")

    def __init__(self, hidden_size: int, block_index: int) -> None:
        super().__init__()
        self.in_features = self.out_features = hidden_size
        self.block_index = block_index
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ParameterDict())
        self.talan_options: dict[str, SidePathOptions] = {}
        self.talan_alpha: dict[str, float] = {}
        self.talan_position: dict[str, str] = {}
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self._handles: list[RemovableHandle] = []
        self._mask_place: int | None = None
        # Follows the model from device to device, so that adapters that are added or loaded later land beside it.
        self.register_buffer("_placement", torch.empty(0), persistent=False)

    @property
    def bias(self) -> None:
        """A side path has no bias that PEFT's bias options could train."""
        return None

    def update_layer(self, adapter_name: str, config: TalanConfig) -> None:
        """Add an adapter's side path.

        Args:
            adapter_name: The adapter's name.
            config: Its configuration.
        """
        for name, tensor in initial_parameters(config, self.in_features).items():
            container = getattr(self, f"lora_talan_{name}")
            container[adapter_name] = nn.Parameter(tensor)
        self.talan_options[adapter_name] = config.side_path_options
        self.talan_alpha[adapter_name] = float(config.talan_alpha)
        self.talan_position[adapter_name] = config.talan_position
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        device = self._placement.device if device is None else device
        for name in self.adapter_layer_names:
            container = getattr(self, name)
            if adapter_name in container and not container[adapter_name].is_meta:
                container[adapter_name].data = container[adapter_name].data.to(device)

    def parameters_of(self, adapter_name: str) -> SidePathParameters:
        """The tensors of an adapter's side path, as its operators take them.

        Args:
            adapter_name: The adapter's name.

        Returns:
            The tensors.
        """
        names = {
            "attention": ("slot_bias",),
            "linear": ("slot_readout",),
            "mlp": ("slot_bias", "slot_in", "slot_out", "channel_in", "channel_out"),
        }[self.talan_options[adapter_name].mixer]
        gates = self.lora_talan_gate
        return SidePathParameters(
            read=self.lora_talan_read[adapter_name],
            mixer=tuple(getattr(self, f"lora_talan_{name}")[adapter_name] for name in names),
            write=self.lora_talan_write[adapter_name],
            gate=gates[adapter_name] if adapter_name in gates else None,
        )

    def attach(self, block: nn.Module) -> None:
        """Become the block's child and act around its calls.

        Args:
            block: The decoder block.
        """
        parameter = next(block.parameters(), None)
        if parameter is not None and not parameter.is_meta:
            self._placement = torch.empty(0, device=parameter.device)
        names = [name for name in inspect.signature(block.forward).parameters]
        self._mask_place = names.index("attention_mask") if "attention_mask" in names else None
        block.add_module(CHILD_NAME, self)
        # Before hooks that were there earlier: what they see (recorded hidden states, say) is after the write-back.
        self._handles = [
            block.register_forward_pre_hook(self._before_block, prepend=True, with_kwargs=True),
            block.register_forward_hook(self._after_block, prepend=True, with_kwargs=True),
        ]

    def detach(self, block: nn.Module) -> None:
        """Leave the block as it was before `attach`.

        Args:
            block: The decoder block.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        delattr(block, CHILD_NAME)

    def _names_at(self, position: str) -> list[str]:
        if self._disable_adapters:
            return []
        return [name for name in self.active_adapters if self.talan_position.get(name) == position]

    def _before_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        names = self._names_at("input")
        if not names:
            return None
        if args:
            return (self(args[0], names, "input", args, kwargs), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self(kwargs["hidden_states"], names, "input", args, kwargs)}

    def _after_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        names = self._names_at("output")
        if names:
            if isinstance(output, tuple):
                output = (self(output[0], names, "output", args, kwargs), *output[1:])
            else:
                output = self(output, names, "output", args, kwargs)
        self._mark_memories_left_behind(args, kwargs)
        return output

    def forward(
        self,
        hidden_states: torch.Tensor,
        adapter_names: list[str],
        position: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Run the active side paths on the residual stream at one end of the block.

        Args:
            hidden_states: h, [batch, tokens, hidden_size].
            adapter_names: The adapters to run; their perturbations add up.
            position: `input` or `output`: which end this is.
            args: The block's positional arguments.
            kwargs: The block's keyword arguments.

        Returns:
            h', [batch, tokens, hidden_size].

        Raises:
            ValueError: The cache holds tokens that the side path has not seen.
        """
        batch, tokens = hidden_states.shape[:2]
        cache = find_cache((*kwargs.values(), *args))
        past = 0 if cache is None else self._tokens_before(cache, position, tokens)
        layout = token_layout(self._attention_mask(args, kwargs), kwargs.get("position_ids"), batch, tokens, past)
        written = hidden_states
        for count, name in enumerate(adapter_names):
            if cache is None:
                output = self._run(name, hidden_states, layout, None, return_state=False)
            else:
                output = self._run_with_cache(name, hidden_states, layout, cache, past)
            change = output.hidden_states
            written = change if count == 0 else written + (change - hidden_states)
        return written

    def _run(
        self,
        adapter_name: str,
        hidden_states: torch.Tensor,
        layout: TokenLayout,
        state: torch.Tensor | None,
        return_state: bool,
    ) -> SidePathOutput:
        return fused.side_path(
            hidden_states,
            self.parameters_of(adapter_name),
            self.talan_options[adapter_name],
            alpha=self.talan_alpha[adapter_name],
            valid=layout.valid,
            segment_ids=layout.segment_ids,
            state=state,
            training=self.training,
            return_state=return_state,
        )

    def _run_with_cache(
        self,
        adapter_name: str,
        hidden_states: torch.Tensor,
        layout: TokenLayout,
        cache: Cache,
        past: int | torch.Tensor,
    ) -> SidePathOutput:
        memories = memories_of(cache, self.block_index)
        memory = None if memories is None else memories.get(adapter_name)
        self._check_memory(adapter_name, memory, past, hidden_states.shape[0])
        if memory is None:
            memory = new_memory(cache, self.block_index)
        output = self._run(adapter_name, hidden_states, layout, memory.state, return_state=True)
        memory.append(output, layout.segment_ids)
        carry_memories(cache, self.block_index)[adapter_name] = memory
        return output

    def _check_memory(
        self, adapter_name: str, memory: LatentMemory | None, past: int | torch.Tensor, batch: int
    ) -> None:
        """Refuse to go on from a cache whose tokens did not all pass through this side path."""
        if memory is not None and not memory.behind and (memory.static or memory.length == past):
            if memory.state is None or memory.state.shape[0] == batch:
                self._check_scope(adapter_name, past)
                return
            raise ValueError(
                f"the batch has {batch} rows, but the latent memory of adapter {adapter_name!r} in this cache has "
                f"{memory.state.shape[0]}; change a cache's rows by its own methods (batch_repeat_interleave, ...)"
            )
        if memory is None and int(past) == 0:
            return
        raise ValueError(
            f"the cache holds {int(past)} tokens that did not all pass through adapter {adapter_name!r} at block "
            f"{self.block_index} (it was filled with the adapter off, by another adapter or by another model), so the "
            "latent memory is missing; start from an empty cache and run the whole prompt with this adapter active"
        )

    def _check_scope(self, adapter_name: str, past: int | torch.Tensor) -> None:
        if self.talan_options[adapter_name].scope == "bidirectional" and not (isinstance(past, int) and past == 0):
            raise ValueError(
                f"adapter {adapter_name!r} has talan_memory_scope='bidirectional', which can't generate: later tokens "
                "would change the memory of earlier ones; train with 'causal', or pass use_cache=False for features"
            )

    def _tokens_before(self, cache: Cache, position: str, tokens: int) -> int | torch.Tensor:
        """How many tokens the cache held before this call; after the block, its layer already counts this call's."""
        index = self.block_index
        if index >= len(cache.layers) or not isinstance(cache.layers[index], CacheLayerMixin):
            index = 0
        length = cache.get_seq_length(index)
        counted = position == "output" or (index == 0 and self.block_index > 0)
        return length - tokens if counted else length + 0

    def _attention_mask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        if "attention_mask" in kwargs:
            return kwargs["attention_mask"]
        if self._mask_place is not None and self._mask_place < len(args):
            return args[self._mask_place]
        return None

    def _mark_memories_left_behind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A memory that these tokens passed by can't be gone on with: its cache has moved ahead of it."""
        cache = find_cache((*kwargs.values(), *args))
        memories = None if cache is None else memories_of(cache, self.block_index)
        if memories:
            running = () if self._disable_adapters else self.active_adapters
            for name, memory in memories.items():
                if name not in running:
                    memory.behind = True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Note which adapters' low-rank halves are folded; the side path depends on its input and stays live.

        Args:
            safe_merge: Whether to refuse weights that are not finite. Default False.
            adapter_names: The adapters; None: the active ones.

        Raises:
            ValueError: `safe_merge` found a NaN or an infinity.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.talan_options:
                continue
            if safe_merge:
                self._check_finite(name)
            self.merged_adapters.append(name)

    def _check_finite(self, adapter_name: str) -> None:
        for name in self.adapter_layer_names:
            container = getattr(self, name)
            if adapter_name in container and not torch.isfinite(container[adapter_name]).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: {name} of "
                    f"block {self.block_index} is not finite"
                )

    def unmerge(self) -> None:
        """Note that no low-rank half is folded any more."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A side path is no weight update, so it has no LoRA form."""
        return False

    def extra_repr(self) -> str:
        """Name the block and the axes."""
        return f"block_index={self.block_index}, adapters={self.talan_options}"
