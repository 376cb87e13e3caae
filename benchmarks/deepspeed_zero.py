"""DeepSpeed ZeRO-2 and ZeRO-3 against one process, on CPU: losses, the saved adapter, and a training resumed.

Once by DeepSpeed's own engine and once by transformers' Trainer. Each training is done whole, and again from a
checkpoint in the middle. Needs `pip install deepspeed`, which is not among the test packages:
DS_ACCELERATOR=cpu DS_BUILD_OPS=0 python -m benchmarks.deepspeed_zero
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from tests.processes import training
from tests.processes.launching import TORCHRUN, free_port, launch
from tests.processes.sharded import save_parts
from tests.small_models import make_config, make_model, make_tokens

RESULTS = Path(__file__).parent / "results" / "deepspeed_zero.json"
STAGES = (2, 3)
STEPS = 4
BATCH = 4
KINDS: dict[str, dict[str, object]] = {
    "output": {},
    "input, gated, mlp": {"talan_position": "input", "talan_writeback": "gated", "talan_mixer": "mlp"},
}
Run = tuple[list[float], dict[str, torch.Tensor]]
"""The losses of a training and the adapter that it saved."""


def build(checkpointing: bool, **options: object) -> PeftModel:
    model = make_model("qwen3", make_config(**options), dtype=torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """An optimizer whose momentum a resumed training needs too."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)


def zero(stage: int) -> dict[str, object]:
    """DeepSpeed's options: everything is shared out, however small, and saved whole."""
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


def differences(runs: dict[str, Run], expected: Run) -> dict[str, object]:
    """Compare a whole and a resumed training with one process, and with each other."""

    def largest(one: Run, other: Run) -> float | None:
        shared = one[1].keys() & other[1]
        return max(((one[1][key] - other[1][key]).abs().max().item() for key in shared), default=None)

    def largest_loss(run: Run) -> float:
        return max(abs(a - b) for a, b in zip(run[0], expected[0][-len(run[0]) :], strict=True))

    whole, resumed = runs["whole"], runs["resumed"]
    return {
        "tensors_expected": len(expected[1]),
        "tensors_saved": len(whole[1]),
        "empty_tensors": sum(tensor.numel() == 0 for tensor in whole[1].values()),
        "largest_loss_difference": largest_loss(whole),
        "largest_weight_difference": largest(whole, expected),
        "resumed_tensors_saved": len(resumed[1]),
        "resumed_largest_loss_difference": largest_loss(resumed),
        "resumed_largest_weight_difference": largest(resumed, expected),
        "resumed_largest_weight_difference_to_whole": largest(resumed, whole),
    }


def by_one_process(**options: object) -> Run:
    model = build(False, **options)
    optimizer, losses, tokens = optimizer_of(model), [], make_tokens(BATCH)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, get_peft_model_state_dict(model)


