"""The private names of other libraries: all are listed, and the installed versions have them."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest

import peft_talan
from peft_talan.private_names import ATTRIBUTES, FUNCTIONS, METHODS, PLACES, UNDOCUMENTED, VLLM_ATTRIBUTES

from .small_models import make_model

ROOT = Path(peft_talan.__file__).parent


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
    listed = {name.rpartition(".")[2] for name in [*FUNCTIONS, *METHODS, *ATTRIBUTES, *VLLM_ATTRIBUTES]}
    own, used = {"_asdict", "_make", "_replace"}, {}  # methods of every named tuple, and documented
    for file in sorted(ROOT.rglob("*.py")):
        if file.name == "private_names.py":
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


@pytest.mark.parametrize("place", PLACES)
def test_place_exists_and_holds_something_of_ours(place: str) -> None:
    if place.startswith("vllm."):
        pytest.importorskip("vllm", reason="tests/vllm runs in an environment of its own")
    make_model("qwen3")  # Some places are filled as the first model is made.
    found = resolve(place)
    if inspect.isclass(found):
        assert any(is_ours(method) for method in vars(found).values())
    elif isinstance(found, dict):
        assert "talan" in found
    elif not place.startswith("vllm.") and not place.endswith(".perform_cache_copy"):  # set where a model is served
        assert is_ours(found)


def is_ours(value: object) -> bool:
    code = getattr(value, "__code__", None)
    return code is not None and ROOT in Path(code.co_filename).parents


def foreign_names(tree: ast.AST) -> set[str]:
    """The names that a file imports from other libraries."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
            for alias in node.names:
                origin = node.module if isinstance(node, ast.ImportFrom) else alias.name
                if str(origin).partition(".")[0] not in sys.stdlib_module_names:
                    found.add(alias.asname or alias.name.partition(".")[0])
    return found


def test_nothing_else_is_set_on_what_other_libraries_define() -> None:
    """By assignment: what is set on an instance, or by `setattr`, only reading the code can find."""
    listed = {".".join(place.split(".")[-2:]) for place in PLACES}
    found = set()
    for file in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        foreign = foreign_names(tree)
        for node in ast.walk(tree):
            for target in node.targets if isinstance(node, ast.Assign) else ():
                changed = target.value if isinstance(target, ast.Subscript) else target
                name = ast.unparse(changed)
                if isinstance(changed, ast.Attribute) and name.partition(".")[0] in foreign:
                    found.add(name)
    assert found and found <= listed
