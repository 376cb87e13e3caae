"""What stays of the side paths when an adapter is merged and PEFT's wrappers go."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from copy import copy
from dataclasses import fields
from functools import partial
from inspect import signature
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import create_and_tag_model_card

from ..checkpoint.card import CARD_NAME, write_cards
from ..checkpoint.checks import is_finite
from ..checkpoint.names import ModuleNames
from ..config import TalanConfig
from .kept import kept_side_paths, kept_tensor_name, move_to_base

DROPPED = (
    "The side path depends on its input and can't become weights: the low-rank half was merged, and the side path was "
    "dropped, so the outputs differ from the adapter's (side_path='keep' keeps them)."
)
"""What `merge_and_unload(side_path="drop")` warns of."""
LIVE = (
    "merge_adapter() folds the low-rank half alone into the weights: the side path stays live in this model, and "
    "weights that are exported from it (such as TRL's for vLLM) are without it. Generate with this model "
    "(use_vllm=False), or export with merge_and_unload() and save_pretrained()."
)
"""What `merge_adapter` warns of, once a model."""


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
    """Describe the side path of an adapter without its low-rank half, as a part of a base model.

    Args:
        config: The adapter's configuration.

    Returns:
        A configuration with the same axes and `r=0`, without what acts in training alone.
    """
    axes = {axis.name: getattr(config, axis.name) for axis in fields(config) if axis.name.startswith("talan_")}
    # A base model has no dropout of an adapter, and gives the gradients that its outputs have.
    axes |= {"talan_trainable": "joint", "talan_dropout": 0.0, "talan_grad_scale": 1.0, "talan_kept": True}
    return TalanConfig(r=0, task_type=config.task_type, inference_mode=True, **axes)


def keep_side_paths(model: nn.Module, configs: dict[str, TalanConfig]) -> None:
    """Leave the side paths of some adapters on a model whose weights hold their low-rank halves.

    They belong to the model from then on, as its weights do. The `save_pretrained` and `push_to_hub` of a model of
    transformers write both into one folder, from which `from_pretrained` makes the same model.

    Args:
        model: The model, unwrapped.
        configs: The configurations of the side paths that stay, by adapter name; all others are removed.
    """
    move_to_base(model, configs)
    if isinstance(model, PreTrainedModel):
        # Partials, since bound methods do not survive pickling.
        methods = {"save_pretrained": partial(save_kept_model, model), "push_to_hub": partial(push_kept_model, model)}
        vars(model).update(methods)


def keep_once_loaded(model: PreTrainedModel, adapter_name: str) -> None:
    """Let an embedded adapter become a part of its model as soon as transformers has filled it.

    transformers adds an adapter, fills it, and has no hook for afterwards.

    Args:
        model: The model, to which the adapter has just been added.
        adapter_name: The adapter's name.
    """
    vars(model)["_load_pretrained_model"] = partial(_load_and_keep, model, adapter_name)


def _load_and_keep(owner: PreTrainedModel, adapter_name: str, *args: Any, **kwargs: Any) -> object:
    del vars(owner)["_load_pretrained_model"]
    # How the base model's own tensors were renamed as they were loaded, which its saving turns back.
    conversions = vars(owner).get("_weight_conversions")
    loaded: object = type(owner)._load_pretrained_model(*args, **kwargs)
    config: Any = owner.peft_config[adapter_name]
    keep_side_paths(owner, {adapter_name: side_path_config(config)})
    for attribute in ("peft_config", "_hf_peft_config_loaded", "_weight_conversions"):
        vars(owner).pop(attribute, None)
    if conversions is not None:
        owner._weight_conversions = conversions
    return loaded


def _kept_config(model: PreTrainedModel) -> TalanConfig:
    """The configuration of the one side path that a model's folder can embed."""
    kept = ((layer.stage, name, config) for layer in kept_side_paths(model) for name, config in layer.configs.items())
    found = {(stage, name): config for stage, name, config in kept}
    if len(found) != 1:
        raise ValueError(
            f"model: it has {len(found)} kept side paths, and a folder can embed one side path only; merge one "
            "adapter (merge_and_unload(adapter_names=[...])), or save a second stage's adapter unmerged and load it "
            "on the saved model of the first"
        )
    return next(iter(found.values()))


