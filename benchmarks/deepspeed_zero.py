"""DeepSpeed's ZeRO-2 and ZeRO-3 against one process, on CPU: losses and the saved adapter.

Needs `pip install deepspeed`, which is not among the test packages. Run with two processes:
DS_ACCELERATOR=cpu DS_BUILD_OPS=0 torchrun --nproc_per_node 2 -m benchmarks.deepspeed_zero
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict

from tests.small_models import make_config, make_model, make_tokens

RESULTS = Path(__file__).parent / "results" / "deepspeed_zero.json"
STEPS = 3
BATCH = 4
KINDS: dict[str, dict[str, object]] = {
    "output": {},
    "input, gated, mlp": {"talan_position": "input", "talan_writeback": "gated", "talan_mixer": "mlp"},
}


def build(checkpointing: bool, **options: object) -> PeftModel:
    model = make_model("qwen3", make_config(**options), dtype=torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def one_process(**options: object) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = build(False, **options)
    optimizer, losses, tokens = optimizer_of(model), [], make_tokens(BATCH)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, get_peft_model_state_dict(model)


def zero(stage: int, checkpointing: bool, **options: object) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = build(checkpointing, **options)
    share = BATCH // dist.get_world_size()
    tokens = make_tokens(BATCH)[dist.get_rank() * share :][:share]
    config = {
        "train_micro_batch_size_per_gpu": share,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
    losses = []
    for _ in range(STEPS):
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
    return losses, get_peft_model_state_dict(model, state_dict=state_dict)


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    rows = []
    for stage in (2, 3):
        for name, options in KINDS.items():
            for checkpointing in (False, True):
                expected_losses, expected = one_process(**options)
                losses, saved = zero(stage, checkpointing, **options)
                if dist.get_rank() == 0:
                    differences = [(saved[key] - expected[key]).abs().max().item() for key in expected.keys() & saved]
                    rows.append(
                        {
                            "stage": stage,
                            "side_path": name,
                            "checkpointing": checkpointing,
                            "tensors_expected": len(expected),
                            "tensors_saved": len(saved),
                            "empty_tensors": sum(tensor.numel() == 0 for tensor in saved.values()),
                            "largest_loss_difference": max(
                                abs(one - other) for one, other in zip(losses, expected_losses, strict=True)
                            ),
                            "largest_weight_difference": max(differences, default=None),
                        }
                    )
                    print(json.dumps(rows[-1]), flush=True)
    if dist.get_rank() == 0:
        about = {
            "steps": STEPS,
            "processes": dist.get_world_size(),
            "backend": dist.get_backend(),
            "dtype": "float32",
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "machine": platform.machine(),
            "device": "cpu",
        }
        RESULTS.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
