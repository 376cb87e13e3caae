"""What the study compares: low-rank adapters with and without a side path, and one change of an axis at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from peft_talan import TalanConfig

LOW_RANK: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
MATCHED = "lora-matched"
ADAPTERS = ("lora", "lora+talan", MATCHED, "dora", "dora+talan", "rslora", "rslora+talan")
"""`lora-matched` is LoRA with its rank raised until it trains at least as many parameters as `lora+talan`."""

LEARNING_RATE_SCALE, FIRST_WRITE, TWO_STAGES = "side_path_lr_scale", "first_write", "two_stages"
OF_THE_TRAINING = (LEARNING_RATE_SCALE, FIRST_WRITE, TWO_STAGES)
"""The axes that belong to the training and not to the configuration.

`first_write`: the norm of each column of the write-back before the first step, instead of zero. `two_stages`: the
LoRA weights alone in the first steps, up to the middle, then the side path, too.
"""

SIDE_PATH_TRIES: dict[str, dict[str, Any]] = {
    "side path's learning rate x5": {LEARNING_RATE_SCALE: 5.0},
    "all blocks, alpha 0.1": {"talan_layers": "all", "talan_alpha": 0.1},
    "write-back from 0.05": {FIRST_WRITE: 0.05},
    "two stages": {TWO_STAGES: True},
}
"""What is tried on the development seed beside the defaults, in this order; no arm has weight decay."""


def _along(axis: str, name: str, *values: Any) -> dict[str, dict[str, Any]]:
    return {name.format(value): {axis: value} for value in values}


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    **_along("talan_layers", "layers {0[0]}", [0.0], [0.17], [0.5], [0.67], [1.0]),
    "layers 0.33 and 0.67": {"talan_layers": [0.33, 0.67]},
    "layers all": {"talan_layers": "all"},
    "position input": {"talan_position": "input"},
    **_along("talan_slots", "slots {}", 1, 4, 16, 32),
    **_along("talan_dim", "width {}", 8, 16, 64),
    **_along("talan_mixer", "mixer {}", "linear", "mlp"),
    **_along("talan_writeback", "writeback {}", "gated", "capped", "orthogonal"),
    "trains side path": {"talan_trainable": "side_path"},
    "trains writeback": {"talan_trainable": "writeback"},
    **_along("talan_grad_scale", "gradient scale {:g}", 0.1, 10.0),
    **_along("talan_alpha", "alpha {:g}", 0.03, 0.1, 0.3, 3.0, 10.0),
    **_along(LEARNING_RATE_SCALE, "learning rate x{:g}", 0.1, 0.3, 3.0, 10.0),
    "memory bidirectional": {"talan_memory_scope": "bidirectional"},
}
"""The axes of the ablation, each changed alone from the package's defaults."""

INITIAL_SCALES = {
    "init slots x3": (3, 1),
    "init queries x4": (1, 4),
    "init slots x3 queries x4": (3, 4),
    "init slots x3 queries x10": (3, 10),
}
"""By variant: what the initial slot logits and queries are multiplied by. No axis, so that the stored keys stay."""


def low_rank_options(adapter: str, rank: int, target_modules: str | list[str]) -> dict[str, Any]:
    """The options of the LoRA weights, which an arm shares with its partner without the side path."""
    kind = "lora" if adapter == MATCHED else adapter.removesuffix("+talan")
    return {
        "r": rank,
        # rsLoRA has it, too: with an alpha that leads to LoRA's scale at this rank it would be LoRA itself.
        "lora_alpha": 2 * rank,
        "target_modules": target_modules,
        "task_type": None,
        **LOW_RANK[kind],
    }


def configured(axes: dict[str, Any]) -> dict[str, Any]:
    """The axes that are fields of the configuration."""
    return {name: value for name, value in axes.items() if name not in OF_THE_TRAINING}


def prepare(model: Any, variant: str, axes: dict[str, Any]) -> None:
    """Change the fresh side path of an arm that starts from other values."""
    for name, parameter in model.named_parameters():
        if "lora_talan_write" in name and FIRST_WRITE in axes:
            parameter.data = axes[FIRST_WRITE] * functional.normalize(torch.randn_like(parameter), dim=0)
        if "lora_talan_read" in name and variant in INITIAL_SCALES:
            slots, queries = INITIAL_SCALES[variant]
            width = model.peft_config["default"].talan_dim
            # Its rows: values, queries, slot logits.
            parameter.data[width : 2 * width] *= queries
            parameter.data[2 * width :] *= slots


def raised_rank(base: Any, rank: int, target_modules: str | list[str], axes: dict[str, Any]) -> int:
    """The smallest rank at which LoRA trains at least as many parameters as LoRA with the side path."""
    options, counts = low_rank_options("lora", rank, target_modules), []
    for config in (LoraConfig(**options), TalanConfig(**options, **axes)):
        model = get_peft_model(base, config)
        counts.append(model.get_nb_trainable_parameters()[0])
        model.unload()
    return math.ceil(rank * counts[1] / counts[0])


def make_config(
    adapter: str, base: Any, rank: int, target_modules: str | list[str], axes: dict[str, Any]
) -> LoraConfig:
    """The configuration of one arm."""
    axes = configured(axes)
    if adapter == MATCHED:
        rank = raised_rank(base, rank, target_modules, axes)
    options = low_rank_options(adapter, rank, target_modules)
    return TalanConfig(**options, **axes) if adapter.endswith("+talan") else LoraConfig(**options)
