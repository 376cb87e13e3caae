"""What transformers' continuous batching can't run exactly is refused before a request is taken."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from ..axes import check_causal
from ..private_names import OURS
from ..tuner.attachment import attached_side_paths
from ..tuner.merged import merged_layers
from ..tuner.mixed_batch import NO_ROWS


def check_continuous_batching(model: nn.Module, config: ContinuousBatchingConfig) -> None:
    """Refuse what side paths can't run exactly under continuous batching."""
    layers = [layer for _, layer in attached_side_paths(model) if not layer.disable_adapters]
    if not layers and not any(merged_layers(model)):
        return
    if config.cpu_offload_space is None or config.cpu_offload_space > 0:
        raise ValueError(
            f"cpu_offload_space={config.cpu_offload_space}: the latent memory of a TALAN side path does not follow "
            "pages that are moved to the CPU; set cpu_offload_space=0, and num_blocks or max_memory_percent higher"
        )
    for layer in layers:
        for name in layer.active_adapters:
            if name in layer.talan_options:
                check_causal(layer.talan_options[name].scope, name)
    for merged in merged_layers(model):
        for key, side_path in merged.side_paths.items():
            check_causal(merged.talan_options[key].scope, side_path.adapter_name)
    for layer in layers:
        if any("adapter_names" in getattr(hook, "keywords", {}) for hook in layer._forward_pre_hooks.values()):
            raise ValueError(NO_ROWS)


def check_managers() -> None:
    """Let every manager of continuous batching look at its model first; a second call does nothing.

    A manager runs the model in a thread of its own and puts what that raises into each request's output, so the
    constructor is the last place that can refuse; transformers offers no hook there.
    """
    initialize = ContinuousBatchingManager.__init__
    if hasattr(initialize, OURS):
        return

    @functools.wraps(initialize)
    def checked_initialize(
        self: ContinuousBatchingManager,
        model: nn.Module,
        generation_config: GenerationConfig,
        continuous_batching_config: ContinuousBatchingConfig,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        check_continuous_batching(model, continuous_batching_config)
        initialize(self, model, generation_config, continuous_batching_config, *args, **kwargs)  # type: ignore[arg-type]

    setattr(checked_initialize, OURS, True)
    ContinuousBatchingManager.__init__ = checked_initialize  # type: ignore[method-assign]
