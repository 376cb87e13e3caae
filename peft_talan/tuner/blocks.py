"""Finds a model's decoder blocks, the width of its residual stream, and what of it a configuration means."""

from __future__ import annotations

import inspect
import math

from peft.utils import PeftType
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..axes import RECALL_DEPTHS, spacing_of
from ..checkpoint.names import CHILD_NAME
from ..config import DEFAULT_DEPTHS, TalanConfig
from ..functional.initialization import parameter_shapes

SMALLEST_LIMIT = 2**20
"""How many numbers a side path may hold beside any model, however small."""

CHOSEN_LISTS: dict[str, str] = {
    # Without blocks of their own: the norm that ends each receives and returns the residual stream.
    "flaubert": "layer_norm2",
    "xlm": "layer_norm2",
    # Of the two stacks, the one whose state the model's output is made from.
    "hrm_text": "H_module.layers",
}
"""Model types of which several lists fit, and how the name of the right one ends."""


def _text_config(model: nn.Module) -> object | None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    return config.get_text_config(decoder=True)


def find_blocks(model: nn.Module, config: TalanConfig) -> tuple[str, nn.ModuleList]:
    """Find the `nn.ModuleList` of decoder blocks."""
    name, blocks = _named_or_found(model, config)
    owner = model.get_submodule(name.rpartition(".")[0])
    code = getattr(inspect.unwrap(type(owner).forward), "__code__", None)
    if code is not None and "forward" in code.co_names and "super" not in code.co_names:
        raise ValueError(
            f"talan_blocks: {type(owner).__name__} calls modules by .forward(), which runs no hooks, so a side path "
            f"on its blocks {name!r} would do nothing; use a plain LoraConfig, or call the blocks themselves"
        )
    return name, blocks


def _named_or_found(model: nn.Module, config: TalanConfig) -> tuple[str, nn.ModuleList]:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module}
    if config.talan_blocks is not None:
        if config.talan_blocks not in lists:
            raise ValueError(
                f"talan_blocks={config.talan_blocks!r}: the model has no nn.ModuleList of this name; it has "
                f"{', '.join(map(repr, lists)) or 'none'}"
            )
        return config.talan_blocks, lists[config.talan_blocks]
    fitting, candidates = _fitting_lists(model, lists)
    chosen = CHOSEN_LISTS.get(getattr(_text_config(model), "model_type", ""))
    if chosen is not None:
        fitting = [name for name in candidates if f".{name}".endswith(f".{chosen}")]
    if len(fitting) != 1:
        raise ValueError(
            f"talan_blocks=None: {'no' if not fitting else 'more than one'} list of decoder blocks was found in "
            f"{type(model).__name__}; set talan_blocks to the name of the nn.ModuleList whose modules each take the "
            f"residual stream and return it, once in every forward pass; its lists are "
            f"{', '.join(map(repr, fitting or candidates)) or 'none'}"
        )
    return fitting[0], lists[fitting[0]]


def _fitting_lists(model: nn.Module, lists: dict[str, nn.ModuleList]) -> tuple[list[str], list[str]]:
    """The lists that fit all that the model says about its blocks, and all lists of its text decoder."""
    text_config = _text_config(model)
    decoder = model
    while isinstance(decoder, PreTrainedModel) and isinstance(inner := decoder.get_decoder(), nn.Module):
        if inner is decoder:
            break
        decoder = inner
    candidates = list(lists)
    if len(lists) > 1:
        inside = {id(module) for module in decoder.modules()}
        candidates = [name for name in lists if id(lists[name]) in inside] or candidates
    # A vision tower inside the decoder has a configuration of its own.
    candidates = [
        name for name in candidates if type(innermost_config(model, name)) is type(text_config)
    ] or candidates
    # What transformers keeps on one device is a block.
    classes = set(getattr(model, "_no_split_modules", None) or ())
    of_blocks = [name for name in candidates if classes.issuperset(type(block).__name__ for block in lists[name])]
    depth = getattr(text_config, "num_hidden_layers", None)
    for names in (of_blocks, candidates):
        fitting = _outermost([name for name in names if len(lists[name]) == depth])
        if fitting:
            return fitting, _outermost(candidates)
    return _outermost(of_blocks), _outermost(candidates)


def innermost_config(model: nn.Module, name: str) -> object | None:
    """The configuration of the innermost module with one that a module lies in."""
    *path, _ = name.split(".")
    owners = [model, *(model.get_submodule(".".join(path[: depth + 1])) for depth in range(len(path)))]
    configs = (getattr(owner, "config", None) for owner in reversed(owners))
    return next((config for config in configs if isinstance(config, PreTrainedConfig)), None)


def _outermost(names: list[str]) -> list[str]:
    """Without the lists inside a block of another, such as experts, which can be as many as the blocks."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def find_decoder(model: nn.Module, block_name: str) -> nn.Module:
    """Find the module whose forward pass runs a block, and which is called with its tokens' masks and positions."""
    path = block_name.split(".")
    around = [model.get_submodule(".".join(path[:end])) for end in range(len(path) - 1, -1, -1)]
    owners = [module for module in around if not isinstance(module, nn.ModuleList)]
    place = next((place for place, module in enumerate(owners) if isinstance(module, PreTrainedModel)), None)
    if place is None:
        return owners[-1]
    return owners[place - 1] if place > 0 and _makes_masks(owners[place], owners[place - 1]) else owners[place]


def _makes_masks(owner: nn.Module, inner: nn.Module) -> bool:
    """Whether a module is not called with the masks of its blocks' tokens, but calls the next inner one with them.

    FSMT's model is called with an encoder's tokens and mask, too; CPM-Ant makes its mask from the tokens.
    """
    of_owner, of_inner = (set(inspect.signature(module.forward).parameters) for module in (owner, inner))
    return "decoder_input_ids" in of_owner or ("attention_mask" in of_inner and "attention_mask" not in of_owner)


