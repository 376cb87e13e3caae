"""vLLM's decoder blocks: where they are, where their calls carry the residual stream, and what attends in them."""

from __future__ import annotations

import dis
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

METADATA: tuple[str, ...] = ("query_start_loc", "seq_lens", "block_table", "slot_mapping", "max_query_len")
"""What a side path needs to know of a batch, by the names that most of vLLM's attention backends give it."""


def find_blocks(model: nn.Module, depth: int, wanted: str | None) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder blocks; blocks of other pipeline stages have their places in it.

    Args:
        model: vLLM's model.
        depth: The number of blocks of the whole model.
        wanted: The list's name in the model that the adapter was trained on, for models with several such lists.

    Returns:
        The list's name and the list.

    Raises:
        ValueError: No list fits, or several do.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    }
    lists = {name: found for name, found in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if len(lists) > 1 and wanted is not None:
        last = wanted.rpartition(".")[2]
        named = {name: found for name, found in lists.items() if name == wanted}
        lists = named or {name: found for name, found in lists.items() if name.rpartition(".")[2] == last}
    if len(lists) != 1:
        raise ValueError(
            f"{'no' if not lists else 'more than one'} list of {depth} decoder blocks was found in vLLM's "
            f"{type(model).__name__} {sorted(lists) or ''}; serve the model with transformers"
        )
    return next(iter(lists.items()))


def find_attention(name: str, block: nn.Module) -> Any:
    """Find the attention layer whose pages the memory of a side path at this block follows.

    Args:
        name: The block's name.
        block: The block.

    Returns:
        The layer.

    Raises:
        ValueError: The block has none, or its attention backend does not say what a side path needs.
    """
    layers = [module for module in block.modules() if isinstance(module, Attention)]
    layer = next((layer for layer in layers if layer.attn_type == AttentionType.DECODER), None)
    if layer is None:
        raise ValueError(
            f"block {name} has no attention layer with a cache of keys and values in pages, which the latent memory "
            "follows; serve the model with transformers"
        )
    backend = layer.get_attn_backend()
    metadata = typing.get_type_hints(backend.get_builder_cls().build).get("return")
    known = {field.name for field in fields(metadata)} if is_dataclass(metadata) else set()
    missing = [field for field in METADATA if field not in known]
    if missing:
        raise ValueError(
            f"attention backend {backend.get_name()} does not give {', '.join(missing)}, which a side path needs; "
            "start vLLM with another one, such as --attention-backend FLASH_ATTN or TRITON_ATTN"
        )
    return layer


@dataclass(frozen=True)
class StreamPlace:
    """Where the call of a block carries the residual stream h.

    vLLM's blocks take and give h whole, or in two parts (hidden_states, residual) whose sum it is; what a fused norm
    would add is then left to the next block. Some give a residual that is only left over: the stream is whole there.

    Args:
        hidden_states: The place of the argument `hidden_states`.
        residual: The place of the argument `residual` where the block adds it; None: the stream is whole.
    """

    hidden_states: int
    residual: int | None

    @classmethod
    def of(cls, name: str, block: nn.Module) -> StreamPlace:
        """Look at a block.

        Args:
            name: The block's name.
            block: The block.

        Returns:
            The places.

        Raises:
            ValueError: The block has no argument `hidden_states`.
        """
        forward = inspect.unwrap(type(block).forward)
        arguments = list(inspect.signature(forward).parameters)[1:]
        if "hidden_states" not in arguments:
            raise ValueError(
                f"block {name}: {type(block).__name__}.forward has no argument 'hidden_states' that would be the "
                "residual stream; serve the model with transformers"
            )
        in_two_parts = "residual" in arguments and _reads_first(forward, "residual")
        return cls(arguments.index("hidden_states"), arguments.index("residual") if in_two_parts else None)

    def change_input(
        self, change: Callable[[torch.Tensor], torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Change the stream that a block is called with.

        Args:
            change: What to do with h.
            args: The block's arguments by place.
            kwargs: Those by name.

        Returns:
            The arguments to call it with.
        """
        hidden_states = _argument(args, kwargs, self.hidden_states, "hidden_states")
        residual = None if self.residual is None else _argument(args, kwargs, self.residual, "residual")
        written, left = _change(change, hidden_states, residual)
        args, kwargs = _with_argument(args, kwargs, self.hidden_states, "hidden_states", written)
        if residual is None or self.residual is None:
            return args, kwargs
        return _with_argument(args, kwargs, self.residual, "residual", left)

    def change_output(self, change: Callable[[torch.Tensor], torch.Tensor], output: Any) -> Any:
        """Change the stream that a block gives.

        Args:
            change: What to do with h.
            output: What the block gives.

        Returns:
            What it gives instead.
        """
        if not isinstance(output, tuple):
            return change(output)
        residual = output[1] if self.residual is not None else None
        written, left = _change(change, output[0], residual)
        return (written, *output[1:]) if residual is None else (written, left, *output[2:])


def _change(
    change: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if residual is None:
        return change(hidden_states), None
    # All of h' in one part: adding a perturbation to one part would round twice what transformers rounds once.
    return change(hidden_states + residual), torch.zeros_like(residual)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if place < len(args) else kwargs.get(name)


def _with_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}


def _reads_first(function: Callable[..., Any], name: str) -> bool:
    """Whether a function reads an argument before it assigns to it."""
    for instruction in dis.get_instructions(function):
        # An instruction of two steps (Python 3.13) names two variables, such as STORE_FAST_LOAD_FAST.
        names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
        steps = [step for step in instruction.opname.split("_") if step in ("LOAD", "STORE")]
        for step, variable in zip(steps, names, strict=False):
            if variable == name:
                return step == "LOAD"
    return False
