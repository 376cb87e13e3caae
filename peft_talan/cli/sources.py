"""Finds out at once whether a name is a file, a folder or something on the hub, before anything heavy is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from .console import Misuse

SECONDS = 10.0
"""How long the hub may take to answer."""

SENTINELS = {"model": "config.json", "adapter": "adapter_config.json", "dataset": ""}


def _looks_like_a_path(name: str) -> bool:
    """Whether a name can't be a hub id, or its first part is a folder here."""
    path = Path(name)
    parts = name.split("/")
    return (
        path.is_absolute()
        or name.startswith((".", "~"))
        or "\\" in name
        or not 1 <= len(parts) <= 2
        or not all(parts)
        or (len(parts) == 2 and Path(parts[0]).is_dir())
        or path.suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
    )


def _is_cached(name: str, kind: str) -> bool:
    from huggingface_hub import constants, try_to_load_from_cache

    if kind != "dataset":
        return isinstance(try_to_load_from_cache(name, SENTINELS[kind]), str)
    home = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
    return (home / name.replace("/", "___").lower()).is_dir() or (home / name.replace("/", "___")).is_dir()


def check_source(option: str, name: str, kind: Literal["model", "adapter", "dataset"]) -> None:
    """Refuse a name of `kind`, given for `option`, that is no file or folder and nothing on the hub."""
    if Path(name).exists():
        if kind == "model" and Path(name).is_dir() and not Path(name, SENTINELS[kind]).exists():
            adapter = Path(name, SENTINELS["adapter"]).exists()
            remedy = "it is an adapter's: give its base model" if adapter else "give a model's folder"
            raise Misuse(f"{option} {name}: the folder has no {SENTINELS[kind]}; {remedy}")
        return
    missing = f"{option} {name}: no such file or folder"
    if _looks_like_a_path(name):
        raise Misuse(missing)
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        if not _is_cached(name, kind):
            HfApi().repo_info(name, repo_type="dataset" if kind == "dataset" else "model", timeout=SECONDS)
    except HFValidationError:
        raise Misuse(missing) from None
    except OfflineModeIsEnabled:
        raise Misuse(f"{missing}, and nothing of that name in the hub's cache (HF_HUB_OFFLINE is set)") from None
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            raise Misuse(f"{missing}, and no {kind} of that name that you may read on {constants.ENDPOINT}") from None
    except (httpx.HTTPError, OSError) as error:
        raise Misuse(f"{missing}, and the hub can't be reached ({constants.ENDPOINT}: {error})") from None
