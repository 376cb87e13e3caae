"""Imports point one way: a file imports only those that stand before it in this order."""

from __future__ import annotations

import ast
from pathlib import Path

import peft_talan

ROOT = Path(peft_talan.__file__).parent
ORDER = (
    "version",
    "functional.parameters",
    "functional.writeback",
    "functional.reference",
    "functional.chunked",
    "functional.recomputed",
    "functional.fused",
    "functional.one_token",
    "checkpoint",
    "rollback",
    "names",
    "hub",
    "segments",
    "memory",
    "state",
    "block_call",
    "config",
    "initialization",
    "adapter_tensors",
    "blocks",
    "loading",
    "layer",
    "attachment",
    "merge",
    "steering",
    "lora",
    "training",
    "measures",
    "residual",
    "analysis",
    "analysis_plots",
    "analyze",
    "monitor",
    "mixed_batch",
    "weighted",
    "tensor_parallel",
    "model",
    "registry",
)


def own_imports(name: str) -> set[str]:
    package = name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            prefix = package[: len(package) - node.level + 1]
            if node.module:
                target = ".".join([*prefix, node.module])
                names = (
                    [target]
                    if (ROOT / f"{target.replace('.', '/')}.py").exists()
                    else [f"{target}.{alias.name}" for alias in node.names]
                )
            else:
                names = [".".join([*prefix, alias.name]) for alias in node.names]
            found.update(names)
    return found


def test_imports_point_one_way() -> None:
    for place, name in enumerate(ORDER):
        assert own_imports(name) <= set(ORDER[:place]), name


def test_no_core_file_is_left_out() -> None:
    core = {path.stem for path in ROOT.glob("*.py")} | {f"functional.{p.stem}" for p in ROOT.glob("functional/*.py")}
    assert core - set(ORDER) <= {"__init__", "functional.__init__", "__main__", "cli"}
