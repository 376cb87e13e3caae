"""Blocks whose weights wait on the CPU or on disk, by accelerate's hooks: the same result as without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from ..small_models import DEPTH, make_base, make_config, make_model, make_tokens

KINDS: dict[str, dict[str, object]] = {
    "output": {},
    "input": {"talan_position": "input", "talan_writeback": "gated", "talan_mixer": "mlp"},
}
OUTER = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


def device_map_with(disk: int) -> dict[str, str]:
    """Every second block on disk, from this one on; the side paths are at blocks 1 and 3."""
    return {**OUTER, **{f"model.layers.{index}": "disk" if index % 2 == disk else "cpu" for index in range(DEPTH)}}


def on_cpu(base: nn.Module, folder: Path) -> None:
    cpu_offload(base, execution_device=torch.device("cpu"))


def on_disk(base: nn.Module, folder: Path) -> None:
    disk_offload(base, str(folder), execution_device=torch.device("cpu"))


def by_device_map(base: nn.Module, folder: Path) -> None:
    dispatch_model(base, device_map_with(disk=1), main_device="cpu", offload_dir=str(folder))


OFFLOADS = {"cpu": on_cpu, "disk": on_disk, "device_map": by_device_map}


def check_same(model: PeftModel, expected: PeftModel) -> None:
    tokens = make_tokens()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
        with model.disable_adapter(), expected.disable_adapter():
            assert torch.equal(model(tokens).logits, expected(tokens).logits)
    how = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(input_ids=tokens, **how), expected.generate(input_ids=tokens, **how))


def offloaded(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offload", OFFLOADS)
def test_adapter_before_offload(offload: str, kind: str, tmp_path: Path) -> None:
    model = make_model("qwen3", make_config(**KINDS[kind]))
    OFFLOADS[offload](model.base_model.model, tmp_path)
    assert any(".talan." in name for name in offloaded(model))
    check_same(model, make_model("qwen3", make_config(**KINDS[kind])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offload", OFFLOADS)
def test_side_path_after_offload(offload: str, kind: str, tmp_path: Path) -> None:
    # Alone: PEFT puts the weights of new LoRA layers where the base weights are, on `meta`, and so loses them.
    expected = make_model("qwen3", make_config(r=0, **KINDS[kind]), dtype=torch.float32)
    base = make_base("qwen3", torch.float32)
    OFFLOADS[offload](base, tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(base, make_config(r=0, **KINDS[kind])).eval()
    assert offloaded(model)
    check_same(model, expected)


def load_onto(device_map: dict[str, str], folder: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=device_map, offload_folder=folder / "weights"
    )
    within = {f"base_model.model.{name}": device for name, device in device_map.items()}
    return PeftModel.from_pretrained(base, folder / "adapter", device_map=within, offload_folder=str(folder / "more"))


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_onto_a_device_map(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # PEFT writes the offloaded weights below the working folder.
    expected = make_model("qwen3", make_config(**KINDS[kind]), dtype=torch.float32)
    expected.save_pretrained(tmp_path / "adapter")
    make_base("qwen3", torch.float32).save_pretrained(tmp_path / "base")
    model = load_onto(device_map_with(disk=0), tmp_path)
    assert offloaded(model)
    check_same(model, expected)
    # PEFT writes the tensors of layers with base weights into the files on disk, and no others.
    with pytest.raises(ValueError, match=r"device_map: block 1 is on the disk.*adapter 'default'.*'cpu'"):
        load_onto(device_map_with(disk=1), tmp_path)(make_tokens())
