"""`peft-talan inspect`: what an adapter is, from its files alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from .console import JSON_HELP, Misuse, print_json, print_rows
from .sources import check_source

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SIDE_PATH_KEY = re.compile(r"\.(\d+)\.talan\.lora_talan_")
LOW_RANK_KEY = re.compile(r"^(.*)\.lora_(?!talan_)")
LOW_RANK_FIELDS = ("r", "lora_alpha", "use_dora", "use_rslora", "target_modules", "bias", "modules_to_save")


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: The command line.
    """
    app.command(
        "inspect",
        epilog="Examples: peft-talan inspect outputs/demo/LoRA+TALAN  |  "
        "peft-talan inspect user/adapter --json | jq .axes.talan_layers",
    )(inspect)


def inspect(
    adapter: Annotated[str, Argument(help="The adapter's folder or hub id")],
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the hub")] = None,
    as_json: Annotated[bool, Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Show an adapter's axes, the sizes of both halves, its layers, base model and versions.

    It reads the configuration and the head of the weights file; the base model is not needed.
    """
    found = describe(adapter, revision)
    if as_json:
        print_json(found)
        return
    low_rank, side_path, base = found["low_rank"], found["side_path"], found["base_model"]
    rows: dict[str, object] = {
        "base model": base["name"] and base["name"] + (f" ({base['revision']})" if base["revision"] else ""),
        "task": found["task_type"],
        "side path": _size(side_path),
        "  at blocks": ", ".join(map(str, side_path["blocks"])) or "none",
        "low-rank half": _size(low_rank),
        "  in modules": low_rank["modules"],
        "other tensors": _size(found["other"]) if found["other"]["parameters"] else None,
        **{f"  {name}": value for name, value in low_rank["options"].items() if value not in (None, False, "none")},
        **found["axes"],
        **{f"{name} version": version for name, version in found["versions"].items()},
    }
    print_rows(f"TALAN adapter {adapter}", rows)


def _size(half: Mapping[str, Any]) -> str:
    dtypes = ", ".join(half["dtypes"]) or "no tensor"
    return f"{half['parameters']:,} parameters, {half['bytes'] / 2**20:.2f} MiB, {dtypes}"


def find_file(adapter: str, name: str, revision: str | None) -> Path:
    """Find a file of an adapter, in its folder or on the hub.

    Args:
        adapter: The adapter's folder or hub id.
        name: The file's name.
        revision: Branch, tag or commit on the hub.

    Returns:
        The file.

    Raises:
        Misuse: There is no such file.
    """
    folder = Path(adapter)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise Misuse(f"{adapter}: the folder has no {name}; give the folder that save_pretrained wrote")
        return folder / name
    check_source("ADAPTER", adapter, "adapter")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(adapter, name, revision=revision))
    except OSError as error:
        raise Misuse(f"{adapter}: the hub gave no {name}: {error}") from error


def read_config(adapter: str, revision: str | None = None, kind: str | None = "TALAN") -> dict[str, Any]:
    """Read an adapter's configuration file.

    Args:
        adapter: The adapter's folder or hub id.
        revision: Branch, tag or commit on the hub. Default None.
        kind: The type that the adapter must have. None: any. Default `"TALAN"`.

    Returns:
        The configuration.

    Raises:
        Misuse: It is not the file of an adapter of this type.
    """
    file = find_file(adapter, CONFIG_FILE, revision)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Misuse(f"{file}: not JSON: {error}") from error
    found = config.get("peft_type") if isinstance(config, dict) else None
    if found is None or kind not in (None, found):
        raise Misuse(f"{adapter}: peft_type={found!r} in {CONFIG_FILE}; this is not a {kind or 'PEFT'} adapter")
    return dict(config)


def describe(adapter: str, revision: str | None = None) -> dict[str, Any]:
    """Gather what an adapter's files say.

    Args:
        adapter: The adapter's folder or hub id.
        revision: Branch, tag or commit on the hub.

    Returns:
        Axes, both halves, layers, base model and versions, as JSON can hold them.

    Raises:
        Misuse: It is not a TALAN adapter, or its files can't be read.
    """
    from safetensors import SafetensorError, safe_open

    config = read_config(adapter, revision)
    file = find_file(adapter, WEIGHTS_FILE, revision)
    tensors: dict[str, tuple[list[int], str]] = {}
    try:
        with safe_open(file, framework="numpy") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is not a dict
                head = opened.get_slice(key)
                tensors[key] = (head.get_shape(), head.get_dtype())
    except SafetensorError as error:
        raise Misuse(f"{file}: no safetensors file: {error}") from error
    side_path = {key: head for key, head in tensors.items() if SIDE_PATH_KEY.search(key)}
    low_rank = {key: head for key, head in tensors.items() if key not in side_path and LOW_RANK_KEY.match(key)}
    other = {key: head for key, head in tensors.items() if key not in side_path and key not in low_rank}
    blocks = {int(match[1]) for match in map(SIDE_PATH_KEY.search, side_path) if match}
    modules = {match[1] for match in map(LOW_RANK_KEY.match, low_rank) if match}
    return {
        "adapter": adapter,
        "task_type": config.get("task_type"),
        "base_model": {"name": config.get("base_model_name_or_path"), "revision": config.get("revision")},
        "axes": {name: config[name] for name in sorted(config) if name.startswith("talan_") and "version" not in name},
        "side_path": {**_sum(side_path), "blocks": sorted(blocks)},
        "low_rank": {
            **_sum(low_rank),
            "modules": len(modules),
            "options": {name: config.get(name) for name in LOW_RANK_FIELDS},
        },
        "other": _sum(other),
        "versions": {"peft": config.get("peft_version"), "peft_talan": config.get("talan_version")},
    }


def _sum(tensors: Mapping[str, tuple[list[int], str]]) -> dict[str, Any]:
    counts = {key: math.prod(shape) for key, (shape, _) in tensors.items()}
    width = {key: int(re.sub(r"\D", "", dtype.partition("_")[0]) or 8) for key, (_, dtype) in tensors.items()}
    return {
        "tensors": len(tensors),
        "parameters": sum(counts.values()),
        "bytes": sum(count * width[key] // 8 for key, count in counts.items()),
        "dtypes": sorted({dtype for _, dtype in tensors.values()}),
    }
