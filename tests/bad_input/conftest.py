from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ..small_models import make_model
from .entrances import CONFIG_ENTRANCES, FOLDER_ENTRANCES, Entrance


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def config_entrances() -> dict[str, Entrance]:
    return {name: Entrance(*entrance) for name, entrance in CONFIG_ENTRANCES.items()}


@pytest.fixture(scope="module")
def folder_entrances() -> dict[str, Entrance]:
    return {name: Entrance(*entrance) for name, entrance in FOLDER_ENTRANCES.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_model("qwen3", dtype=torch.float32).save_pretrained(folder)
    return folder
