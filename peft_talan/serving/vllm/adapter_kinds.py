"""TALAN adapters by request: what their files say, and the room that an engine makes for them as it starts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from peft.utils import CONFIG_NAME
from vllm.lora.utils import get_adapter_absolute_path

from ...axes import Mixer, Position, Writeback, check_causal
from ...checkpoint.checks import check_side_path, read_header
from ...config import CheckpointLocation, TalanConfig
from ...tuner.blocks import resolve_layers

ROOM = "peft_talan_adapters"
"""The key in `additional_config` under which an engine's processes find the room; it is set by this package."""

REMEDY = (
    "name the adapter, or one like it, as the engine starts: --lora-modules NAME=FOLDER, or "
    'additional_config={"talan": {"adapters": [FOLDER]}}'
)
"""How to make room for an adapter."""


class AdapterKind(NamedTuple):
    """What side paths have in common whose tensors can lie in one stack.

    Args:
        position: At which end of their blocks they act.
        mixer: How a token reads the slots.
        writeback: How the residual stream is changed.
        slots: M, the number of memory slots.
        width: d, the latent width.
        soft_cap: The cap of a token's weight in a slot.
    """

    position: Position
    mixer: Mixer
    writeback: Writeback
    slots: int
    width: int
    soft_cap: float


class AdapterFiles(NamedTuple):
    """What an adapter's files say of its side path.

    Args:
        config: The adapter's configuration.
        kind: The kind of its side path.
        blocks: The indices of the blocks that have it.
        tensors: The names of its tensors.
    """

    config: TalanConfig
    kind: AdapterKind
    blocks: tuple[int, ...]
    tensors: tuple[str, ...]

    @property
    def block_list(self) -> str:
        """The name of the list of blocks in the model that the adapter was trained on."""
        return ".".join(self.tensors[0].removeprefix("base_model.model.").split(".")[:-4])


def read_adapter(folder: str, depth: int, hidden_size: int) -> AdapterFiles | None:
    """Read what the files of an adapter say, and refuse what can't be served.

    Args:
        folder: The folder, or the adapter's name on the hub.
        depth: The number of the model's blocks.
        hidden_size: H, the width of the model's residual stream.

    Returns:
        What they say; None for an adapter of another type.

    Raises:
        ValueError: The files are damaged, belong to another model, or the memory is bidirectional.
    """
    path = get_adapter_absolute_path(folder)
    file = Path(path, CONFIG_NAME)
    # What vLLM takes as a LoRA adapter need not be one to PEFT.
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")).get("peft_type") != "TALAN":
        return None
    config = TalanConfig.from_pretrained(path)
    check_causal(config.talan_memory_scope, folder)
    blocks = tuple(resolve_layers(config, depth))
    tensors = read_header(CheckpointLocation(path, {}, {})).side_path
    check_side_path(folder, config, blocks, hidden_size, tensors)
    kind = AdapterKind(
        config.talan_position,
        config.talan_mixer,
        config.talan_writeback,
        config.talan_slots,
        config.talan_dim,
        config.talan_soft_cap,
    )
    return AdapterFiles(config, kind, blocks, tuple(tensors))


class Room(NamedTuple):
    """The side paths of one kind that an engine has room for, `max_loras` of them at each block.

    Args:
        kind: The kind.
        blocks: The indices of the blocks.
        block_list: The name of the list of blocks in the model that the adapters were trained on.
    """

    kind: AdapterKind
    blocks: tuple[int, ...]
    block_list: str


def make_room(folders: Iterable[str], model_config: Any) -> list[Room]:
    """Find the room that some adapters need.

    Args:
        folders: The adapters, those without a side path among them.
        model_config: vLLM's configuration of the base model.

    Returns:
        The room, by kinds.

    Raises:
        ValueError: An adapter can't be served.
    """
    depth, hidden_size = model_config.hf_text_config.num_hidden_layers, model_config.get_hidden_size()
    blocks: dict[AdapterKind, set[int]] = {}
    lists: dict[AdapterKind, str] = {}
    for folder in folders:
        files = read_adapter(folder, depth, hidden_size)
        if files is not None:
            blocks.setdefault(files.kind, set()).update(files.blocks)
            lists.setdefault(files.kind, files.block_list)
    return [Room(kind, tuple(sorted(found)), lists[kind]) for kind, found in sorted(blocks.items())]


def room_of(vllm_config: Any) -> list[Room]:
    """Read the room that an engine was configured with.

    Args:
        vllm_config: vLLM's configuration.

    Returns:
        The room; none where no TALAN adapter was named.
    """
    options = vllm_config.additional_config
    entries = options.get(ROOM, ()) if isinstance(options, dict) else ()
    return [Room(AdapterKind(*kind), tuple(blocks), block_list) for kind, blocks, block_list in entries]
