"""Imports point one way: a room imports only rooms that stand before it, and no two files import each other."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import peft_talan

ROOT = Path(peft_talan.__file__).parent
ROOMS: tuple[tuple[str, ...], ...] = (
    ("version", "private_names"),
    ("axes",),
    ("functional",),
    ("memory",),
    ("config",),
    ("checkpoint",),
    ("serving.pages", "serving.paged_cache"),
    ("tuner",),
    ("serving",),
    ("autoload",),
    ("sft",),
    ("analysis",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
"""In each item: the files and folders that may import each other, and everything before them."""


def files() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def own_imports(name: str, path: Path, known: set[str]) -> set[str]:
    """The files of this package that a file imports, by their names below it."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        prefix = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        target = ".".join(part for part in prefix if part)
        for alias in node.names:
            whole = f"{target}.{alias.name}".removeprefix(".")
            found.add(whole if whole in known else target)
    return found - {"", name}


def floor(name: str) -> int:
    """The place of the smallest room that a file is in."""
    places = {room: place for place, rooms in enumerate(ROOMS) for room in rooms}
    return places[max((room for room in places if f"{name}.".startswith(f"{room}.")), key=len)]


def test_rooms_import_one_way() -> None:
    known = files()
    for name, path in known.items():
        for target in own_imports(name, path, set(known)):
            assert floor(target) <= floor(name), f"{name} imports {target}"


def test_no_two_files_import_each_other() -> None:
    known = files()
    graph = {name: own_imports(name, path, set(known)) for name, path in known.items()}
    TopologicalSorter(graph).prepare()  # It raises CycleError where there is a circle.


def test_no_room_is_left_out() -> None:
    assert {name.split(".")[0] for name in files()} == {room.split(".")[0] for rooms in ROOMS for room in rooms}
