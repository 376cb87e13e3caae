"""`pip install` is enough: fresh interpreters that never import this package know its adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from .small_models import make_base, make_model, make_tokens

ORDERS = {
    "torch first": "import torch\nimport peft",
    "peft first": "import peft\nimport torch",
    "a submodule of peft first": "from peft.utils import PeftType\nimport torch",
    "transformers first": "import transformers\nimport torch\nimport peft",
}


def run(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,  # not the checkout: only what is installed counts
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    names = [point.value for point in entry_points(group="torch.backends")]
    assert "peft_talan_autoload:prepare" in names, "these tests need the package installed: pip install -e ."


@pytest.mark.parametrize("order", ORDERS)
def test_adapter_loads_without_an_import_of_this_package(order: str, tmp_path: Path) -> None:
    make_base("qwen3", torch.float32).save_pretrained(tmp_path / "base")
    model = make_model("qwen3", dtype=torch.float32)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        torch.save({"tokens": make_tokens(), "logits": model(make_tokens()).logits}, tmp_path / "expected.pt")
    script = f"""
{ORDERS[order]}
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter").eval()
expected = torch.load("expected.pt")
with torch.no_grad():
    print(torch.equal(model(expected["tokens"]).logits, expected["logits"]))
"""
    finished = run(script, tmp_path)
    assert finished.stdout.strip() == "True", finished.stderr


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    script = """
import peft, sys
print("TALAN" in peft.PeftType.__members__, "peft_talan" in sys.modules)
import peft_talan
print("TALAN" in peft.PeftType.__members__)
"""
    assert run(script, tmp_path, PEFT_TALAN_AUTOLOAD="0").stdout.split() == ["False", "False", "True"]


def test_torch_alone_imports_nothing_of_ours(tmp_path: Path) -> None:
    script = "import torch, sys; print(*[name in sys.modules for name in ('peft', 'peft_talan', 'transformers')])"
    assert run(script, tmp_path).stdout.split() == ["False", "False", "False"]


def test_looking_for_peft_does_not_use_the_registration_up(tmp_path: Path) -> None:
    script = """
import importlib.util, sys, torch
before = list(sys.meta_path)
spec = importlib.util.find_spec("peft")
import peft
print('TALAN' in peft.PeftType.__members__, type(peft.__loader__) is type(torch.__loader__))
print(any(finder.__class__.__module__ == "peft_talan_autoload" for finder in sys.meta_path))
importlib.reload(peft)
"""
    finished = run(script, tmp_path)
    assert finished.stdout.split() == ["True", "True", "False"], finished.stderr
    assert finished.returncode == 0


@pytest.mark.parametrize("order", ["torch first", "peft first"])
def test_a_broken_installation_is_one_warning(order: str, tmp_path: Path) -> None:
    script = f"""
import sys
sys.modules["peft_talan"] = None
{ORDERS[order]}
from peft import LoraConfig
print(LoraConfig(r=2).r)
"""
    finished = run(script, tmp_path)
    assert finished.stdout.strip() == "2"
    assert finished.stderr.count("peft_talan could not register itself") == 1


def test_import_of_torch_loads_this_one_module_more(tmp_path: Path) -> None:
    # Whatever else it imports is loaded already when torch reaches its entry points, so a program that never uses
    # PEFT pays for executing one small file.
    script = """
import sys, torch
before = set(sys.modules)
from importlib.metadata import entry_points
found = entry_points(group="torch.backends")
before |= {name for name in sys.modules if name.startswith("importlib")}
(point,) = [point for point in found if "peft_talan" in point.value]
point.load()()
print(*sorted(set(sys.modules) - before))
"""
    finished = run(script, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert finished.stdout.split() == ["peft_talan_autoload"], finished.stderr