def save_kept_model(
    model: PreTrainedModel,
    save_directory: str | PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> object:
    """Write one folder with the merged weights in standard form and the side path as an embedded adapter.

    Args:
        model: The model that `merge_and_unload(side_path="keep")` gave.
        save_directory: The folder; `AutoModelForCausalLM.from_pretrained` restores the model from it.
        is_main_process: Whether this process writes. Default True.
        state_dict: The model's state dict, if it has to be gathered. Default: the model's own.
        push_to_hub: Whether to push the folder, too. Default False.
        **kwargs: As in transformers' `save_pretrained` and `push_to_hub`; what neither knows goes to
            `huggingface_hub.create_repo`, with `repo_id` (the folder's name by default), `private` and `token`.

    Returns:
        The commit, if the folder was pushed, and None otherwise.

    Raises:
        ValueError: The model keeps more than one side path: a folder embeds one adapter.
    """
    plain_save = partial(type(model).save_pretrained, model, is_main_process=is_main_process)
    if model._hf_peft_config_loaded:
        # Of a model with an adapter, transformers saves the adapter alone.
        plain_save(save_directory, state_dict=state_dict, push_to_hub=push_to_hub, **kwargs)
        return None
    config, folder = _kept_config(model), Path(save_directory)
    known = set(signature(type(model).save_pretrained).parameters) - {"token"}
    options = {name: kwargs.pop(name) for name in known & kwargs.keys()}
    base, upload = str(folder), None
    if push_to_hub and is_main_process:
        base, upload = _prepare_upload(model, folder, kwargs)
    names = ModuleNames(model)
    tensors = {names.plain(key): t for key, t in (model.state_dict() if state_dict is None else state_dict).items()}
    kept = {key: kept_tensor_name(key) for key in tensors}
    plain_save(folder, state_dict={key: tensor for key, tensor in tensors.items() if kept[key] is None}, **options)
    if is_main_process:
        side_path = {f"base_model.model.{kept[key]}": t.contiguous() for key, t in tensors.items() if kept[key]}
        save_file(side_path, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        _add_to_indices(folder, side_path)
        config = copy(config)
        # The weights beside it are its base: transformers takes them from where this field says, on the hub at least.
        config.base_model_name_or_path = base
        config.save_pretrained(str(folder))
        write_cards(model, folder)
    return None if upload is None else upload()


def _add_to_indices(folder: Path, names: Collection[str]) -> None:
    """Let the index of sharded weights name the side path's tensors, too.

    Other programs read the files that an index names, and would run the merged weights alone; they then find tensors
    that they have no place for, as they do in a folder without an index.
    """
    for file in folder.glob("*.safetensors.index*.json"):
        index = json.loads(file.read_text(encoding="utf-8"))
        index["weight_map"] |= dict.fromkeys(names, SAFETENSORS_WEIGHTS_NAME)
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _prepare_upload(
    model: PreTrainedModel, folder: Path, arguments: dict[str, Any]
) -> tuple[str, Callable[[], object]]:
    """Create the repository; the second result uploads what is new in the folder by then."""
    token = arguments.get("token")
    known = set(signature(model._upload_modified_files).parameters) - {"token", "repo_id"}
    commit = {name: arguments.pop(name) for name in known & arguments.keys()}
    tags = arguments.pop("tags", None) or []
    tags = [*(model.model_tags or []), *([tags] if isinstance(tags, str) else tags)]
    folder.mkdir(parents=True, exist_ok=True)
    name = arguments.pop("repo_id", None) or folder.resolve().name
    repo_id = HfApi().create_repo(name, exist_ok=True, **arguments).repo_id
    files = model._get_files_timestamps(folder)

    def upload() -> object:
        create_and_tag_model_card(repo_id, tags, token=token).save(folder / CARD_NAME)
        return model._upload_modified_files(folder, repo_id, files, token=token, **commit)

    return repo_id, upload


def push_kept_model(model: PreTrainedModel, repo_id: str, **kwargs: Any) -> object:
    """Push the merged weights and the embedded side path to the hub as one repository.

    Args:
        model: The model that `merge_and_unload(side_path="keep")` gave.
        repo_id: The repository.
        **kwargs: As in transformers' `push_to_hub`; what it does not know goes to `huggingface_hub.create_repo`.

    Returns:
        The commit.
    """
    if model._hf_peft_config_loaded:
        return type(model).push_to_hub(model, repo_id, **kwargs)
    with TemporaryDirectory() as folder:
        return save_kept_model(model, folder, push_to_hub=True, repo_id=repo_id, **kwargs)
