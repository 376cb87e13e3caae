"""Reads adapters for vLLM: the side path beside the LoRA weights, and never two contents under one number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper

from ...checkpoint.checks import check_finite
from ...checkpoint.names import CHILD_NAME, is_side_path_key
from .adapter_kinds import REMEDY, AdapterFiles, read_adapter
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
        slots: vLLM's manager of loaded adapters.
    """

    def __init__(self, layers: Mapping[str, AdapterSidePaths], depth: int, hidden_size: int, slots: Any) -> None:
        self.layers = {(layer.kind, layer.block_index): (name, layer) for name, layer in layers.items()}
        self.depth, self.hidden_size, self.slots = depth, hidden_size, slots
        self.contents: dict[int, bytes] = {}
        self._known: WeakValueDictionary[int, LoRAModel] = WeakValueDictionary()
        self._needed: dict[int, LoRAModel] = {}
        self._needed_numbers: frozenset[int] = frozenset()
        self._recent: dict[int, LoRAModel] = {}
        self._asked_for: bytes | None = None

    def from_local_checkpoint(
        self,
        lora_dir: str,
        expected_lora_modules: set[str],
        peft_helper: PEFTHelper,
        *,
        lora_model_id: int,
        skip_prefixes: list[str] | None = None,
        **options: Any,
    ) -> LoRAModel:
        """Read an adapter; see `LoRAModel.from_local_checkpoint`."""
        content = self._asked_for or content_of(lora_dir)
        known = self._known.get(lora_model_id)
        self._keep_until_the_next_step()
        if known is not None and self._is_other(lora_model_id, content):
            return known
        self._check_content(lora_dir, lora_model_id, content)
        files = self._look_at(lora_dir)
        if files is not None:
            skip_prefixes = [*(skip_prefixes or ()), SIDE_PATH_PREFIX]
        lora = _WholeFile.from_local_checkpoint(
            lora_dir,
            expected_lora_modules,
            peft_helper,
            lora_model_id=lora_model_id,
            skip_prefixes=skip_prefixes,
            **options,
        )
        _leave_the_file(lora)
        tensors = lora.take_tensors()
        if files is not None:
            check_finite(lora_dir, tensors)
        side_path = {name: tensor.clone() for name, tensor in tensors.items() if is_side_path_key(name)}
        self._check_unchanged(lora_dir, content, peft_helper)
        if files is not None:
            lora.loras.update(self._side_path(files, side_path))
        self.contents[lora_model_id] = content
        self._known[lora_model_id] = lora
        if lora_model_id in self._needed_numbers:
            self._needed[lora_model_id] = lora
        return lora

    @contextmanager
    def asked_for(self, folder: str, number: int) -> Iterator[None]:
        """Let vLLM load an adapter that a call names, be it that it has it already; its content is found once.

        Args:
            folder: The adapter's folder.
            number: Its number.

        Raises:
            ValueError: By this number, another content was read: pages of the first one may be in the cache.
        """
        content = content_of(folder)
        self._check_content(folder, number, content)
        self._asked_for = content
        try:
            yield
        finally:
            self._asked_for = None

    def _check_unchanged(self, folder: str, content: bytes, peft_helper: PEFTHelper) -> None:
        """Refuse a folder that was written while it was read: its files are read one by one, and several times."""
        # vLLM reads the configuration before it calls the reader, so the content does not tell of a change until then.
        again = PEFTHelper.from_local_dir(folder, peft_helper.vllm_max_position_embeddings)
        if content_of(folder) != content or again != peft_helper:
            raise ValueError(
                f"adapter {folder!r} changed while it was read; load it again once it is saved, and save each version "
                "to a folder of its own"
            )

    def _check_content(self, folder: str, number: int, content: bytes) -> None:
        """Refuse another content under a number."""
        if self._is_other(number, content):
            raise ValueError(
                f"lora_int_id={number}: {folder!r} holds other tensors than when this number was first read, and "
                "what is cached may be theirs; load it by a new number or name, or with load_inplace=True"
            )

    def _is_other(self, number: int, content: bytes) -> bool:
        return (number >= FIRST_VERSION and number != number_of(content)) or (
            self.contents.get(number, content) != content
        )

    def keep(self, numbers: Iterable[int]) -> None:
        """Keep the adapters that the scheduler names, be it that vLLM drops them, and no others.

        Their folders may have changed since. A step begins with this; it may read some of them first.

        Args:
            numbers: The adapters' numbers.
        """
        self._needed_numbers = frozenset(numbers)
        self._needed = {number: self._known[number] for number in self._needed_numbers if number in self._known}
        self._recent.clear()

    def _keep_until_the_next_step(self) -> None:
        """Keep what vLLM may drop for the adapter that is read now: a request may have come since the last step."""
        loaded = [number for number in self.slots.list_adapters() if number in self._known]
        self._recent.update({number: self._known[number] for number in loaded if number not in self._recent})
        dropped = [number for number in self._recent if number not in loaded]
        # Together with the one that vLLM drops now there are as many as it holds.
        for number in dropped[: max(len(dropped) + 1 - self.slots.capacity, 0)]:
            del self._recent[number]

    def _look_at(self, folder: str) -> AdapterFiles | None:
        """What an adapter's files say of its side path, which fits in; None where it has none."""
        files = read_adapter(folder, self.depth, self.hidden_size)
        missing = [] if files is None else [index for index in files.blocks if (files.kind, index) not in self.layers]
        if files is not None and missing:
            raise ValueError(
                f"adapter {folder!r} has a side path at block {missing[0]} ({files.kind}), for which this engine has "
                f"no room; {REMEDY}"
            )
        return files

    def _side_path(self, files: AdapterFiles, tensors: Mapping[str, torch.Tensor]) -> dict[str, LoRALayerWeights]:
        """The side path's tensors by layer, in LoRA weights' form: `AdapterSidePaths.set_lora` takes them apart."""
        numbers = torch.tensor([float(files.config.talan_alpha), float(files.config.talan_cap)])
        found = {}
        for index in files.blocks:
            name, layer = self.layers[files.kind, index]
            ends = [f".{index}.{SIDE_PATH_PREFIX}{parameter}.values" for parameter in layer.shapes]
            parts = [next(tensor for key, tensor in tensors.items() if key.endswith(end)) for end in ends]
            flat = torch.cat([part.flatten().float() for part in parts])
            found[name] = LoRALayerWeights(name, 1, 1, flat, numbers.clone())
        return found


class _WholeFile(LoRAModel):
    """vLLM's adapter that also hands on the tensors which vLLM reads and skips."""

    @classmethod
    def from_lora_tensors(cls, lora_model_id: int, tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        lora = super().from_lora_tensors(lora_model_id, tensors, *args, **kwargs)
        lora.tensors = tensors
        return lora

    def take_tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the file, in which they may still lie; they are let go."""
        tensors: dict[str, torch.Tensor] = self.__dict__.pop("tensors")
        return tensors


def _leave_the_file(lora: LoRAModel) -> None:
    """Copy an adapter's tensors: vLLM maps the file, and who writes into it would change an adapter that is loaded."""
    for weights in (*lora.loras.values(), *lora.modules_to_save.values()):
        for name, value in vars(weights).items():
            # What vLLM has cast is copied twice: a tensor doesn't tell whether it is mapped. What is pinned never is.
            if isinstance(value, torch.Tensor) and not value.is_pinned():
                setattr(weights, name, value.clone())
