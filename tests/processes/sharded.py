"""Checks for two processes: each trains a model that torch or transformers has shared out.

What comes out must be what one process gets from the whole batch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from peft_talan.checkpoint.merged_config import merged_tensor
from peft_talan.tuner.layer import TalanLayer
from tests.small_models import make_base, make_config, make_model, make_tokens, rounding

STEPS = 2
BATCH = 4
KINDS: dict[str, dict[str, object]] = {
    "output": {},
    "input": {"talan_position": "input", "talan_writeback": "gated", "talan_mixer": "mlp"},
}
# Zero W_write: the gradients of all before it are zero, and still there.
FRESH: dict[str, object] = {"init_talan_weights": True, "init_lora_weights": True}


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return model.get_submodule("base_model.model.model.layers")


def build(checkpointing: str | None = None, **options: object) -> PeftModel:
    model = make_model("qwen3", make_config(**options)).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    return model


def optimizer_of(model: nn.Module, momentum: float = 0.0) -> torch.optim.Optimizer:
    """Without momentum it has no memory of its own, and keeps every difference of the gradients visible."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0, momentum=momentum)


def train(
    model: nn.Module, tokens: torch.Tensor, optimizer: torch.optim.Optimizer | None = None, **how: object
) -> list[float]:
    optimizer = optimizer or optimizer_of(model)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        # The models' own loss is computed in float32.
        logits = model(tokens, **how).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@functools.cache
def of_one_process(**options: object) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = build(**options)
    losses = train(model, make_tokens(BATCH))
    return losses, get_peft_model_state_dict(model)


def mine() -> torch.Tensor:
    share = BATCH // dist.get_world_size()
    return make_tokens(BATCH)[dist.get_rank() * share :][:share]


def check_same(losses: list[float], saved: dict[str, torch.Tensor], averaged: bool = True, **options: object) -> None:
    expected_losses, expected = of_one_process(**options)
    losses_here = torch.tensor(losses, dtype=torch.float64)
    if averaged:
        dist.all_reduce(losses_here)
        losses_here /= dist.get_world_size()
    torch.testing.assert_close(losses_here, torch.tensor(expected_losses, dtype=torch.float64), **rounding())
    assert saved.keys() == expected.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda text, at=name: f"{at}: {text}", **rounding())


def ddp(checkpointing: str | None = None, static_graph: bool = False, **options: object) -> None:
    model = build(checkpointing, **options)
    losses = train(DistributedDataParallel(model, static_graph=static_graph), mine())
    check_same(losses, get_peft_model_state_dict(model), **options)


def fsdp2(
    checkpointing: str | None = None, reshard: bool = True, side_path_apart: bool = False, **options: object
) -> None:
    model = build(None if checkpointing == "wrapper" else checkpointing, **options)
    if checkpointing == "wrapper":
        apply_activation_checkpointing(model, check_fn=lambda module: module in set(blocks_of(model)))
    for block in blocks_of(model):
        if side_path_apart and hasattr(block, TalanLayer.child_name):
            fully_shard(block.talan, reshard_after_forward=reshard)
        fully_shard(block, reshard_after_forward=reshard)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    losses = train(model, mine(), use_cache=False)
    saved = {name: tensor.full_tensor() for name, tensor in get_peft_model_state_dict(model).items()}
    check_same(losses, saved, **options)


def fsdp1(policy: str, checkpointing: str | None = None, use_orig_params: bool = True, **options: object) -> None:
    model = build(None if checkpointing == "wrapper" else checkpointing, **options)
    block_class = type(blocks_of(model)[0])
    if policy == "peft":
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = block_class.__name__ + ("" if use_orig_params else ",TalanLayer")
    policies = {
        "blocks": functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={block_class}),
        "side_paths": functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={block_class, TalanLayer}),
        "size": functools.partial(size_based_auto_wrap_policy, min_num_params=5000),
        "peft": fsdp_auto_wrap_policy(model),
    }
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=policies[policy], use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    if checkpointing == "wrapper":
        apply_activation_checkpointing(sharded, check_fn=lambda module: isinstance(module, block_class))
    losses = train(sharded, mine(), use_cache=False)
    with FullyShardedDataParallel.summon_full_params(sharded):
        parts = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
        names = {
            functools.reduce(lambda name, part: name.replace(part, ""), parts, name): tensor.detach().clone()
            for name, tensor in sharded.named_parameters()
        }
        saved = get_peft_model_state_dict(model, state_dict=names)
    check_same(losses, saved, **options)


