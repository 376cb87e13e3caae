"""`peft-talan inspect`: what an adapter is, from its files alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..checkpoint.merged_config import MergedTensor, merged_side_paths, merged_tensor, say_what_loads
from .console import AsJson, Misuse, print_json, print_rows
from .sources import check_source

if TYPE_CHECKING:
    from ..checkpoint.adapter_file import TensorHead

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SIDE_PATH_KEY = re.compile(r"\.(\d+)\.talan\.lora_talan_")
LOW_RANK_KEY = re.compile(r"^(.*)\.lora_(?!talan_)")


def inspect(
    adapter: Annotated[str, Argument(help="The adapter's folder or hub id")],
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the hub")] = None,
    as_json: AsJson = False,
) -> None:
    """Show an adapter's axes, the sizes of its LoRA weights and side path, its layers, base model and versions.

    It reads the configuration and the head of the weights file; the base model is not needed. Of a merged model it
    shows the side paths.
    """
    try:
        description = describe(adapter, revision)
    except MergedModel as merged:
        description = describe_merged(adapter, merged.config, revision)
    if as_json:
        print_json(description)
        return
    for title, rows in _tables(description):
        print_rows(title, rows)


def _tables(description: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, object]]]:
    for side_path in description.get("side_paths", ()):
        yield (
            f"Side path {side_path['adapter_name']!r} of the merged model {description['model']}",
            {
                "side path": _size(side_path),
                "  at blocks": ", ".join(side_path["blocks"]),
                **side_path["axes"],
                "peft_talan version": side_path["version"],
            },
        )
    if "adapter" in description:
        low_rank, side_path, base = description["low_rank"], description["side_path"], description["base_model"]
        yield (
            f"TALAN adapter {description['adapter']}",
            {
                "base model": base["name"] and base["name"] + (f" ({base['revision']})" if base["revision"] else ""),
                "task": description["task_type"],
                "side path": _size(side_path),
                "  at blocks": ", ".join(map(str, side_path["blocks"])) or "none",
                "LoRA weights": _size(low_rank),
                "  in modules": low_rank["modules"],
                "other tensors": _size(description["other"]) if description["other"]["parameters"] else None,
                **{f"  {name}": value for name, value in low_rank["options"].items() if value and value != "none"},
                **description["axes"],
                **{f"{name} version": version for name, version in description["versions"].items()},
            },
        )


def _size(part: Mapping[str, Any]) -> str:
    dtypes = ", ".join(part["dtypes"]) or "no tensor"
    return f"{part['parameters']:,} parameters, {part['bytes'] / 2**20:.2f} MiB, {dtypes}"


class MissingFile(Misuse):
    """A folder or repository that exists, but lacks a file."""


class MergedModel(Misuse):
    """A merged model where an adapter is expected; it keeps the model's configuration."""

    def __init__(self, message: str, config: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.config = config


def find_file(adapter: str, name: str, revision: str | None = None) -> Path:
    """Return the path of an adapter's file, in its folder or fetched from the hub."""
    folder = Path(adapter)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise MissingFile(f"{adapter}: the folder has no {name}; give the folder that save_pretrained wrote")
        return folder / name
    check_source("ADAPTER", adapter, "adapter")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(adapter, name, revision=revision))
    except OSError as error:
        kind = MissingFile if isinstance(error, EntryNotFoundError) else Misuse
        raise kind(f"{adapter}: the hub gave no {name}: {error}") from error


def read_json(file: Path) -> Any:
    """Return what a JSON file holds."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Misuse(f"{file}: not JSON: {error}") from error


def read_config(adapter: str, revision: str | None = None, kind: str | None = "TALAN") -> dict[str, Any]:
    """Return the configuration of an adapter of a type (None: of any), by its folder or hub id."""
    try:
        config = read_json(find_file(adapter, CONFIG_FILE, revision))
    except MissingFile as no_adapter:
        try:
            config = read_json(find_file(adapter, "config.json", revision))
        except MissingFile:
            raise no_adapter from None
        if not merged_side_paths(config):
            raise no_adapter from None
        raise MergedModel(say_what_loads("ADAPTER", adapter, config, {"revision": revision}), config) from None
    peft_type = config.get("peft_type") if isinstance(config, dict) else None
    if peft_type is None or kind not in (None, peft_type):
        raise Misuse(f"{adapter}: peft_type={peft_type!r} in {CONFIG_FILE}; this is not a {kind or 'PEFT'} adapter")
    return dict(config)


def describe(adapter: str, revision: str | None = None) -> dict[str, Any]:
    """Return what the files of a TALAN adapter say, as JSON can hold it: axes, both parts, base model and versions."""
    from safetensors import SafetensorError

    from ..checkpoint.adapter_file import LOW_RANK_FIELDS, read_heads

    config = read_config(adapter, revision)
    file = find_file(adapter, WEIGHTS_FILE, revision)
    try:
        tensors = read_heads(file)
    except SafetensorError as error:
        raise Misuse(f"{file}: no safetensors file: {error}") from error
    places = {name: SIDE_PATH_KEY.search(name) for name in tensors}
    modules = {name: LOW_RANK_KEY.match(name) for name in tensors}

    def summary(names: list[str]) -> dict[str, Any]:
        return _summary([tensors[name] for name in names])

    return {
        "adapter": adapter,
        "task_type": config.get("task_type"),
        "base_model": {"name": config.get("base_model_name_or_path"), "revision": config.get("revision")},
        "axes": {name: config[name] for name in sorted(config) if name.startswith("talan_") and "version" not in name},
        "side_path": {
            **summary([name for name, place in places.items() if place]),
            "blocks": sorted({int(place[1]) for place in places.values() if place}),
        },
        "low_rank": {
            **summary([name for name, module in modules.items() if module]),
            "modules": len({module[1] for module in modules.values() if module}),
            "options": {name: config.get(name) for name in LOW_RANK_FIELDS},
        },
        "other": summary([name for name in tensors if not places[name] and not modules[name]]),
        "versions": {"peft": config.get("peft_version"), "peft_talan": config.get("talan_version")},
    }


def _summary(heads: Sequence[TensorHead]) -> dict[str, Any]:
    return {
        "tensors": len(heads),
        "parameters": sum(head.numel for head in heads),
        "bytes": sum(head.nbytes for head in heads),
        "dtypes": sorted({head.dtype for head in heads}),
    }


def describe_merged(model: str, config: Mapping[str, Any], revision: str | None = None) -> dict[str, Any]:
    """Return what a merged model's configuration and files say of its side paths, as JSON can hold it."""
    from ..checkpoint.adapter_file import read_heads

    side_paths = merged_side_paths(config)
    try:
        index = read_json(find_file(model, "model.safetensors.index.json", revision))
        files = {file for name, file in index["weight_map"].items() if merged_tensor(name)}
    except MissingFile:
        files = {"model.safetensors"}
    heads: list[tuple[MergedTensor, TensorHead]] = []
    for file in files:
        named = read_heads(find_file(model, file, revision)).items()
        heads += [(tensor, head) for name, head in named if (tensor := merged_tensor(name))]
    return {
        "model": model,
        "side_paths": [
            {
                "adapter_name": side_path.adapter_name,
                "stage": side_path.stage,
                "blocks": list(side_path.blocks),
                "axes": dict(side_path.axes),
                **_summary([head for tensor, head in heads if tensor.number == side_path.number]),
                "version": side_path.talan_version,
            }
            for side_path in side_paths
        ],
    }