def is_from_transformers(module: nn.Module) -> bool:
    """Whether a module's forward pass is that of a model of transformers."""
    defines_forward = next(base for base in type(module).__mro__ if "forward" in vars(base))
    return defines_forward.__module__.startswith("transformers.")


def find_hidden_size(model: nn.Module, config: TalanConfig) -> int:
    """Find the width of the residual stream."""
    hidden_size = getattr(_text_config(model), "hidden_size", None)
    if config.talan_hidden_size is not None:
        if isinstance(hidden_size, int) and hidden_size != config.talan_hidden_size:
            raise ValueError(
                f"talan_hidden_size={config.talan_hidden_size}: the residual stream of {type(model).__name__} is "
                f"{hidden_size} wide; leave the field at None"
            )
        return config.talan_hidden_size
    if not isinstance(hidden_size, int):
        raise ValueError(
            f"talan_hidden_size=None: the configuration of {type(model).__name__} does not give the width of the "
            "residual stream; set talan_hidden_size to it"
        )
    return hidden_size


def resolve_layers(config: TalanConfig, depth: int) -> list[int]:
    """Turn `talan_layers` into the indices of a model with a number of blocks."""
    layers = config.talan_layers
    if layers == "all":
        return list(range(depth))
    spacing = spacing_of(layers)
    if spacing is not None:
        if spacing > depth:
            raise ValueError(
                f"talan_layers={layers!r}: the model has {depth} blocks, fewer than {spacing}; use 'every_{depth}' or "
                "a smaller number"
            )
        # As the models that have full attention in every n-th block: the last one of each n.
        return list(range(spacing - 1, depth, spacing))
    if layers is None:
        layers = DEFAULT_DEPTHS
    elif layers == "recall":
        layers = RECALL_DEPTHS
    if isinstance(layers[0], float):
        return sorted({min(int(fraction * depth), depth - 1) for fraction in layers})
    indices = []
    for layer in layers:
        if not -depth <= layer < depth:
            raise ValueError(
                f"talan_layers={layers!r}: index {layer} is out of range for a model of {depth} blocks; "
                f"use indices from {-depth} to {depth - 1}"
            )
        indices.append(layer % depth)
    if len(set(indices)) != len(indices):
        raise ValueError(f"talan_layers={layers!r}: a block is named twice in a model of {depth} blocks; name it once")
    return sorted(indices)


def choose_targets(config: TalanConfig, name: str, blocks: nn.ModuleList) -> dict[int, nn.Module]:
    """Choose the decoder blocks that a configuration gives a side path to."""
    targets = {index: blocks[index] for index in resolve_layers(config, len(blocks))}
    for index, block in targets.items():
        if isinstance(block, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise ValueError(
                f"talan_blocks: block {name}.{index} is a {type(block).__name__}, which would call the side path as "
                "one of its steps; put it inside a module of its own class"
            )
        arguments = list(inspect.signature(block.forward).parameters)
        if "hidden_states" in arguments[1:]:
            reason = "and a side path reads and writes one"
            if hasattr(block, "backward_pass"):
                reason = (
                    "which the backward pass computes anew from those that it passed on, without hooks, so gradients "
                    "would be those of other hidden states"
                )
            raise ValueError(
                f"talan_blocks: block {name}.{index} takes {arguments[0]} before its hidden_states: it passes on "
                f"several hidden states of each token, {reason}; use a plain LoraConfig"
            )
        child = getattr(block, CHILD_NAME, None)
        if child is not None and not hasattr(child, "talan_options"):
            raise ValueError(
                f"talan_layers: block {name}.{index} has an attribute {CHILD_NAME!r} that is no side path; rename it"
            )
    return targets


def check_size(config: TalanConfig, model: nn.Module, hidden_size: int, blocks: int) -> None:
    """Refuse LoRA weights or side paths larger than the model itself, before any memory is allocated.

    Linux grants memory that it does not have, and ends the process without an error when the memory is filled.
    """
    shapes = parameter_shapes(config.side_path_options, hidden_size, config.talan_slots, config.talan_dim)
    side_path = blocks * sum(map(math.prod, shapes.values()))
    rank = max([config.r, *(config.rank_pattern or {}).values()]) if config.has_lora_weights else 0
    if max(side_path, rank * hidden_size) <= SMALLEST_LIMIT:
        return
    limit = max(SMALLEST_LIMIT, sum(parameter.numel() for parameter in model.parameters()))
    if side_path > limit:
        raise ValueError(
            f"talan_dim={config.talan_dim}, talan_slots={config.talan_slots}: the side path would hold {side_path:,} "
            f"numbers, more than the model and than {SMALLEST_LIMIT:,}; it is meant to be small: the defaults are "
            "talan_dim=32, talan_slots=8"
        )
    if rank * hidden_size > limit:
        raise ValueError(
            f"r={config.r}, rank_pattern={config.rank_pattern}: one matrix of rank {rank} would hold "
            f"{rank * hidden_size:,} numbers, more than the model and than {SMALLEST_LIMIT:,}; give a rank such as 8"
        )


def point_at_fused_experts(model: nn.Module, config: TalanConfig) -> None:
    """Point the LoRA weights at experts that transformers 5 fuses, as PEFT does for the type LORA only."""
    # It asks for all of `peft`, which is still being imported where the entry point registers this package.
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    if not isinstance(model, PreTrainedModel):
        return
    own_type, config.peft_type = config.peft_type, PeftType.LORA
    try:
        # By the model's type alone: PEFT goes through the model for its conversions itself, for every type.
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    finally:
        config.peft_type = own_type
