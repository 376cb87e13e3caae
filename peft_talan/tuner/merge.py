"""What of a merge is refused or warned of; `merged.py` holds what it leaves."""

from __future__ import annotations

from collections.abc import Collection

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..checkpoint.checks import is_finite

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
