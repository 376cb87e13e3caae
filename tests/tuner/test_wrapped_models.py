"""Models whose parts others wrap or move: FSDP, torch.compile and the like, and accelerate's offloading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.utils import compile_regions
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from peft_talan import export_lora

from ..small_models import DEPTH, logits, make_base, make_config, make_lora_config, make_model, make_tokens

CPU = torch.device("cpu")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*NO_SHARD.*:UserWarning")
def test_state_dict_of_a_model_that_fsdp_wraps(one_process: None) -> None:
    model = make_model("qwen3", make_config(modules_to_save=["lm_head"]), torch.float32)
    expected, state = logits(model), get_peft_model_state_dict(model)
    state = {key: tensor.clone() for key, tensor in state.items()}
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert torch.equal(logits(wrapped), expected)
    gathered = get_peft_model_state_dict(wrapped)
    assert gathered.keys() == state.keys()
    assert all(torch.equal(gathered[key], state[key]) for key in state)


@pytest.mark.filterwarnings("ignore:.*NO_SHARD.*:UserWarning")
@pytest.mark.parametrize("given", [False, True])
def test_state_dict_of_a_model_whose_blocks_fsdp_wraps(given: bool, one_process: None, tmp_path: Path) -> None:
    model = make_model("qwen3", make_config(use_dora=True, bias="lora_only"), torch.float32)
    model.add_adapter("other", make_config(r=0, talan_layers=[0]))
    expected, state = logits(model), get_peft_model_state_dict(model)
    state = {key: tensor.clone() for key, tensor in state.items()}
    blocks = partial(transformer_auto_wrap_policy, transformer_layer_cls={Qwen3DecoderLayer})
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=blocks
    )
    assert torch.equal(logits(wrapped), expected)
    gathered = get_peft_model_state_dict(model, wrapped.state_dict()) if given else get_peft_model_state_dict(wrapped)
    assert gathered.keys() == state.keys()
    assert all(torch.equal(gathered[key], state[key]) for key in state)
    model.save_pretrained(tmp_path, state_dict=wrapped.state_dict(), selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(make_base("qwen3", torch.float32), tmp_path)
    assert torch.equal(logits(loaded), expected)


def compile_blocks(model: nn.Module) -> nn.Module:
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block)
    return model


def checkpoint_blocks(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Qwen3DecoderLayer))
    return model


def share_blocks(model: nn.Module) -> nn.Module:
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for index, block in enumerate(blocks):
        blocks[index] = nn.parallel.DistributedDataParallel(block)
    return model


# They wrap modules, and nothing runs: their names in a state dict are what matters here.
WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "regions": compile_regions,
    "compiled blocks": compile_blocks,
    "whole and blocks": lambda model: torch.compile(compile_blocks(model)),
    "checkpointed blocks": checkpoint_blocks,
    "data-parallel blocks": share_blocks,
    "compiled and checkpointed": lambda model: compile_blocks(checkpoint_blocks(model)),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_names_of_wrappers_are_in_no_file(wrap: str, one_process: None, tmp_path: Path) -> None:
    whole = [] if "checkpointed" in wrap else ["lm_head"]  # PEFT itself can't save these under a checkpointed block
    model = make_model("qwen3", make_config(modules_to_save=whole, use_dora=True), torch.float32)
    expected, names = logits(model), set(get_peft_model_state_dict(model))
    export_lora(model, tmp_path / "exported before")
    wrapped = WRAPS[wrap](model)
    wrapped.save_pretrained(tmp_path / "adapter")
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == names
    export_lora(wrapped, tmp_path / "exported")
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("exported before", "exported")]
    assert files[0].keys() == files[1].keys()
    loaded = PeftModel.from_pretrained(make_base("qwen3", torch.float32), tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_merged_model_is_saved_as_any_other_and_its_side_path_is_never_lost(
    wrap: str, one_process: None, tmp_path: Path
) -> None:
    """transformers writes the names of some wrappers into a model's file, and then finds no place for its tensors."""
    plain, merged = make_base("qwen3", torch.float32), make_model("qwen3", dtype=torch.float32).merge_and_unload()
    expected = logits(merged)
    for name, model in (("plain", plain), ("merged", merged)):
        model.requires_grad_(True)  # DistributedDataParallel wraps what trains
        WRAPS[wrap](model).save_pretrained(tmp_path / name)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    if report["missing_keys"]:
        with pytest.raises(ValueError, match="is not in its weights"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    else:
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected)


