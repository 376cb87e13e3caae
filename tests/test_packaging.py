"""Source distribution and wheel: all that belongs there is in them, the wheel works away from its sources, and no
other program suffers from them."""

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
import torch

from peft_talan import __version__

ROOT = Path(__file__).parents[1]
FOLDERS = (".ci", "benchmarks", "docs", "examples", "peft_talan", "tests")
FILES = ("LICENSE", "MANIFEST.in", "Makefile", "README.md", "mkdocs.yml", "pyproject.toml", "setup.cfg")


def files_below(folder: Path) -> set[Path]:
    found = (file for name in FOLDERS for file in (folder / name).rglob("*") if file.is_file())
    return {file.relative_to(folder) for file in found if "__pycache__" not in file.parts} | set(map(Path, FILES))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with its metadata beside the package, and the source distribution in `made`."""
    # A copy: setuptools would gather what earlier builds left beside the sources.
    folder = tmp_path_factory.mktemp("sources")
    for file in files_below(ROOT):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    command = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('made')"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    assert (folder / "peft_talan.egg-info" / "entry_points.txt").is_file()
    return folder


@pytest.fixture(scope="module")
def unpacked(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("unpacked")
    (made,) = (clone / "made").iterdir()
    shutil.unpack_archive(made, folder)
    (unpacked,) = folder.iterdir()
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


NOT_THERE = ("__editable__", "peft", "aenum", "bitsandbytes", "torchao")
"""What begins so is not in the other environment. The last two would only cost time."""


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Folders of another environment: torch and all that PEFT needs, PEFT, and aenum."""
    folders = tuple(tmp_path_factory.mktemp(name) for name in ("torch", "peft", "aenum"))
    for entry in Path(torch.__file__).parents[1].iterdir():
        if entry.suffix != ".pth" and not entry.name.startswith(NOT_THERE):
            (folders[0] / entry.name).symlink_to(entry)
        for folder, name in zip(folders[1:], ("peft", "aenum"), strict=True):
            if entry.name == name or entry.name.startswith(f"{name}-"):
                (folder / entry.name).symlink_to(entry)
    return folders


def imported_elsewhere(lines: str, cwd: Path, *paths: Path) -> str:
    """Run lines that must succeed, in an interpreter that sees the standard library and these folders; its stderr."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-S", "-c", lines]  # -S: without this environment's site-packages
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


def test_torch_is_imported_where_only_this_package_is_seen(
    clone: Path, wheel: Path, others: tuple[Path, Path, Path], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    lines = "import sys, torch; assert 'peft_talan' in sys.modules"
    for name, cwd, paths in (
        ("in the clone's folder", clone, []),
        ("with the clone on PYTHONPATH", tmp_path, [clone]),
        ("from a wheel whose dependencies are gone", tmp_path, [tmp_path / "site"]),
    ):
        with subtests.test(name):
            assert "peft_talan" not in imported_elsewhere(lines, cwd, *paths, others[0])


def test_half_uninstalled_there_is_one_warning_where_peft_is_imported(
    wheel: Path, others: tuple[Path, Path, Path], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    shutil.unpack_archive(wheel, tmp_path / "whole", "zip")
    shutil.unpack_archive(wheel, tmp_path / "half", "zip")
    for folder in (tmp_path / "half" / "peft_talan").iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    lines = "import torch, peft; peft.LoraConfig(); assert 'TALAN' not in peft.PeftType.__members__"
    for name, paths in (
        ("folders of the package are gone", [tmp_path / "half", *others]),
        ("aenum is gone", [tmp_path / "whole", *others[:2]]),
    ):
        with subtests.test(name):
            warned = imported_elsewhere(lines, tmp_path, *paths)
            assert warned.count("peft_talan could not register itself") == 1
