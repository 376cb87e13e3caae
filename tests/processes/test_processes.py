"""Two processes on this machine: what they train, save and resume is what one process does."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from ..small_models import rounding
from . import sharded, training
from .launching import ROOT, TORCHRUN, free_port, launch

RECIPES = ROOT / "benchmarks" / "recipes"
CHECKS = tuple(sharded.checks(Path()))
TWO_PROCESSES = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCHES = {
    "ddp": TWO_PROCESSES,
    # The file that the recipe trains with, at a smaller number and at full precision.
    "fsdp2": [
        *("--config_file", str(RECIPES / "eight_gpus_fsdp2.yaml")),
        *("--num_processes", "2", "--mixed_precision", "no"),
        # Accelerate looks for a GPU to do this on, for FSDP1 only but whatever the version.
        *("--fsdp_sync_module_states", "false"),
    ],
    "tensor_parallel": TWO_PROCESSES,
}
HEAD = {"modules_to_save": ["lm_head"]}
# PEFT copies a module that is saved whole, which torch can't where the module is shared out.
OPTIONS: dict[str, dict[str, object]] = {"ddp": HEAD, "fsdp2": HEAD, "tensor_parallel": {}}
# What shows that the launch did what it is named after.
SHARED_OUT_BY = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPQwen3DecoderLayer",
    "tensor_parallel": "DTensor",
}


@pytest.fixture(scope="module")
def of_torchrun(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("sharded"))
    return launch([*TORCHRUN, "-m", sharded.__name__], TEST_FOLDER=folder)[1]


@pytest.mark.parametrize("check", CHECKS)
def test_sharded_by_torch_and_transformers(check: str, of_torchrun: str) -> None:
    assert f"holds: {check}\n" in of_torchrun, of_torchrun[-4000:]


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the runs of one process with the options of a launch."""

    @functools.cache
    def trained(options: str) -> Path:
        folder = tmp_path_factory.mktemp("one_process")
        torch.manual_seed(0)
        training.train_whole_and_resumed(folder, **json.loads(options))
        return folder

    return lambda how: trained(json.dumps(OPTIONS[how]))


def check_equal(adapter: Path, expected: Path) -> None:
    tensors, expected_tensors = (load_file(at / "adapter_model.safetensors") for at in (adapter, expected))
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected_tensors[name], **rounding())
    config, expected_config = (PeftConfig.from_pretrained(at) for at in (adapter, expected))
    # Some models were built, some loaded from a folder.
    config.base_model_name_or_path = expected_config.base_model_name_or_path
    assert config == expected_config


def log(run: Path) -> dict[str, list]:
    return json.loads((run / "log.json").read_text())


def losses(run: Path) -> torch.Tensor:
    """The logged losses, which models compute in float32 whatever their dtype."""
    return torch.tensor(log(run)["losses"])


@pytest.mark.parametrize("how", LAUNCHES)
def test_trainer_by_accelerate(how: str, of_one_process: Callable[[str], Path], tmp_path: Path) -> None:
    expected, out, options = of_one_process(how), tmp_path / "runs", OPTIONS[how]
    if how == "tensor_parallel":
        sharded.save_parts(tmp_path, training.build(**options))
        options = {**options, "tensor_parallel": True, "parts": str(tmp_path)}
    command = ["accelerate.commands.launch", *LAUNCHES[how], "--main_process_port", free_port()]
    code, output = launch([*command, "-m", training.__name__, str(out), json.dumps(options)])
    assert code == 0, output[-6000:]
    assert (out / "resumed").exists() == (how != "tensor_parallel")
    for run in (folder.name for folder in out.iterdir()):
        assert SHARED_OUT_BY[how] in log(out / run)["classes"]
        check_equal(out / run / "adapter", expected / run / "adapter")
        torch.testing.assert_close(losses(out / run), losses(expected / run), **rounding(torch.float32))
        check_equal(out / run / "adapter", out / "whole" / "adapter")
