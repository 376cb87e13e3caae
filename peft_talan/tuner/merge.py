"""What stays of the side paths when an adapter is merged and PEFT's wrappers go."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.card import write_cards
from ..checkpoint.checks import is_finite
from ..checkpoint.names import is_side_path_key
from ..config import TalanConfig
from .attachment import attached_side_paths

_NO_WEIGHTS = (
    "The side path depends on its input and can't become weights: the low-rank half was merged, and the side path"
)
OUTCOMES: dict[str, str] = {
    "keep": f"{_NO_WEIGHTS} stays on its blocks as an embedded adapter (side_path='drop' gives a plain model).",
    "drop": f"{_NO_WEIGHTS} was dropped, so the outputs differ from the adapter's (side_path='keep' keeps them).",
}
"""What `merge_and_unload` warns of, by its argument `side_path`."""


def check_mergeable(model: nn.Module, adapter_names: Collection[str]) -> None:
    """Refuse adapters with a NaN or an infinity in either half.

    Args:
        model: The model with the adapters.
        adapter_names: The adapters to check.

    Raises:
        ValueError: A tensor of theirs is not finite.
    """
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


def side_path_config(config: TalanConfig) -> TalanConfig:
    """Describe the side path of an adapter without its low-rank half.

    Args:
        config: The adapter's configuration.

    Returns:
        A configuration with the same axes and `r=0`.
    """
    axes = {axis.name: getattr(config, axis.name) for axis in fields(config) if axis.name.startswith("talan_")}
    axes["talan_trainable"] = "joint"
    return TalanConfig(r=0, task_type=config.task_type, inference_mode=True, **axes)


def keep_side_paths(model: nn.Module, configs: dict[str, TalanConfig]) -> None:
    """Leave the side paths of some adapters on a model whose weights hold their low-rank halves.

    A model of transformers then has them as embedded adapters, just as `from_pretrained` makes it from a folder that
    holds `config.json` and `adapter_config.json`; its `save_pretrained` and `push_to_hub` write such a folder.

    Args:
        model: The model, unwrapped.
        configs: The configurations of the side paths that stay, by adapter name; all others are removed.
    """
    for block, layer in attached_side_paths(model):
        for name in set(layer.talan_options) - set(configs):
            layer.delete_adapter(name)
        if not layer.talan_options:
            layer.detach(block)
            continue
        layer.merged_adapters.clear()
        layer.enable_adapters(True)
        layer.set_adapter(list(configs))
        layer.requires_grad_(False)
        layer.to(layer.placement.dtype)  # the type that a model has which is loaded with an embedded adapter
    if isinstance(model, PreTrainedModel):
        model._hf_peft_config_loaded = True
        # transformers would write the adapter alone. Partials, since bound methods do not survive pickling.
        methods = {"save_pretrained": partial(save_kept_model, model), "push_to_hub": partial(push_kept_model, model)}
        model.__dict__.update(peft_config=configs, **methods)


def save_kept_model(
    model: PreTrainedModel,
    save_directory: str | PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Write one folder with the merged weights in standard form and the side path as an embedded adapter.

    Args:
        model: The model that `merge_and_unload(side_path="keep")` gave.
        save_directory: The folder; `AutoModelForCausalLM.from_pretrained` restores the model from it.
        is_main_process: Whether this process writes. Default True.
        state_dict: The model's state dict, where it has to be gathered. Default: the model's own.
        push_to_hub: Whether to push the model, too, to `kwargs["repo_id"]`. Default False.
        **kwargs: Passed on to transformers' `save_pretrained`.

    Raises:
        ValueError: More than one side path is active: a folder embeds one adapter.
    """
    plain_save = partial(type(model).save_pretrained, model, is_main_process=is_main_process)
    if not model._hf_peft_config_loaded:
        # The side path was deleted since; what is left is a plain model.
        plain_save(save_directory, state_dict=state_dict, push_to_hub=push_to_hub, **kwargs)
        return
    # Not by transformers' own `active_adapters`, which asks for PEFT 0.22 from transformers 5.24 on.
    names = next(module for module in model.modules() if isinstance(module, BaseTunerLayer)).active_adapters
    if len(names) != 1:
        raise ValueError(
            f"active adapters {names}: a saved model can embed one side path only; call "
            "merge_and_unload(adapter_names=[...]) with one name, or set_adapter(name) for the one to save"
        )
    repo_id = kwargs.pop("repo_id", None)
    state_dict = model.state_dict() if state_dict is None else state_dict
    model._hf_peft_config_loaded = False
    try:
        plain = {name: tensor for name, tensor in state_dict.items() if not is_side_path_key(name)}
        plain_save(save_directory, state_dict=plain, **kwargs)
    finally:
        model._hf_peft_config_loaded = True
    if is_main_process:
        _save_side_path(model, names[0], state_dict, Path(save_directory))
        write_cards(model, save_directory)
    if push_to_hub:
        push_kept_model(model, repo_id or Path(save_directory).name, token=kwargs.get("token"))


def _save_side_path(
    model: PreTrainedModel, adapter_name: str, state_dict: dict[str, torch.Tensor], folder: Path
) -> None:
    tensors = get_peft_model_state_dict(model, state_dict, adapter_name, save_embedding_layers=False)
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()},
        folder / SAFETENSORS_WEIGHTS_NAME,
        metadata={"format": "pt"},
    )
    config = model.peft_config[adapter_name]
    pushed_to = config.base_model_name_or_path
    # The merged weights beside it, and no other model's, are what this side path belongs to.
    config.base_model_name_or_path = pushed_to or str(folder)
    try:
        config.save_pretrained(folder)
    finally:
        config.base_model_name_or_path = pushed_to


def push_kept_model(model: PreTrainedModel, repo_id: str, **kwargs: Any) -> str:
    """Push the merged weights and the embedded side path to the hub as one repository.

    Args:
        model: The model that `merge_and_unload(side_path="keep")` gave.
        repo_id: The repository.
        **kwargs: Passed on to transformers' `push_to_hub`.

    Returns:
        The address of the commit.
    """
    options = {name: kwargs[name] for name in ("private", "token") if name in kwargs}
    repo_id = HfApi().create_repo(repo_id, exist_ok=True, **options).repo_id
    configs = list(getattr(model, "peft_config", {}).values())
    bases = [config.base_model_name_or_path for config in configs]
    try:
        for config in configs:
            # From the hub, transformers takes the weights from where the adapter's configuration says.
            config.base_model_name_or_path = repo_id
        return type(model).push_to_hub(model, repo_id, **kwargs)
    finally:
        for config, base in zip(configs, bases, strict=True):
            config.base_model_name_or_path = base