def by_engine(stage: int, checkpointing: bool, folder: Path, resume: bool, **options: object) -> Run:
    """Train by DeepSpeed's engine; the whole training writes a checkpoint in the middle, the resumed one reads it."""
    import deepspeed

    model = build(checkpointing, **options)
    share = BATCH // dist.get_world_size()
    tokens = make_tokens(BATCH)[dist.get_rank() * share :][:share]
    config = {"train_micro_batch_size_per_gpu": share, **zero(stage)}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
    losses = []
    if resume:
        engine.load_checkpoint(str(folder), load_module_strict=False)
    for step in range(STEPS // 2 if resume else 0, STEPS):
        if step == STEPS // 2 and not resume:
            engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)
        loss = engine(tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    state_dict = None
    if stage == 3:
        state_dict = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    if dist.get_rank() != 0:
        return losses, {}
    return losses, {
        name: tensor.clone() for name, tensor in get_peft_model_state_dict(model, state_dict=state_dict).items()
    }


def in_each_process(stage: int, folder: Path) -> None:
    """What each of the engine's two processes does; the first one writes the rows."""
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    rows = []
    for name, options in KINDS.items():
        for checkpointing in (False, True):
            at = folder / f"{name} {checkpointing}"
            runs = {
                run: by_engine(stage, checkpointing, at, run == "resumed", **options) for run in ("whole", "resumed")
            }
            if dist.get_rank() == 0:
                about = {"by": "engine", "stage": stage, "side_path": name, "checkpointing": checkpointing}
                rows.append({**about, **differences(runs, by_one_process(**options))})
                (folder / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def start(command: list[str], **environment: str) -> None:
    """Run a launcher; its last lines are the error's if it fails."""
    code, output = launch(command, **environment)
    if code != 0:
        raise RuntimeError(output[-6000:])


def rows_of_engine(stage: int, folder: Path) -> list[dict[str, object]]:
    start([*TORCHRUN, "-m", "benchmarks.deepspeed_zero", "--stage", str(stage), "--in-each-process", str(folder)])
    return json.loads((folder / "rows.json").read_text())


def read_run(folder: Path) -> Run:
    losses = json.loads((folder / "log.json").read_text())["losses"]
    return losses, load_file(folder / "adapter" / "adapter_model.safetensors")


def rows_of_trainer(stage: int, folder: Path) -> list[dict[str, object]]:
    """Train by `accelerate launch` and Trainer, from a base model that DeepSpeed loads in parts at stage 3."""
    save_parts(folder, training.build(torch.float32))
    training.train_whole_and_resumed(folder / "one_process", dtype="float32")
    config, out = folder / f"zero{stage}.json", folder / f"zero{stage}"
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    config.write_text(json.dumps({**zero(stage), **dict.fromkeys(auto, "auto")}))
    how = ["--use_deepspeed", "--deepspeed_config_file", str(config), "--num_processes", "2", "--num_machines", "1"]
    options = json.dumps({"parts": str(folder), "dtype": "float32"})
    launcher = ["accelerate.commands.launch", *how, "--main_process_port", free_port()]
    start([*launcher, "-m", training.__name__, str(out), options], ACCELERATE_USE_CPU="false")
    classes = json.loads((out / "resumed" / "log.json").read_text())["classes"]
    if "DeepSpeedEngine" not in classes:
        raise RuntimeError(f"DeepSpeed did not train: {classes}")
    runs = {run: read_run(out / run) for run in ("whole", "resumed")}
    expected = read_run(folder / "one_process" / "whole")
    about = {"by": "Trainer", "stage": stage, "side_path": "output, gated, mlp", "checkpointing": False}
    return [{**about, **differences(runs, expected)}]


WAYS = {"engine": rows_of_engine, "Trainer": rows_of_trainer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--by", choices=WAYS, nargs="+", default=list(WAYS), help="whose rows to measure again")
    parser.add_argument("--stage", choices=STAGES, type=int, nargs="+", default=list(STAGES), help="at which stages")
    parser.add_argument("--in-each-process", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_each_process is not None:
        in_each_process(arguments.stage[0], arguments.in_each_process)
        return
    torch.set_num_threads(1)
    measured = []
    for by, stage in itertools.product(arguments.by, arguments.stage):
        with tempfile.TemporaryDirectory() as folder:
            measured += WAYS[by](stage, Path(folder))
    print(json.dumps(measured, indent=1), flush=True)
    again = set(itertools.product(arguments.by, arguments.stage))
    kept = [row for row in json.loads(RESULTS.read_text())["rows"] if (row["by"], row["stage"]) not in again]
    rows = sorted(kept + measured, key=lambda row: (list(WAYS).index(row["by"]), row["stage"]))
    about = {
        "steps": STEPS,
        "optimizer": "SGD with momentum 0.9",
        "resumed_after_step": STEPS // 2,
        "processes": 2,
        "backend": "gloo",
        "dtype": "float32",
        **{package: version(package) for package in ("torch", "transformers", "peft", "accelerate", "deepspeed")},
        "machine": platform.machine(),
        "device": "cpu",
    }
    RESULTS.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
