"""The side paths of the adapters that requests name, at one block: stacked by slots, as vLLM's LoRA weights are."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from vllm.lora.layers import BaseLayerWithLoRA

from ...functional.initialization import parameter_shapes
from ...functional.parameters import MIXER_PARAMETERS, SidePathOptions
from ...functional.stacked import StackedParameters
from ..pages import PagedMemory, Pages
from .adapter_kinds import AdapterKind
from .side_path import AroundBlock
from .strength import PageStrengths

SCALARS = ("alpha", "cap")
"""The numbers of an adapter that its tensors need."""


def child_name(number: int) -> str:
    """The name under which the side paths of a kind are a child of their block."""
    return f"talan_adapters_{number}"


class AdapterSidePaths(AroundBlock, BaseLayerWithLoRA):
    """Holds a place for a side path of one kind in each of vLLM's slots; vLLM's manager of LoRA weights fills them.

    Args:
        kind: The kind.
        number: The number of the kind in this engine.
        hidden_size: H, the width of the residual stream.
        block_index: The block's index.
        max_loras: The number of slots.
        attention: The block's attention layer, whose pages the states follow.
        strengths: The requests' strengths.
    """

    read: torch.Tensor
    write: torch.Tensor
    gate: torch.Tensor
    alpha: torch.Tensor
    cap: torch.Tensor

    def __init__(
        self,
        kind: AdapterKind,
        number: int,
        hidden_size: int,
        block_index: int,
        max_loras: int,
        attention: Any,
        strengths: PageStrengths,
    ) -> None:
        super().__init__()
        self.set_up(child_name(number), {kind.position}, attention, strengths)
        self.kind, self.block_index = kind, block_index
        self.options = SidePathOptions(mixer=kind.mixer, writeback=kind.writeback, soft_cap=kind.soft_cap)
        self.shapes = parameter_shapes(self.options, hidden_size, kind.slots, kind.width)
        for name, shape in self.shapes.items():
            # The write-back is one product for all slots, for which they have to lie one after the other.
            stacked = (max_loras, *(reversed(shape) if name == "write" else shape))
            self.register_buffer(name, torch.zeros(stacked, dtype=torch.float32), persistent=False)
        for name in SCALARS:
            self.register_buffer(name, torch.zeros(max_loras, dtype=torch.float32), persistent=False)
        self.filled: set[int] = set()

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Put a side path into a slot.

        Args:
            index: The slot.
            lora_a: All tensors in one, flat, in the order of `shapes`.
            lora_b: The numbers, in the order of `SCALARS`.
        """
        parts = lora_a.split([shape.numel() for shape in self.shapes.values()])
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            tensor = part.view(shape)
            self.get_buffer(name)[index].copy_(tensor.T if name == "write" else tensor, non_blocking=True)
        for name, number in zip(SCALARS, lora_b, strict=True):
            self.get_buffer(name)[index].copy_(number, non_blocking=True)
        self.filled.add(index)

    def set_mapping(self, punica_wrapper: Any) -> None:
        """Take what knows the slot of each token."""
        self.punica_wrapper: Any = punica_wrapper

    def reset_lora(self, index: int) -> None:
        """Empty a slot, whose adapter has no side path here."""
        if index in self.filled:
            for name in (*self.shapes, *SCALARS):
                self.get_buffer(name)[index].zero_()
            self.filled.discard(index)

    @property
    def parameters_by_slot(self) -> StackedParameters:
        """The tensors, as the operator takes them."""
        # Several times in each step: `get_buffer` takes a path apart.
        return StackedParameters(
            read=self.read,
            mixer=tuple(getattr(self, name) for name in MIXER_PARAMETERS[self.kind.mixer]),
            write=self.write,
            gate=self.gate if self.kind.writeback == "gated" else None,
            alpha=self.alpha,
            cap=self.cap,
        )

    def run_requests(
        self, hidden_states: torch.Tensor, position: str, pages: Pages, strength: torch.Tensor
    ) -> torch.Tensor:
        """Run each request's side path; see `AroundBlock.run_step`."""
        if not self.filled:
            return hidden_states
        slots = self.punica_wrapper.token_lora_indices[: hidden_states.shape[0]]
        missing = hidden_states.shape[0] - slots.shape[0]
        if missing:  # padding, which has no adapter
            slots = F.pad(slots, (0, missing), value=-1)
        memory = PagedMemory(self.pools, pages, self.block_index, self.child_name, strength)
        return memory.append_adapters(hidden_states, self.parameters_by_slot, self.options, slots)
