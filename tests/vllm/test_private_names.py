"""The names of vLLM that the plug-in needs: all are listed, and the installed version has them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import peft_talan.serving.vllm
from peft_talan.private_names import VLLM, VLLM_ATTRIBUTES

from ..test_private_names import resolve

pytest.importorskip("vllm", reason="vLLM is installed in an environment of its own: make test-vllm")


@pytest.mark.parametrize("name", VLLM)
def test_name_exists(name: str) -> None:
    resolve(name)


@pytest.mark.parametrize("name", VLLM_ATTRIBUTES)
def test_attribute_is_set_where_it_is_said_to_be(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert re.search(rf"\.{attribute}(: .+)? = ", inspect.getsource(importlib.import_module(module)))


def test_no_name_of_vllm_is_imported_without_being_listed() -> None:
    found = {
        f"{node.module}.{alias.name}"
        for file in Path(peft_talan.serving.vllm.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "vllm" and not node.level
        for alias in node.names
    }
    assert found
    assert not [name for name in found if not any(f"{listed}.".startswith(f"{name}.") for listed in VLLM)]
