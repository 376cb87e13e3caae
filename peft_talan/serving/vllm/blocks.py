"""vLLM's decoder blocks: where they are, where their calls carry the residual stream, and what attends in them."""

from __future__ import annotations

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
"""What a side path needs to know of a batch, by the names that most attention backends use."""

IN_TWO_PARTS = """
AfmoeDecoderLayer ApertusDecoderLayer BailingMoeBlock DeciLMDecoderLayer Ernie4_5_MoeDecoderLayer ExaoneDecoderLayer
ExaoneMoeDecoderLayer Gemma2DecoderLayer Gemma3DecoderLayer GemmaDecoderLayer Glm4DecoderLayer Glm4MoeDecoderLayer
HYV3DecoderLayer InternLMDecoderLayer LagunaDecoderLayer Llama4DecoderLayer LlamaDecoderLayer MiMoV2FlashDecoderLayer
MiniMaxM2DecoderLayer MistralDecoderLayer MixtralDecoderLayer Molmo2DecoderLayer MolmoDecoderLayer NemotronDecoderLayer
OlmoeDecoderLayer Qwen2DecoderLayer Qwen2MoeDecoderLayer Qwen3DecoderLayer Qwen3MoeDecoderLayer Rnj1DecoderLayer
SolarDecoderLayer Step3TextDecoderLayer StepDecoderLayer TransformerBlock
"""
"""The blocks of vLLM 0.32 whose stream is `hidden_states + residual`: what a fused norm adds is left to the next."""

IN_ONE_PART = """
Cohere2MoeDecoderLayer CohereDecoderLayer Exaone4DecoderLayer Gemma4DecoderLayer HyperCLOVAXDecoderLayer
MiniCPMDecoderLayer Molmo2DecoderNormAfterLayer MolmoDecoderNormAfterLayer PhiMoEDecoderLayer
"""
"""Those with an argument `residual` that they do not read: `hidden_states` is the stream."""


def find_blocks(model: nn.Module, depth: int, wanted: str | None) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder blocks.

    Args:
        model: vLLM's model.
        depth: The number of blocks.
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
            f"attention backend {backend.get_name()} does not have {', '.join(missing)}, which a side path needs; "
            "start vLLM with another one, such as --attention-backend FLASH_ATTN or TRITON_ATTN"
        )
    return layer


@dataclass(frozen=True)
class StreamPlace:
    """Where the call of a block carries the residual stream h.

    Args:
        arguments: The names of the block's arguments, in their order.
        in_two_parts: Whether h is `hidden_states + residual`, in what the block takes and in what it returns.
    """

    arguments: tuple[str, ...]
    in_two_parts: bool

    @classmethod
    def of(cls, name: str, block: nn.Module) -> StreamPlace:
        """Look the block's class up.

        Args:
            name: The block's name.
            block: The block.

        Returns:
            The place.

        Raises:
            ValueError: The block has no argument `hidden_states`, or it has `residual` and is not known.
        """
        owner = next(kind for kind in type(block).__mro__ if "forward" in vars(kind))
        arguments = tuple(inspect.signature(vars(owner)["forward"]).parameters)[1:]
        vllm_name = owner.__name__ if owner.__module__.startswith("vllm.") else None
        in_two_parts = "residual" in arguments and vllm_name in IN_TWO_PARTS.split()
        if "hidden_states" not in arguments:
            raise ValueError(
                f"block {name}: {owner.__name__}.forward has no argument 'hidden_states' that would be the "
                "residual stream; serve the model with transformers"
            )
        if "residual" in arguments and not in_two_parts and vllm_name not in IN_ONE_PART.split():
            raise ValueError(
                f"block {name}: it is not known whether {owner.__name__}.forward adds its argument 'residual' to the "
                "residual stream; serve the model with transformers"
            )
        return cls(arguments, in_two_parts)

    def change_input(
        self, change: Callable[[torch.Tensor], torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Change the stream in a block's arguments, which are then all given by name."""
        named = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        residual = named.get("residual") if self.in_two_parts else None
        named["hidden_states"], left = _change(change, named["hidden_states"], residual)
        if residual is not None:
            named["residual"] = left
        return (), named

    def change_output(self, change: Callable[[torch.Tensor], torch.Tensor], output: Any) -> Any:
        """Change the stream in what a block returns."""
        if not isinstance(output, tuple):
            return change(output)
        residual = output[1] if self.in_two_parts else None
        written, left = _change(change, output[0], residual)
        return (written, *output[1:]) if residual is None else (written, left, *output[2:])


def _change(
    change: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if residual is None:
        return change(hidden_states), None
    # All of h' in one part: adding a perturbation to one part would round twice what transformers rounds once.
    return change(hidden_states + residual), torch.zeros_like(residual)
