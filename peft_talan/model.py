"""The tuner: LoRA by PEFT's own `LoraModel`, and a side path attached to some decoder blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.integrations import init_empty_weights
from peft.utils.other import _set_layer_requires_grad
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from .blocks import find_hidden_size, find_targets
from .config import TalanConfig
from .layer import TalanLayer
from .mixed_batch import low_rank_names, rows_named
from .weighted import copy_side_paths, weigh_side_paths

WRITEBACK_PARAMETERS: tuple[str, ...] = ("lora_talan_write", "lora_talan_gate")


def _is_side_path_key(key: str) -> bool:
    return f".{TalanLayer.child_name}.lora_talan_" in key


class TalanModel(LoraModel):
    """Creates a TALAN model: a low-rank adapter and a side path, trained together (arXiv 2606.06902).

    Args:
        model (`torch.nn.Module`): The model to be adapted.
        config (`TalanConfig`): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter. Default `"default"`.
        low_cpu_mem_usage (`bool`): Whether to create empty adapter weights on the meta device. Default False.
    """

    prefix: str = LoraModel.prefix
    # Both kinds of layers are switched, frozen and deleted together.
    tuner_layer_cls = BaseTunerLayer  # type: ignore[assignment]

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add both halves of an adapter; everything is checked before the model is touched.

        Args:
            model: The base model.
            adapter_name: The adapter's name.
            autocast_adapter_dtype: As in PEFT. Default True.
            low_cpu_mem_usage: Whether to create empty weights on the meta device. Default False.
            state_dict: As in PEFT: its keys name the modules of the low-rank half; the side path goes where the
                configuration says.

        Raises:
            ValueError: The configuration does not fit the model.
        """
        config = self.peft_config[adapter_name]
        if adapter_name == TalanLayer.child_name:
            # PEFT saves an adapter by leaving out every key that has another adapter's name as one of its parts.
            raise ValueError(
                f"adapter_name={adapter_name!r}: side paths have this name in the model, and other adapters would be "
                "saved without theirs; choose another name"
            )
        if not isinstance(config, TalanConfig):
            raise ValueError(
                f"config={type(config).__name__}: a TALAN model takes a TalanConfig for adapter {adapter_name!r}"
            )
        blocks = find_targets(model, config)
        hidden_size = find_hidden_size(model, config)
        self._convert_expert_targets(model, config)
        if state_dict is not None:
            state_dict = {key: tensor for key, tensor in state_dict.items() if not _is_side_path_key(key)}
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )
        for index, block in blocks.items():
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._attach_side_path(block, index, hidden_size, adapter_name, config)
        self._freeze_by_scope(model, adapter_name, config)

    @staticmethod
    def _convert_expert_targets(model: nn.Module, config: TalanConfig) -> None:
        """Point the low-rank half at experts that transformers 5 fuses, as PEFT does for the type LORA only."""
        if not isinstance(model, PreTrainedModel):
            return
        own_type, config.peft_type = config.peft_type, PeftType.LORA
        try:
            conversions = get_model_conversion_mapping(model)
            convert_peft_config_for_transformers(config, model=model, conversions=conversions)
        finally:
            config.peft_type = own_type

    def _attach_side_path(
        self, block: nn.Module, index: int, hidden_size: int, adapter_name: str, config: TalanConfig
    ) -> None:
        layer = getattr(block, TalanLayer.child_name, None)
        if layer is None:
            layer = TalanLayer(hidden_size, index)
            layer.train(block.training)
            tuner_layers = (m for m in self.model.modules() if isinstance(m, self.tuner_layer_cls))
            disabled = any(other.disable_adapters for other in tuner_layers)
            layer.attach(block)
            layer.set_adapter(self.active_adapters)
            layer.enable_adapters(not disabled)
        layer.update_layer(adapter_name, config)
        trains = adapter_name in self.active_adapters and not config.inference_mode
        for name in layer.adapter_layer_names:
            container = getattr(layer, name)
            if adapter_name in container:
                _set_layer_requires_grad(container[adapter_name], trains)

    def _freeze_by_scope(self, model: nn.Module, adapter_name: str, config: TalanConfig) -> None:
        """Declare what the trainability scope keeps frozen, in the way that PEFT re-applies at every switch."""
        scope = config.talan_trainable
        for module in model.modules():
            if isinstance(module, TalanLayer):
                frozen = {
                    "joint": (),
                    "side_path": (),
                    "writeback": tuple(n for n in module.adapter_layer_names if n not in WRITEBACK_PARAMETERS),
                    "low_rank": module.adapter_layer_names,
                }[scope]
            elif isinstance(module, LoraLayer):
                frozen = module.adapter_layer_names if scope in ("side_path", "writeback") else ()
            else:
                continue
            if frozen and adapter_name in module._get_available_adapters():
                declared = module.frozen_peft_weight_names.get(adapter_name, ())
                names = tuple(dict.fromkeys((*declared, *frozen)))
                module.frozen_peft_weight_names = {**module.frozen_peft_weight_names, adapter_name: names}
                module._freeze_non_trainable_peft_weights(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        low_rank = low_rank_names(self.model, adapter_names, self.peft_config)
        told = rows_named(self.model, adapter_names, kwargs.get("num_beams") or 1, low_rank)
        with super()._enable_peft_forward_hooks(*args, adapter_names=low_rank, **kwargs), told:
            yield

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete both halves of an adapter; a block whose last side path goes is left without a trace.

        Args:
            adapter_name: The adapter's name.

        Raises:
            ValueError: There is no such adapter, or its low-rank half is merged.
        """
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        for block in list(self.model.modules()):
            layer = getattr(block, TalanLayer.child_name, None)
            if isinstance(layer, TalanLayer) and not layer.talan_options:
                layer.detach(block)
        if was_active:
            # PEFT lets every layer choose the next adapter from those it holds; side paths may hold others.
            self.active_adapter = self.active_adapters or sorted(self.peft_config)[:1]
            for module in self.model.modules():
                if isinstance(module, self.tuner_layer_cls) and module.active_adapters != self.active_adapters:
                    module.set_adapter(self.active_adapters)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the base model's own method, if every active adapter's memory is causal.

        Args:
            *args: Passed on.
            **kwargs: Passed on.

        Returns:
            What the base model's `generate` returns.

        Raises:
            ValueError: An active adapter has a bidirectional memory.
        """
        for name in self.active_adapters:
            scope = getattr(self.peft_config[name], "talan_memory_scope", "causal")
            if scope != "causal":
                raise ValueError(
                    f"talan_memory_scope={scope!r} of adapter {name!r} can't generate: later tokens would change the "
                    "memory of earlier ones; train an adapter with 'causal'"
                )
        return self.model.generate(*args, **kwargs)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            warnings.warn(
                "The side path depends on its input and can't become weights: merge_and_unload folds the low-rank "
                "half and drops the side path, so the outputs differ from the adapter's. Keep the adapter, or use "
                "merge_adapter() to fold the low-rank half and go on with the side path live.",
                stacklevel=3,
            )
        for module in list(self.model.modules()):
            layer = getattr(module, TalanLayer.child_name, None)
            if isinstance(layer, TalanLayer):
                layer.detach(module)
        unload: Callable[..., Any] = super()._unload_and_optionally_merge
        return unload(merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter that is the weighted sum of others: PEFT combines the low-rank halves, perturbations add up.

        Args:
            adapters: The names of the adapters; at most one with a trained side path at each block.
            weights: The weight of each.
            adapter_name: The new adapter's name.
            *args: How the low-rank halves are combined, as in PEFT.
            **kwargs: The same.

        Raises:
            ValueError: The name is taken, an adapter is unknown, or their sum is no adapter.
        """
        if adapter_name in self.peft_config:
            raise ValueError(
                f"adapter_name={adapter_name!r}: there is such an adapter; delete it, or choose another name"
            )
        configs: dict[str, Any] = self.peft_config
        side_paths = weigh_side_paths(self.model, configs, adapters, weights)
        low_rank = {
            name: weight
            for name, weight in zip(adapters, weights, strict=True)
            if configs[name].target_modules != DUMMY_TARGET_MODULES
        }
        first = next(iter(low_rank), adapters[0])
        first_config = configs[first]
        # PEFT multiplies the scaling into the matrices, but would apply rsLoRA's to the sum once more.
        config = replace(first_config, use_rslora=False, **side_paths.fields)
        try:
            if low_rank:
                configs[first] = config  # PEFT makes the new configuration from the first one's.
                super().add_weighted_adapter(list(low_rank), list(low_rank.values()), adapter_name, *args, **kwargs)
            else:
                configs[adapter_name] = config
                self.inject_adapter(self.model, adapter_name)
        except Exception:
            if adapter_name in configs:
                self.delete_adapter(adapter_name)
            raise
        finally:
            configs[first] = first_config
        copy_side_paths(self.model, side_paths.sources, adapter_name)

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
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        broken = [key for key, tensor in state_dict.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise ValueError(
                f"the checkpoint of adapter {adapter_name!r} has NaN or infinite values in {', '.join(broken[:3])}"
                f"{f' and {len(broken) - 3} more' if len(broken) > 3 else ''}; train or fetch it again"
            )
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        known = set(model.state_dict())
        prefix = "base_model.model."
        foreign = [
            key
            for key in remapped
            if _is_side_path_key(key) and not known & {key, key.removeprefix(prefix), prefix + key}
        ]
        if foreign:
            # PEFT passes over what has no place; here it would be half an adapter without a word.
            raise ValueError(
                f"the checkpoint of adapter {adapter_name!r} has side-path tensors that its configuration has no "
                f"place for: {', '.join(foreign[:3])}; load it with the adapter_config.json that it was saved with"
            )
        return remapped
