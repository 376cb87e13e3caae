"""The private names of other libraries: all are listed, and the installed versions have them."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import peft_talan
from peft_talan.private_names import ATTRIBUTES, FUNCTIONS, METHODS, UNDOCUMENTED

ROOT = Path(peft_talan.__file__).parent
ELSEWHERE = {"cli", "serving", "private_names.py"}
"""The command line, and what belongs to vLLM and continuous batching."""


def resolve(name: str) -> object:
    """Import the longest module in a name, and take the rest from it."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS, *UNDOCUMENTED])
def test_name_exists(name: str) -> None:
    resolve(name)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute_is_set_where_it_is_said_to_be(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    file = Path(inspect.getfile(importlib.import_module(module)))
    files = [file] if file.name != "__init__.py" else file.parent.rglob("*.py")
    assert any(attribute in one.read_text(encoding="utf-8") for one in files if "models" not in one.parts)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_private_name_is_used_without_being_listed() -> None:
    listed = {name.rpartition(".")[2] for name in [*FUNCTIONS, *METHODS, *ATTRIBUTES]}
    own, used = {"_asdict", "_make", "_replace"}, {}  # methods of every named tuple, and documented
    for file in sorted(ROOT.rglob("*.py")):
        if file.relative_to(ROOT).parts[0] in ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert not any(is_private(alias.name) for alias in node.names), f"{file}: {ast.unparse(node)}"
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                    own.add(node.attr)
                else:
                    used[node.attr] = file
            elif isinstance(node, (ast.AnnAssign, ast.Assign)):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                own.update(target.id for target in targets if isinstance(target, ast.Name))
    assert not {name: str(file) for name, file in used.items() if name not in listed | own}
