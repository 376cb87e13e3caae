"""The layer that PEFT finds at a decoder block: which adapters are active, enabled or merged there."""

from __future__ import annotations

import warnings

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

from ..checkpoint.names import CHILD_NAME
from ..memory.cache import mark_stale
from .block_context import BlockContext
from .side_path_layer import TENSOR_NAMES, SidePathLayer


class TalanLayer(SidePathLayer, BaseTunerLayer):
    """Holds one block's side paths of any number of adapters, as the block's child `talan`, where PEFT switches them.

    Args:
        hidden_size: H, the width of the residual stream.
        block_index: The block's index, by which a cache carries the memory.
        depth: The number of the model's blocks. Default 0: not known.

    Examples:
        >>> layers = [module for module in model.modules() if isinstance(module, TalanLayer)]
        >>> [layer.block_index for layer in layers]
    """

    child_name: str = CHILD_NAME
    tensor_prefix: str = "lora_talan_"
    adapter_layer_names: tuple[str, ...] = tuple(f"lora_talan_{name}" for name in TENSOR_NAMES)
    other_param_names: tuple[str, ...] = (
        "talan_options",
        "talan_alpha",
        "talan_position",
        "talan_strength",
        "has_lora_weights",
    )

    def __init__(self, hidden_size: int, block_index: int, depth: int = 0) -> None:
        super().__init__(hidden_size, block_index, depth)
        # All of the model's adapters, also those without a side path at this block.
        self.has_lora_weights: dict[str, bool] = {}
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False

    @property
    def runs_side_paths(self) -> bool:
        """Whether the layer may change the residual stream."""
        return not self._disable_adapters

    @property
    def bias(self) -> None:  # type: ignore[override]
        """A side path has no bias that PEFT's bias options could train."""
        return None

    @property
    def weight(self) -> torch.Tensor:
        """A side path has no base layer whose weight this could be."""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'weight'")

    def _all_available_adapter_names(self) -> list[str]:
        """Where the active adapter is deleted, PEFT goes on with the first of these: the same as in LoRA's layers."""
        return sorted(self.has_lora_weights, key=lambda name: (not self.has_lora_weights[name], name))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position: str,
        context: BlockContext,
        adapter_names: list[str] | None = None,
    ) -> torch.Tensor:
        """Run the active adapters' side paths on the residual stream at one end of the block.

        Args:
            hidden_states: h, [batch, tokens, hidden_size].
            position: `input` or `output`: which end this is.
            context: What the block was called with.
            adapter_names: The adapter of each row, `__base__` for none; PEFT passes it for batches of mixed adapters.
                None: the active adapters, for all rows.

        Returns:
            h', [batch, tokens, hidden_size].

        Raises:
            ValueError: The cache holds tokens that did not pass through a side path, or the call is of a form that a
                side path can't follow.
        """
        if self._disable_adapters and self.merged:
            self.unmerge()  # As LoRA's layers do: they give the base weights back when they run disabled.
        if context.running is None:  # A recomputed call has the adapters of the first.
            context.running = self._running(adapter_names, hidden_states)
        running = context.running
        written = self.run(hidden_states, position, context, running)
        if position == "output" and context.cache is not None:
            mark_stale(context.cache, context.block_index, self.child_name, running)
        return written

    def _running(self, adapter_names: list[str] | None, hidden_states: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """The adapters that run at this block, each with its rows as [batch], bool; None: all rows."""
        if self._disable_adapters:
            return {}
        if adapter_names is None:
            return {name: None for name in self.active_adapters if name in self.talan_options}
        batch = hidden_states.shape[0]
        if len(adapter_names) != batch:
            raise ValueError(
                f"adapter_names={adapter_names!r}: {len(adapter_names)} names for {batch} rows; give one per row"
            )
        return {
            name: torch.tensor([row_name == name for row_name in adapter_names], device=hidden_states.device)
            for name in dict.fromkeys(adapter_names)
            if name in self.talan_options
        }

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Note which adapters' LoRA weights are folded; the side path depends on its input and stays live.

        Args:
            safe_merge: As in PEFT; the model looks at all weights before any layer is merged. Default False.
            adapter_names: The adapters; None: the active ones.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.talan_options]
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Note that no LoRA weights are folded any more."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A side path is not a weight update, so it has no LoRA form."""
        return False
