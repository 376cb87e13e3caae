"""Merging: what is folded into the base weights, refused or warned of; `merged.py` holds what it leaves."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..checkpoint.checks import is_finite
from ..config import TalanConfig
from .attachment import attached_side_paths, detach_side_paths
from .merged import move_to_base
from .state_dict import CheckpointedModel

DROPPED = (
    "The side path depends on its input and can't become weights: the LoRA weights were merged, and the side path was "
    "dropped, so the outputs differ from the adapter's (side_path='keep' keeps them)."
)
"""What `merge_and_unload(side_path="drop")` warns of."""
LIVE = (
    "merge_adapter() folds the LoRA weights alone into the weights: the side path stays live in this model, and "
    "weights that are exported from it (such as TRL's for vLLM) are without it. Generate with this model "
    "(use_vllm=False), or export with merge_and_unload() and save_pretrained()."
)
"""What `merge_adapter` warns of, once a model."""


def check_mergeable(model: nn.Module, adapter_names: Collection[str]) -> None:
    """Refuse adapters with a NaN or an infinity in LoRA weights or side path."""
    for place, module in model.named_modules():
        for part in module.adapter_layer_names if isinstance(module, BaseTunerLayer) else ():
            for name, parameter in getattr(module, part).named_parameters():
                adapter_name = name.split(".")[0]
                # PEFT looks at offloaded weights as it merges them.
                if adapter_name in adapter_names and not is_finite(parameter):
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: "
                        f"{part} of {place} is not finite"
                    )


class MergingModel(CheckpointedModel):
    """A tuner that folds its LoRA weights into the base weights; side paths stay beside them or go."""

    peft_config: dict[str, TalanConfig]  # type: ignore[assignment]  # LoraModel has LoRA's configurations alone.
    _warned_of_live_side_path = False
    rollouts_of: str | None = None
    """The arguments' class of the trainer that trains on what vLLM generates, as long as it does."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold the LoRA weights into the base weights; the side path stays live.

        What exports the base weights then (TRL's weights for vLLM) has the LoRA weights alone; the first call warns.

        Args:
            adapter_names: The adapters to fold; None: the active ones. Default None.
            safe_merge: Whether to check LoRA weights and side path for NaN, before anything is folded. Default False.

        Raises:
            ValueError: `safe_merge` found a NaN or an infinity; or a trainer would send the merged weights to vLLM.

        Examples:
            >>> model.merge_adapter()
            >>> model.unmerge_adapter()
        """
        if self.rollouts_of is not None:
            raise ValueError(
                f"{self.rollouts_of}: merged weights are without the side path of this TALAN adapter, and rollouts "
                "would be another model's; TRL sends the whole adapter to a server of one engine (no "
                "--data-parallel-size) that was started with --enable-lora, if one adapter is active that vLLM can "
                "serve; a warning of TRL says what stands against that"
            )
        if safe_merge:
            check_mergeable(self.model, self.active_adapters if adapter_names is None else adapter_names)
        super().merge_adapter(adapter_names, safe_merge)
        live = any(layer.merged for _, layer in attached_side_paths(self.model))
        if live and not self._warned_of_live_side_path:
            self._warned_of_live_side_path = True
            warnings.warn(LIVE, stacklevel=2)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        side_path: Literal["keep", "drop"] = "keep",
    ) -> nn.Module:
        """Fold the LoRA weights into the base weights and give back the model without PEFT's wrappers.

        The side path depends on its input and can't become weights, so it stays on its blocks, or is dropped.

        Args:
            progressbar: Whether to show a progress bar. Default False.
            safe_merge: Whether to check LoRA weights and side path for NaN. Default False.
            adapter_names: The adapters to fold; None: the active ones. Default None.
            side_path: `"keep"`: the outputs stay the adapter's; the side path is a part of the model from then on, and
                is saved and loaded with its weights. `"drop"`: a plain model, the LoRA weights alone. Default
                `"keep"`.

        Returns:
            The base model.

        Raises:
            ValueError: `side_path` is neither, or `safe_merge` found a NaN or an infinity.

        Examples:
            >>> merged = model.merge_and_unload()
            >>> merged.save_pretrained("merged")  # AutoModelForCausalLM.from_pretrained("merged") gives it back
        """
        if side_path not in ("keep", "drop"):
            raise ValueError(f"side_path={side_path!r}: choose 'keep' or 'drop'")
        names = self.active_adapters if adapter_names is None else adapter_names
        if safe_merge:
            check_mergeable(self.model, names)
        merged_earlier = [name for _, layer in attached_side_paths(self.model) for name in layer.merged_adapters]
        kept = {name: self.peft_config[name] for name in dict.fromkeys([*merged_earlier, *names])}
        model = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        if side_path == "keep":
            move_to_base(model, kept)
        else:
            detach_side_paths(model)
            warnings.warn(DROPPED, stacklevel=2)
        return model

    def unload(self) -> nn.Module:
        """Give back the base model as it was before the adapter.

        Returns:
            The base model.

        Examples:
            >>> base_model = model.unload()
        """
        model = super().unload()
        detach_side_paths(model)
        return model
