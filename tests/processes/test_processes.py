"""Two processes on this machine: what they train, save and resume is what one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from ..small_models import rounding
from . import sharded, training, worker
from .launching import ROOT, free_port, launch

# The file that the recipe trains with, at a smaller number and at full precision.
LAUNCH = [
    *("accelerate.commands.launch", "--config_file", str(ROOT / "benchmarks" / "recipes" / "eight_gpus_fsdp2.yaml")),
    *("--num_processes", "2", "--mixed_precision", "no"),
    # Accelerate looks for a GPU to do this on, for FSDP1 only but whatever the version.
    *("--fsdp_sync_module_states", "false"),
]
# What shows that a training was shared out as it is named after.
SHARED_OUT_BY = {
    "fsdp2": "FSDPQwen3DecoderLayer",
    "ddp": "DistributedDataParallel",
    "tensor_parallel": "DTensor",
}


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


def test_two_processes_train_what_one_process_trains(tmp_path: Path, subtests: pytest.Subtests) -> None:
    sharded.save_parts(tmp_path / "parts", training.build())
    code, output = launch([*LAUNCH, "--main_process_port", free_port(), "-m", worker.__name__, str(tmp_path)])
    with_head, without = tmp_path / "one process, head", tmp_path / "one process"
    training.train_whole_and_resumed(with_head, **training.HEAD)
    training.train(without / "whole")
    frozen = {f"fsdp2 {scope}": tmp_path / f"one process, {scope}" for scope in worker.FROZEN}
    for scope, folder in zip(worker.FROZEN, frozen.values(), strict=True):
        training.train_whole_and_resumed(folder, talan_trainable=scope)
    for how, expected in (
        *(("fsdp2", with_head), ("ddp", with_head), ("tensor_parallel", without)),
        *frozen.items(),
    ):
        with subtests.test(training=how):
            runs = {folder.name for folder in (tmp_path / how).glob("*")}
            assert runs == {folder.name for folder in expected.iterdir()}, output[-6000:]
            for run in runs:
                found = tmp_path / how / run
                assert SHARED_OUT_BY[how.partition(" ")[0]] in log(found)["classes"]
                check_equal(found / "adapter", expected / run / "adapter")
                torch.testing.assert_close(losses(found), losses(expected / run), **rounding(torch.float32))
                check_equal(found / "adapter", tmp_path / how / "whole" / "adapter")
    with subtests.test(training="tensor parallel, with the prompts' part of the loss"):
        training.train_with_prompts(tmp_path / "one process, prompts", str(tmp_path / "parts"))
        expected = losses(tmp_path / "one process, prompts")
        torch.testing.assert_close(losses(tmp_path / "prompts"), expected, **rounding(torch.float32))
    for check in sharded.checks(tmp_path):
        with subtests.test(check=check):
            assert f"holds: {check}\n" in output, output[-4000:]
    assert code == 0, output[-4000:]