def load_shared_out(folder: Path, **plan: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=dist.get_world_size(), **plan), dtype=torch.float64
    )


def save_parts(folder: Path, model: PeftModel) -> None:
    """Write the base model and the adapter where `load_parts` finds them."""
    make_base("qwen3").save_pretrained(folder / "base")
    model.save_pretrained(folder / "adapter")


def load_parts(
    folder: Path, dtype: torch.dtype = torch.float64, adapter: str = "adapter", **spelling: object
) -> PeftModel:
    """Load a model as users do, who have a base model and an adapter to go on with.

    Args:
        folder: Where `save_parts` wrote.
        dtype: The weights' dtype.
        adapter: The adapter's folder in there.
        spelling: How `from_pretrained` is asked to share the base model out.
    """
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype, **spelling)
    return PeftModel.from_pretrained(base, folder / adapter, is_trainable=True, autocast_adapter_dtype=False)


def tensor_parallel(
    folder: Path, spelling: dict[str, object], checkpointing: str | None = None, **options: object
) -> None:
    one_process = build(**options)
    if dist.get_rank() == 0:
        save_parts(folder, one_process)
    dist.barrier()
    model = load_parts(folder, **spelling).train()
    assert isinstance(model.get_submodule("base_model.model.model.layers.1.mlp.up_proj.base_layer").weight, DTensor)
    train(one_process, make_tokens(BATCH))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    losses = train(model, make_tokens(BATCH))
    # Every process has all tokens, so each has the whole loss.
    check_same(losses, get_peft_model_state_dict(model), averaged=False, **options)
    own = folder / f"rank{dist.get_rank()}"
    model.save_pretrained(own)
    saved, expected = load_file(own / "adapter_model.safetensors"), get_peft_model_state_dict(one_process)
    assert saved.keys() == expected.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, expected[name], **rounding())
    model.eval()
    one_process.eval()
    prompt = make_tokens(BATCH)
    generated = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, one_process.generate(input_ids=prompt, max_new_tokens=6, do_sample=False))
    dist.barrier()


def tensor_parallel_resumed(folder: Path, **options: object) -> None:
    """Trainer resumes nothing here, so the adapter and each process's optimizer state are kept by hand."""
    one_process = build(**options)
    if dist.get_rank() == 0:
        save_parts(folder, one_process)
    dist.barrier()
    models = {"one process": one_process, "whole": load_parts(folder, tp_plan="auto").train()}
    optimizers = {run: optimizer_of(model, momentum=0.9) for run, model in models.items()}
    for run, model in models.items():
        train(model, make_tokens(BATCH), optimizers[run])
    models["whole"].save_pretrained(folder / "checkpoint", is_main_process=dist.get_rank() == 0)
    state = folder / f"optimizer{dist.get_rank()}.pt"
    torch.save(optimizers["whole"].state_dict(), state)
    dist.barrier()
    models["resumed"] = load_parts(folder, adapter="checkpoint", tp_plan="auto").train()
    optimizers["resumed"] = optimizer_of(models["resumed"], momentum=0.9)
    optimizers["resumed"].load_state_dict(torch.load(state))
    saved = {}
    for run, model in models.items():
        train(model, make_tokens(BATCH, seed=3), optimizers[run])
        saved[run] = get_peft_model_state_dict(model)
    for run in ("whole", "resumed"):
        assert saved[run].keys() == saved["one process"].keys()
        for name, tensor in saved[run].items():
            torch.testing.assert_close(tensor, saved["one process"][name], **rounding())
            assert torch.equal(tensor, saved["whole"][name]), name


