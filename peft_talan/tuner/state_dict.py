"""What PEFT asks a tuner when it saves and loads an adapter."""

from __future__ import annotations

from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.lora import LoraModel
from torch import nn

from ..checkpoint.checks import check_finite, check_places
from ..checkpoint.names import MAGNITUDE, ModuleNames, check_names, without_wrappers
from ..checkpoint.rollback import Snapshot


class CheckpointedModel(LoraModel):
    """PEFT's `LoraModel`, whose checkpoints have LoRA weights and side path and are checked before loading."""

    # The model before the adapter that PEFT is about to load, for as long as its tensors have not come.
    _before_loading: Snapshot | None = None

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: Any,
        peft_config: PeftConfig,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: dict[str, torch.Tensor],
        kwargs: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        raise NotImplementedError(
            f"path_initial_model_for_weight_conversion={path_initial_model_for_weight_conversion!r}: the conversion "
            "gives a plain LoRA adapter and would lose the side path; save without it"
        )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        check_names(model, adapter_name, unwanted_adapter_names)
        names = ModuleNames(model)
        wrapped = {names.wrapped(name): tensor for name, tensor in state_dict.items()}
        found = super()._get_adapter_state_dict(model, config, adapter_name, wrapped, unwanted_adapter_names)
        plain = {names.plain(name): tensor for name, tensor in found.items()}
        # PEFT leaves the ending `.weight` out, and transformers' own loading finds no place for the name without.
        magnitude = f".{MAGNITUDE}.{adapter_name}"
        return {f"{name}.weight" if name.endswith(magnitude) else name: tensor for name, tensor in plain.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Also of what PEFT adds itself (modules_to_save, embeddings), and of the model's keys in loading.
        return without_wrappers(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        tuner: Any = getattr(model, "base_model", None)
        before = tuner._before_loading if isinstance(tuner, CheckpointedModel) else None
        try:
            check_finite(adapter_name, state_dict)
            remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
                model, config, adapter_name, state_dict
            )
            check_places(model, adapter_name, remapped)
        except BaseException:
            if before is not None:
                # PEFT injected the adapter to load it, and takes nothing back itself.
                before.restore()
                tuner.peft_config.pop(adapter_name)
            raise
        if before is not None:
            tuner._before_loading = None
        return remapped
