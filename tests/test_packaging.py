"""Source distribution and wheel: all that belongs there is in them, and the wheel works away from its sources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import pytest

from peft_talan import __version__

ROOT = Path(__file__).parents[1]
FOLDERS = (".ci", "benchmarks", "docs", "examples", "peft_talan", "tests")
FILES = ("LICENSE", "MANIFEST.in", "Makefile", "README.md", "mkdocs.yml", "pyproject.toml", "setup.cfg")


def files_below(folder: Path) -> set[Path]:
    found = (file for name in FOLDERS for file in (folder / name).rglob("*") if file.is_file())
    return {file.relative_to(folder) for file in found if "__pycache__" not in file.parts} | set(map(Path, FILES))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    # From a copy: setuptools would gather what earlier builds left beside the sources.
    folder = tmp_path_factory.mktemp("sources")
    for file in files_below(ROOT):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    command = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('made')"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (made,) = (folder / "made").iterdir()
    shutil.unpack_archive(made, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(unpacked: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "made", "."]
    subprocess.run(command, cwd=unpacked, check=True, capture_output=True)
    (made,) = (unpacked / "made").iterdir()
    return made


def test_the_source_distribution_is_the_repository(unpacked: Path) -> None:
    assert files_below(unpacked) == files_below(ROOT)
    assert all((unpacked / name).is_file() for name in FILES)


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    expected = set()
    for file in (ROOT / "peft_talan").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            expected.add(file.relative_to(ROOT).as_posix())
    with ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(opened.read(metadata).decode())
    assert names == expected
    assert headers["Version"] == __version__
    assert headers["License-Expression"] == "Apache-2.0"


def test_the_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", "site", str(wheel)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    lines = (
        "import sys, peft_talan.cli; print(peft_talan.cli.__file__); code = peft_talan.cli.main(['doctor', '--json']);"
        "print(sys.modules['peft_talan'].__file__); sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run(
        [sys.executable, "-c", lines], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    program, *report, package = ran.stdout.splitlines()
    assert Path(program).is_relative_to(tmp_path)
    assert Path(package).is_relative_to(tmp_path)
    found = json.loads("\n".join(report))
    assert found["passed"]
    assert found["versions"]["peft-talan"] == __version__
    assert {check["name"]: check["passed"] for check in found["checks"]} == dict.fromkeys(
        ["versions are supported", "autoload", "registration", "fresh == LoRA", "cached == uncached"], True
    )