def tensor_parallel_merged(folder: Path) -> None:
    """A merged model is shared out as any model is, and all its parameters train."""
    one_process = make_model("qwen3").merge_and_unload().train().requires_grad_(True)
    place = folder / "merged"
    if dist.get_rank() == 0:
        one_process.save_pretrained(place)
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float64, tp_plan="auto").train()
    models, losses = (one_process, model), []
    for one in models:
        # Not the base's: their gradients are shared out, too.
        trained = [parameter for name, parameter in one.named_parameters() if merged_tensor(name) is not None]
        losses.append(train(one, make_tokens(BATCH), torch.optim.SGD(trained, lr=1.0)))
    torch.testing.assert_close(*losses, **rounding())
    state = {name: tensor for name, tensor in model.state_dict().items() if merged_tensor(name) is not None}
    assert state
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, one_process.state_dict()[name], **rounding())


def tensor_parallel_fresh(folder: Path) -> None:
    """Each process draws other random numbers, and still both must hold the same adapter."""
    torch.manual_seed(dist.get_rank())
    # PEFT gives the LoRA weights to all where it draws them as a user would.
    model = get_peft_model(load_shared_out(folder / "base"), make_config(init_lora_weights=True))
    for name, tensor in get_peft_model_state_dict(model).items():
        copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, tensor.contiguous())
        assert torch.equal(*copies), name


def split_tokens_are_refused(folder: Path) -> None:
    base = load_shared_out(folder / "base", tp_plan={"model.layers.*.input_layernorm": "sequence_parallel"})
    with pytest.raises(ValueError, match=r"input_layernorm.*sequence_parallel"):
        get_peft_model(base, make_config())
    assert not any("lora" in name or "talan" in name for name, _ in base.named_modules())


def checks(folder: Path) -> dict[str, Callable[[], None]]:
    run = functools.partial
    return {
        **{f"ddp {name}": run(ddp, **options) for name, options in KINDS.items()},
        "ddp fresh": run(ddp, **FRESH),
        "ddp static graph": run(ddp, static_graph=True, **KINDS["input"]),
        "ddp checkpointing": run(ddp, "non-reentrant"),
        "ddp reentrant checkpointing": run(ddp, "reentrant"),
        **{f"fsdp2 {name}": run(fsdp2, **options) for name, options in KINDS.items()},
        "fsdp2 fresh": run(fsdp2, **FRESH),
        "fsdp2 checkpointing": run(fsdp2, "non-reentrant", **KINDS["input"]),
        "fsdp2 reentrant checkpointing": run(fsdp2, "reentrant"),
        "fsdp2 checkpoint wrapper": run(fsdp2, "wrapper"),
        "fsdp2 kept gathered": run(fsdp2, reshard=False),
        "fsdp2 side path apart": run(fsdp2, side_path_apart=True),
        **{f"fsdp1 {name}": run(fsdp1, "blocks", **options) for name, options in KINDS.items()},
        "fsdp1 checkpointing": run(fsdp1, "blocks", "non-reentrant"),
        "fsdp1 checkpoint wrapper": run(fsdp1, "blocks", "wrapper", **KINDS["input"]),
        "fsdp1 side paths": run(fsdp1, "side_paths", **KINDS["input"]),
        "fsdp1 size": run(fsdp1, "size"),
        "fsdp1 peft": run(fsdp1, "peft"),
        "fsdp1 flat parameters": run(fsdp1, "peft", use_orig_params=False),
        "tp auto": run(tensor_parallel, folder, {"tp_plan": "auto"}, **KINDS["output"]),
        "tp configured auto": run(
            tensor_parallel, folder, {"distributed_config": DistributedConfig(tp_plan="auto")}, **KINDS["input"]
        ),
        "tp checkpointing": run(
            tensor_parallel, folder, {"distributed_config": DistributedConfig(tp_size=2)}, "non-reentrant"
        ),
        "tp resumed": run(tensor_parallel_resumed, folder, **KINDS["input"]),
        "tp merged": run(tensor_parallel_merged, folder),
        "tp fresh": run(tensor_parallel_fresh, folder),
        "tp split tokens": run(split_tokens_are_refused, folder),
    }
