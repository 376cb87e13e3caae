"""Run by accelerate in two processes: every training of `training`, then every check of `sharded`.

`python -m tests.processes.worker FOLDER`. All in one launch, since each imports for seconds. The first that fails ends
the run; each that holds prints a line.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.processes import sharded, training
from tests.small_models import make_base

FROZEN = ("side_path", "writeback")
"""What trains alone in FSDP2, whose checkpoints leave out the rest."""


def switch_fsdp_off() -> None:
    """Forget the launcher's settings for FSDP, which accelerate and transformers read whenever a model is made."""
    for name in list(os.environ):
        if name.startswith("FSDP_") or name == "ACCELERATE_USE_FSDP":
            del os.environ[name]


def main(folder: Path) -> None:
    """Run everything.

    Args:
        folder: Gets a folder for each training; has a folder `parts`, where `save_parts` wrote what is loaded.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    training.train_whole_and_resumed(folder / "fsdp2", **training.HEAD)
    for scope in FROZEN:
        training.train_a_frozen_half(folder / f"fsdp2 {scope}", scope)
    switch_fsdp_off()
    training.train_whole_and_resumed(folder / "ddp", **training.HEAD)
    # Trainer resumes nothing of a model that transformers shares out.
    training.train(folder / "tensor_parallel" / "whole", parts=str(folder / "parts"), tensor_parallel=True)
    training.train_with_prompts(folder / "prompts", str(folder / "parts"), tensor_parallel=True)
    if dist.get_rank() == 0:
        make_base("qwen3").save_pretrained(folder / "base")
    dist.barrier()
    for name, check in sharded.checks(folder).items():
        check()
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"holds: {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
