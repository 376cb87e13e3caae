"""The environment of every engine."""

from __future__ import annotations

import os

import pytest

from . import engines
from .adapters import ADAPTERS, Family


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ.update(engines.ENVIRONMENT, VLLM_CACHE_ROOT=str(tmp_path_factory.mktemp("vllm")))


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("family"), "qwen3", ADAPTERS)
