"""The documentation is true: its code runs, its error messages exist, and no public name is left out."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import peft_talan
from peft_talan.version import INSTALL

from ..offline_hub import make_hub_cache

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "peft_talan"
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
PROGRAMS = ("cli", "demo", "autoload")
"""Folders of the package that are programs: their interface is the command line."""


def test_every_python_and_shell_block_runs(tmp_path: Path, subtests: pytest.Subtests) -> None:
    make_hub_cache(tmp_path / "home")
    # The README's model: the same tiny one here, the real one in test_quick_start.py.
    hub = tmp_path / "home" / "hub"
    (hub / "models--HuggingFaceTB--SmolLM2-135M-Instruct").symlink_to(hub / "models--Qwen--Qwen3-0.6B")
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "agg",
    }
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.docs.pages", report, tmp_path / "pages", *PAGES]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert report.exists(), ran.stdout + ran.stderr
    results = json.loads(report.read_text())
    assert set(results) == set(map(str, PAGES))
    for page, result in results.items():
        with subtests.test(page=Path(page).name):
            assert result["error"] is None, result["error"]
    # A parser that finds nothing would pass everything.
    assert results[str(ROOT / "docs" / "index.md")]["ran"] == 4


def public_names() -> Iterator[str]:
    """Every public function and class of the modules that are no programs."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[1] in PROGRAMS or parts[-1].startswith("__"):
            continue
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                yield ".".join([*parts, node.name])


def test_every_public_name_stands_on_a_reference_page() -> None:
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)", pages, re.MULTILINE))
    missing = [name for name in public_names() if name not in shown and name.rpartition(".")[0] not in shown]
    assert not missing, f"add lines such as '::: MODULE' to docs/reference/modules.md for {missing}"
    exported = [name for name in peft_talan.__all__ if not name.startswith("__")]
    on_page = set(re.findall(r"^::: peft_talan\.(?:\w+\.)*(\w+)", (ROOT / "docs/reference/api.md").read_text(), re.M))
    assert set(exported) <= on_page


def test_examples_have_the_heading_that_the_reference_pages_read() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert not re.search(r"^ *Example:$", file.read_text(), re.MULTILINE), f"{file}: write 'Examples:'"


def texts_of_the_package() -> list[str]:
    """Every text in the package's code, with … where a value stands in it."""
    texts = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_error_messages_of_the_docs_are_those_of_the_package() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    messages = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(messages) > 20
    texts = texts_of_the_package()
    unknown = [message for message in messages if not any(message in text for text in texts)]
    assert not unknown


def test_every_axis_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "axes.md").read_text()
    axes = {name for name in peft_talan.TalanConfig.__dataclass_fields__ if "talan" in name}
    assert {axis for axis in axes if f"`{axis}`" not in page and "version" not in axis} == set()


def test_how_to_install_is_told_as_model_cards_tell_it() -> None:
    assert f"\n{INSTALL} " in (ROOT / "docs" / "index.md").read_text()
    for page in PAGES:
        assert "pip install peft-talan" not in page.read_text(), page


def test_badges_are_those_of_the_package() -> None:
    badges = {file.stem: file.read_text() for file in (ROOT / "docs" / "images" / "badges").glob("*.svg")}
    shown = {name: re.findall(r"<title>.*?: (.*)</title>", text)[0] for name, text in badges.items()}
    facts = metadata("peft-talan")
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(facts.get_all("Classifier")))
    assert shown["python"] == f"{pythons[0]} to {pythons[-1]}"
    assert shown["licence"] == facts["License-Expression"]
    needed = [need for need in map(Requirement, facts.get_all("Requires-Dist")) if need.marker is None]
    bounds = {need.name: need.specifier for need in needed}
    for name in ("peft", "transformers"):
        ends = [tuple(map(int, version.split("."))) for version in shown[name].split(" to ")]
        first, last = ends[0], ends[-1]
        minors = [minor for minor in range(first[1] - 1, last[1] + 2) if f"{first[0]}.{minor}.0" in bounds[name]]
        assert minors == [*range(first[1], last[1] + 1)]


def test_code_fits_the_page() -> None:
    """100 columns fit beside the navigation at 1440 pixels; `docs/extra.css` sets the width."""
    long = []
    for page in PAGES:
        for block in re.findall(r"^```.*?^```", page.read_text(), re.MULTILINE | re.DOTALL):
            long += [f"{page.name}: {line}" for line in block.splitlines() if len(line) > 100]
    assert not long
