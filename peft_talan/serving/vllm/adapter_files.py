"""Reads adapters for vLLM: the side path beside the LoRA weights, and never two contents under one number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.utils import load_peft_weights
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights

from ...checkpoint.checks import check_finite
from ...checkpoint.names import CHILD_NAME
from .adapter_kinds import REMEDY, read_adapter
from .adapter_layer import AdapterSidePaths
from .adapter_versions import FIRST_VERSION, content_of, number_of

SIDE_PATH_PREFIX = f"{CHILD_NAME}.lora_talan_"
"""How the names of a side path's tensors go on after that of their block."""


class AdapterReader:
    """Reads an adapter's files in the place of the class `LoRAModel`, which reads the LoRA weights of all of them.

    Args:
        layers: The layers that take side paths, by their names in vLLM's model.
        depth: The number of the model's blocks.
        hidden_size: H, the width of the residual stream.
        slots: vLLM's manager of loaded adapters. Twice as many as it holds are kept after it has dropped them: their
            folders may have changed while requests need them.
    """

    def __init__(self, layers: Mapping[str, AdapterSidePaths], depth: int, hidden_size: int, slots: Any) -> None:
        self.layers = {(layer.kind, layer.block_index): (name, layer) for name, layer in layers.items()}
        self.depth, self.hidden_size, self.slots = depth, hidden_size, slots
        self.contents: dict[int, bytes] = {}
        self._recent: dict[int, LoRAModel] = {}

    def from_local_checkpoint(
        self,
        lora_dir: str,
        expected_lora_modules: set[str],
        peft_helper: Any,
        *,
        lora_model_id: int,
        skip_prefixes: list[str] | None = None,
        **options: Any,
    ) -> LoRAModel:
        """Read an adapter; see `LoRAModel.from_local_checkpoint`."""
        content = content_of(lora_dir)
        if self._is_other(lora_model_id, content) and lora_model_id in self._recent:
            return self._recent[lora_model_id]
        self.check_content(lora_dir, lora_model_id, content)
        side_path = self._read_side_path(lora_dir)
        if side_path:
            skip_prefixes = [*(skip_prefixes or ()), SIDE_PATH_PREFIX]
        lora = LoRAModel.from_local_checkpoint(
            lora_dir,
            expected_lora_modules,
            peft_helper,
            lora_model_id=lora_model_id,
            skip_prefixes=skip_prefixes,
            **options,
        )
        lora.loras.update(side_path)
        self.contents[lora_model_id] = content
        self.forget(lora_model_id)
        self._recent[lora_model_id] = lora
        loaded = self.slots.list_adapters()
        for number in [number for number in self._recent if number not in loaded][: -2 * self.slots.capacity]:
            self.forget(number)
        return lora

    def _is_other(self, number: int, content: bytes) -> bool:
        return (number >= FIRST_VERSION and number != number_of(content)) or (
            self.contents.get(number, content) != content
        )

    def forget(self, number: int) -> None:
        """Keep an adapter no longer: it was removed, or is loaded again."""
        self._recent.pop(number, None)

    def check_content(self, folder: str, number: int, content: bytes) -> None:
        """Refuse another content under a number: pages of the first one may be in the cache.

        Args:
            folder: The adapter's folder.
            number: Its number.
            content: As `content_of` returns it for the folder.

        Raises:
            ValueError: By this number, another content was loaded.
        """
        if self._is_other(number, content):
            raise ValueError(
                f"lora_int_id={number}: {folder!r} holds other tensors than it did when requests named this number, "
                "and what is cached is theirs; load it by a new number or name, or with load_inplace=True"
            )

    def _read_side_path(self, folder: str) -> dict[str, LoRALayerWeights]:
        """The side path's tensors by layer, in LoRA weights' form: `AdapterSidePaths.set_lora` takes them apart."""
        files = read_adapter(folder, self.depth, self.hidden_size)
        if files is None:
            return {}
        missing = [index for index in files.blocks if (files.kind, index) not in self.layers]
        if missing:
            raise ValueError(
                f"adapter {folder!r} has a side path at block {missing[0]} ({files.kind}), for which this engine has "
                f"no room; {REMEDY}"
            )
        tensors = load_peft_weights(folder, device="cpu")
        check_finite(folder, tensors)
        numbers = torch.tensor([float(files.config.talan_alpha), float(files.config.talan_cap)])
        found = {}
        for index in files.blocks:
            name, layer = self.layers[files.kind, index]
            ends = [f".{index}.{SIDE_PATH_PREFIX}{parameter}.values" for parameter in layer.shapes]
            parts = [next(tensor for key, tensor in tensors.items() if key.endswith(end)) for end in ends]
            flat = torch.cat([part.flatten().float() for part in parts])
            found[name] = LoRALayerWeights(name, 1, 1, flat, numbers.clone())
        return found
