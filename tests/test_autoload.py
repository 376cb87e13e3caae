"""`pip install` is enough: fresh interpreters that never import this package know its adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import peft_talan
from peft_talan import export_lora

from .small_models import adapter_calls_of_transformers, make_base, make_model, make_tokens

ORDERS = {
    "torch first, then peft is looked for": "import torch\nimportlib.util.find_spec('peft')\nimport peft",
    # Python imports a package before its submodule, so this is also the order of `import peft`.
    "a submodule of peft first": "from peft.utils import PeftType\nimport peft, torch",
    "transformers first": "import transformers\nimport torch\nimport peft",
    "this package first": "import peft_talan\nassert not {'torch', 'peft'} & set(sys.modules)\nimport peft, torch",
    # It imports PEFT itself, and is not whole when PEFT is.
    "a module of this package first": "import peft_talan.tuner.model\nimport peft, torch",
    "a name of this package first": "from peft_talan import TalanConfig\nimport peft, torch",
    "this package while peft is half imported": """
class Importer:
    def find_spec(name, *rest):
        if name.startswith("peft."):
            import peft_talan.axes
sys.meta_path.insert(0, Importer)
import peft, torch
""",
}
REGISTERED = """
config = peft.PeftConfig.from_pretrained("adapter")
print(type(config).__name__, peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].__name__)
print(type(peft.__loader__) is type(torch.__loader__))
print(any(finder.__class__.__module__ == "peft_talan.autoload" for finder in sys.meta_path))
importlib.reload(peft)
"""
LOADED = """
from transformers import AutoModelForCausalLM
model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter").eval()
expected = torch.load("expected.pt")
with torch.no_grad():
    print(torch.equal(model(expected["tokens"]).logits, expected["logits"]))
"""


MERGED = """
{first}
import sys
early = {{"peft", "peft_talan.tuner.merged"}} & set(sys.modules)
import torch
from transformers import AutoModelForCausalLM
expected = torch.load("expected.pt")
with torch.no_grad():
    loaded = AutoModelForCausalLM.from_pretrained("merged").eval()(expected["tokens"]).logits
torch.testing.assert_close(loaded, expected["logits"])
print(early)
"""

REFUSED = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("base")
assert "peft" not in sys.modules
try:
    model.load_adapter("merged")
except ValueError as error:
    print(error)
"""


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
    assert "peft_talan.autoload:prepare" in names, "these tests need the package installed: pip install -e ."


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter, and what both compute."""
    folder = tmp_path_factory.mktemp("saved")
    make_base("qwen3", torch.float32).save_pretrained(folder / "base")
    model = make_model("qwen3", dtype=torch.float32)
    model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        torch.save({"tokens": make_tokens(), "logits": model(make_tokens()).logits}, folder / "expected.pt")
    model.merge_and_unload().save_pretrained(folder / "merged")
    return folder


@pytest.mark.parametrize("order", ORDERS)
def test_peft_knows_the_adapter_and_nothing_is_left_of_the_waiting(order: str, saved: Path) -> None:
    # Where TALAN is registered in the middle of PEFT's own import, a model shows that PEFT is whole.
    loaded = order == "a submodule of peft first"
    script = f"import importlib.util, sys\n{ORDERS[order]}{REGISTERED}{LOADED if loaded else ''}"
    finished = run(script, saved)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["TalanConfig", "TalanModel", "True", "False", *(["True"] if loaded else [])]


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    script = """
import peft, sys
print("TALAN" in peft.PeftType.__members__, "peft_talan" in sys.modules)
import peft_talan
print("TALAN" in peft.PeftType.__members__)
"""
    assert run(script, tmp_path, PEFT_TALAN_AUTOLOAD="0").stdout.split() == ["False", "False", "True"]


def test_the_command_line_and_the_axes_are_imported_without_torch(tmp_path: Path) -> None:
    script = """
import sys
import peft_talan.autoload, peft_talan.axes, peft_talan.cli, peft_talan.version
print(*{"torch", "peft", "transformers", "numpy"} & set(sys.modules), peft_talan.__version__)
print("TalanConfig" in dir(peft_talan), hasattr(peft_talan, "no_such_name"), "peft" in sys.modules)
"""
    assert run(script, tmp_path).stdout.split() == [peft_talan.__version__, "True", "False", "False"]


def test_every_name_of_the_package_is_there() -> None:
    for name in peft_talan.__all__:
        assert getattr(peft_talan, name) is getattr(peft_talan, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        peft_talan.no_such_name  # noqa: B018


# transformers imports torch at the top of modeling_utils, if nothing has imported it before.
@pytest.mark.parametrize("first", ["import torch", "import transformers.modeling_utils"])
def test_transformers_alone_loads_a_merged_model_and_imports_peft_for_nothing_else(first: str, saved: Path) -> None:
    finished = run(MERGED.format(first=first), saved)
    assert finished.stdout.strip() == "set()", finished.stderr


@pytest.mark.parametrize("environment", [{}, {"PEFT_TALAN_AUTOLOAD": "0"}], ids=["waiting", "switched off"])
def test_this_package_after_transformers_loads_a_merged_model(environment: dict[str, str], saved: Path) -> None:
    script = MERGED.format(first="import transformers.modeling_utils\nimport peft_talan")
    finished = run(script, saved, **environment)
    assert finished.stdout.strip() == "set()", finished.stderr


@adapter_calls_of_transformers
def test_transformers_alone_refuses_a_merged_model_for_an_adapter(saved: Path) -> None:
    shown = run(REFUSED, saved)
    assert shown.returncode == 0, shown.stderr
    assert "load it, with its side path, by AutoModelForCausalLM.from_pretrained('merged')" in shown.stdout


def test_a_program_without_this_package_does_not_run_a_merged_model_without_its_side_path(saved: Path) -> None:
    finished = run(MERGED.format(first=""), saved, PEFT_TALAN_AUTOLOAD="0")
    assert finished.stderr.strip().endswith("ValueError: Unknown fusion type: talan")


def test_torch_alone_imports_neither_peft_nor_the_tuner(tmp_path: Path) -> None:
    script = (
        "import torch, sys; print(*[name in sys.modules for name in ('peft', 'peft_talan.tuner', 'transformers')])"
    )
    assert run(script, tmp_path).stdout.split() == ["False", "False", "False"]


def test_without_the_tuner_there_is_one_warning_and_an_exported_half_loads(saved: Path) -> None:
    with pytest.warns(UserWarning, match="not equivalent"):
        export_lora(make_model("qwen3", dtype=torch.float32), saved / "lora")
    # One function registers, whatever the order; here it fails in the middle of PEFT's own import.
    script = """
import sys
sys.modules["peft_talan.tuner"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM
print(type(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "lora").base_model).__name__)
"""
    finished = run(script, saved)
    assert finished.stdout.strip() == "LoraModel", finished.stderr
    assert finished.stderr.count("peft_talan could not register itself") == 1


def test_import_of_torch_loads_three_small_modules_more(tmp_path: Path) -> None:
    # Whatever else it imports is loaded already when torch reaches its entry points, so a program that never uses
    # PEFT pays for executing three small files.
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
    assert finished.stdout.split() == ["peft_talan", "peft_talan.autoload", "peft_talan.version"], finished.stderr