def test_a_state_dict_of_the_wrapper_around_the_whole_model(one_process: None, tmp_path: Path) -> None:
    model = make_model("qwen3", dtype=torch.float32)
    whole = nn.parallel.DistributedDataParallel(model)
    model.save_pretrained(tmp_path, state_dict=whole.state_dict())
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(get_peft_model_state_dict(model))


def test_an_adapter_is_loaded_into_compiled_blocks(tmp_path: Path) -> None:
    model = make_model("qwen3", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    other = compile_blocks(make_model("qwen3", make_config(init_talan_weights=True), torch.float32))
    assert not set_peft_model_state_dict(other, load_file(tmp_path / "adapter_model.safetensors")).unexpected_keys
    state, loaded = get_peft_model_state_dict(model), get_peft_model_state_dict(other)
    assert all(torch.equal(state[name], loaded[name]) for name in state)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_adapters_that_are_offloaded_between_calls(kind: str, tmp_path: Path) -> None:
    config = make_config(talan_mixer="mlp", talan_writeback="gated")
    model = make_model("qwen3", config, torch.float32)
    greedy = {"input_ids": make_tokens(), "max_new_tokens": 6, "do_sample": False}
    expected, generated = logits(model), model.generate(**greedy)
    if kind == "cpu":
        cpu_offload(model, execution_device=CPU)
    else:
        disk_offload(model, tmp_path, execution_device=CPU)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), expected)
    assert torch.equal(model.generate(**greedy), generated)
    assert all(parameter.is_meta for parameter in model.parameters())


BLOCKS_ON_DISK = (1, 3)


def on_disk(place: str = "") -> dict[str, str]:
    rest = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    blocks = {f"{place}model.layers.{i}": "disk" if i in BLOCKS_ON_DISK else "cpu" for i in range(DEPTH)}
    return {**{f"{place}{name}": "cpu" for name in rest}, **blocks}


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_base("qwen3", torch.float32).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    (tmp_path / "offloaded").mkdir()
    monkeypatch.chdir(tmp_path)  # PEFT writes the offloaded weights below the working folder.
    return tmp_path


def load_with_blocks_on_disk(disk: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(disk / "base", device_map=on_disk(), offload_folder=disk / "offloaded")
    assert torch.equal(logits(base), logits(make_base("qwen3", torch.float32)))
    return PeftModel.from_pretrained(
        base, disk / "adapter", device_map=on_disk("base_model.model."), offload_dir=str(disk / "offloaded")
    )


@pytest.mark.parametrize("kind", ["talan", "lora"])
def test_base_with_blocks_on_disk(kind: str, disk: Path) -> None:
    config = make_config(talan_layers=[0, 2]) if kind == "talan" else make_lora_config(init_lora_weights=False)
    model = make_model("qwen3", config, torch.float32)
    model.save_pretrained(disk / "adapter")
    loaded = load_with_blocks_on_disk(disk)
    assert torch.equal(logits(loaded), logits(model))
    greedy = {"input_ids": make_tokens(), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(**greedy), model.generate(**greedy))


def test_a_side_path_on_a_block_that_is_on_disk_is_refused(disk: Path) -> None:
    make_model("qwen3", make_config(talan_layers=[0, 1]), torch.float32).save_pretrained(disk / "adapter")
    loaded = load_with_blocks_on_disk(disk)
    with pytest.raises(ValueError, match=r"device_map: block 1 is on the disk.*adapter 'default'.*'cpu'"):
        logits(loaded)
