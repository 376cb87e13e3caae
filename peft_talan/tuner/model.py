"""The tuner: LoRA by PEFT's own `LoraModel`, and a side path attached to some decoder blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from ..axes import check_causal
from ..checkpoint.card import write_adapter_card
from ..checkpoint.checks import check_side_path, check_whole_modules, read_header
from ..checkpoint.names import CHILD_NAME, check_new_name, is_side_path_key
from ..checkpoint.rollback import Snapshot, attributes_unchanged_on_error
from ..config import TalanConfig, TalanRuntimeConfig
from . import tensor_parallel
from .attachment import attach_side_path, attached_side_paths
from .blocks import check_size, choose_targets, find_blocks, find_hidden_size, point_at_fused_experts
from .merge import MergingModel
from .mixed_batch import NO_ROWS, rows_named
from .residual_streams import find_streams
from .trainability import declare_scope
from .weighted import add_weighted_adapter


class TalanModel(MergingModel):
    """Creates a TALAN model: a low-rank adapter and a side path, trained together (arXiv 2606.06902).

    Args:
        model (torch.nn.Module): The model to be adapted.
        config (TalanConfig): The configuration of the adapter.
        adapter_name (str): The name of the adapter. Default `"default"`.
        low_cpu_mem_usage (bool): Whether to create empty adapter weights on the meta device. Default False.

    Examples:
        >>> model = get_peft_model(base_model, TalanConfig(task_type="CAUSAL_LM"))
        >>> isinstance(model.base_model, TalanModel)
        True
    """

    prefix: str = LoraModel.prefix
    # Both kinds of layers are switched, frozen and deleted together.
    tuner_layer_cls = BaseTunerLayer  # type: ignore[assignment]  # LoraModel has LoRA's layers alone.

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # Not as TALAN is registered: PEFT may be imported in the middle of transformers' own import then.
        from .trainers import look_at_trainers

        look_at_trainers()
        taken = getattr(model, "peft_config", {})
        if adapter_name in taken:
            raise ValueError(
                f"adapter_name={adapter_name!r}: the model already has an adapter of this name; give another name, or "
                "call unload() or delete_adapter() first"
            )
        try:
            # `inject_adapter` restores what lies inside.
            with attributes_unchanged_on_error(model):
                super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except BaseException:
            if not taken:
                # transformers' add_adapter sets it too early, and could not add another adapter afterwards.
                vars(model).pop("_hf_peft_config_loaded", None)
            raise

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add an adapter's LoRA weights and side path; everything is checked before the model is touched.

        Args:
            model: The base model.
            adapter_name: The adapter's name.
            autocast_adapter_dtype: As in PEFT. Default True.
            low_cpu_mem_usage: Whether to create empty weights on the meta device. Default False.
            state_dict: As in PEFT: its keys name the modules of the LoRA weights; the side path goes where the
                configuration says.

        Raises:
            ValueError: The configuration does not fit the model, or the name can't be an adapter's.
        """
        check_new_name(adapter_name)
        config = self.peft_config[adapter_name]
        if not isinstance(config, TalanConfig):
            raise ValueError(
                f"config={type(config).__name__}: a TALAN model takes a TalanConfig for adapter {adapter_name!r}"
            )
        name, every_block = find_blocks(model, config)
        find_streams(model, f"{name}.0")
        blocks = choose_targets(config, name, every_block)
        hidden_size = find_hidden_size(model, config)
        tensor_parallel.check_plan(model)
        check_size(config, model, hidden_size, len(blocks))
        checkpoint = config.checkpoint_to_load()
        header = None if checkpoint is None else read_header(checkpoint)
        if header is not None:
            check_side_path(adapter_name, config, blocks, hidden_size, header.side_path)
        # PEFT changes the model's configuration, too.
        model_config = [model.config] if isinstance(model, PreTrainedModel) else []
        before = Snapshot(self, config, *model_config)
        # Walks through the adapted model cost more than all else here, and a first adapter needs none.
        first = not any(isinstance(module, BaseTunerLayer) for module in before.modules)
        try:
            point_at_fused_experts(model, config)
            if state_dict is not None:
                state_dict = {key: tensor for key, tensor in state_dict.items() if not is_side_path_key(key)}
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            for index in blocks:
                with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                    attach_side_path(self, index, len(every_block), hidden_size, f"{name}.{index}", adapter_name)
            places = ((block, getattr(block, CHILD_NAME)) for block in blocks.values())
            for _, layer in places if first else attached_side_paths(model):
                layer.has_lora_weights = {name: other.has_lora_weights for name, other in self.peft_config.items()}
            tensor_parallel.synchronize(model, adapter_name)
            if not first or config.talan_trainable != "joint":
                declare_scope(model, adapter_name, config.talan_trainable)
            if header is not None and (config.modules_to_save or config.trainable_token_indices is not None):
                check_whole_modules(adapter_name, header.names, model)
        except BaseException:
            before.restore()
            raise
        config.runtime_config = TalanRuntimeConfig(
            config.runtime_config.ephemeral_gpu_offload, after_save=partial(write_adapter_card, adapter_name)
        )
        if checkpoint is not None:
            self._before_loading = before

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if self._before_loading is not None:
            self._before_loading = None  # A model that runs is not being loaded.
        adapter_names = kwargs.pop("adapter_names", None)
        enable = super()._enable_peft_forward_hooks
        if adapter_names is None:
            context = enable(*args, **kwargs)
        else:
            context = rows_named(
                self.model,
                adapter_names,
                self.peft_config,
                kwargs.get("num_beams") or 1,
                lambda names: enable(*args, adapter_names=names, **kwargs),
            )
        with context:
            yield

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter's LoRA weights and side path; a block whose last side path goes is left without a trace.

        Args:
            adapter_name: The adapter's name.

        Raises:
            ValueError: There is no such adapter, or its LoRA weights are merged.

        Examples:
            >>> model.delete_adapter("default")
        """
        super().delete_adapter(adapter_name)
        for block, layer in attached_side_paths(self.model):
            if not layer.talan_options:
                layer.detach(block)
        if not self.active_adapters and self.peft_config:
            # LoRA's layers know no adapter that is a side path alone.
            self.set_adapter(sorted(self.peft_config)[0])

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the base model's own method, if every active adapter's memory is causal.

        Args:
            *args: Passed on.
            **kwargs: Passed on.

        Returns:
            What the base model's `generate` returns.

        Raises:
            ValueError: An active adapter has a bidirectional memory.

        Examples:
            >>> model.generate(**tokenizer("What is 27 + 48?", return_tensors="pt"), max_new_tokens=16)
        """
        for name in self.active_adapters:
            check_causal(getattr(self.peft_config[name], "talan_memory_scope", "causal"), name)
        return self.model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Generate by continuous batching, with the base model's own method.

        Args:
            *args: Passed on.
            adapter_names: Refused: transformers would ignore it and run the active adapters. Default None.
            **kwargs: Passed on.

        Returns:
            What the base model's `generate_batch` returns.

        Raises:
            ValueError: `adapter_names` was given.
        """
        if adapter_names is not None:
            raise ValueError(NO_ROWS)
        return self.model.generate_batch(*args, **kwargs)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter that is the weighted sum of others: PEFT combines the LoRA weights, perturbations add up.

        Args:
            adapters: The names of the adapters; at most one with a trained side path at each block.
            weights: The weight of each.
            adapter_name: The new adapter's name.
            *args: How the LoRA weights are combined, as in PEFT.
            **kwargs: The same.

        Raises:
            ValueError: The name is taken, an adapter is unknown, or their sum is not an adapter.

        Examples:
            >>> model.add_weighted_adapter(["sums", "proofs"], [0.7, 0.3], "both", combination_type="cat")
        """
        combine = super().add_weighted_adapter
        add_weighted_adapter(
            self,
            lambda low_rank, factors: combine(low_rank, factors, adapter_name, *args, **kwargs),
            adapters,
            weights,
            adapter_name,
        )
