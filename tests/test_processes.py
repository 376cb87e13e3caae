"""Two processes on this machine: what they train, save and resume is what one process does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .processes import sharded, training
from .small_models import rounding

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "benchmarks" / "recipes"
SECONDS = 240
CHECKS = tuple(sharded.checks(Path()))
LAUNCHES = {
    "ddp": ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"],
    "fsdp1": ["--config_file", str(ROOT / "tests" / "processes" / "fsdp1.yaml")],
    # The file that the recipe trains with, at a smaller number and at full precision.
    "fsdp2": [
        *("--config_file", str(RECIPES / "eight_gpus_fsdp2.yaml")),
        *("--num_processes", "2", "--mixed_precision", "no"),
    ],
}


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def launch(command: list[str], **environment: str) -> tuple[int, str]:
    """Run a launcher on the loopback interface; when its time is up, it and all that it started are killed."""
    surroundings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **surroundings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        output += f"\nkilled after {SECONDS} seconds"
    return process.returncode, output


@pytest.fixture(scope="module")
def of_torchrun(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("sharded"))
    how = ["--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    return launch(["torch.distributed.run", *how, "-m", sharded.__name__], TEST_FOLDER=folder)[1]


@pytest.mark.parametrize("check", CHECKS)
def test_sharded_by_torch_and_transformers(check: str, of_torchrun: str) -> None:
    assert f"holds: {check}\n" in of_torchrun, of_torchrun[-4000:]


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_process")
    torch.manual_seed(0)
    training.train_whole_and_resumed(folder)
    return folder


def check_equal(adapter: Path, expected: Path) -> None:
    tensors, expected_tensors = (load_file(at / "adapter_model.safetensors") for at in (adapter, expected))
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected_tensors[name], **rounding())
    assert json.loads((adapter / "adapter_config.json").read_text()) == json.loads(
        (expected / "adapter_config.json").read_text()
    )


def losses(run: Path) -> torch.Tensor:
    """The logged losses, which models compute in float32 whatever their dtype."""
    return torch.tensor([entry["loss"] for entry in json.loads((run / "log.json").read_text())])


@pytest.mark.parametrize("how", LAUNCHES)
def test_trainer_by_accelerate(how: str, of_one_process: Path, tmp_path: Path) -> None:
    port = ["--main_process_port", free_port()]
    code, output = launch(
        ["accelerate.commands.launch", *LAUNCHES[how], *port, "-m", training.__name__, str(tmp_path)]
    )
    assert code == 0, output[-6000:]
    for run in ("whole", "resumed"):
        check_equal(tmp_path / run / "adapter", of_one_process / run / "adapter")
        torch.testing.assert_close(losses(tmp_path / run), losses(of_one_process / run), **rounding(torch.float32))
    check_equal(tmp_path / "resumed" / "adapter", tmp_path / "whole" / "adapter")
