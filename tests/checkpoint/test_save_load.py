"""Invariant 5: what is saved and loaded is what was trained, bitwise."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_talan import TalanConfig

from ..small_models import (
    VOCABULARY,
    logits,
    make_base,
    make_config,
    make_lora_config,
    make_model,
    make_several,
    make_tokens,
)

KINDS = {
    "lora": {},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"use_rslora": True},
    "gated mlp": {"talan_mixer": "mlp", "talan_writeback": "gated", "talan_position": "input"},
    "linear": {"talan_mixer": "linear", "talan_layers": [0.3, 0.9], "talan_soft_cap": 10},
    "delta": {"talan_mixer": "delta"},
    "alone": {"r": 0},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "modules to save": {"modules_to_save": ["lm_head"]},
}


def train_a_step(model: PeftModel) -> None:
    model.train()
    tokens = make_tokens()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    optimizer.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_is_what_was_trained(kind: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = make_model("qwen3", make_config(**KINDS[kind]), torch.float32)
    train_a_step(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        make_base("qwen3", torch.float32), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    saved, again = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[key], again[key]) for key in saved)
    assert torch.equal(logits(loaded), logits(model))
    assert not [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]


def test_every_architecture_comes_back(architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(architecture, torch.float32), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_auto_class_and_second_name(tmp_path: Path) -> None:
    make_base("qwen3", torch.float32).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = make_model("qwen3", dtype=torch.float32)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", adapter_name="first")
    loaded.load_adapter(tmp_path / "adapter", adapter_name="second")
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), logits(model))


def test_a_pickle_file_comes_back(tmp_path: Path) -> None:
    model = make_model("qwen3", make_config(use_dora=True, talan_writeback="gated"), torch.float32)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.safetensors"))
    loaded = PeftModel.from_pretrained(make_base("qwen3", torch.float32), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_chosen_adapters_are_saved(tmp_path: Path) -> None:
    model = make_several({"default": {}, "first": {"talan_layers": [0]}, "second": {"r": 0}})
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "second"]
    with pytest.raises(ValueError, match="nobody"):
        model.save_pretrained(tmp_path, selected_adapters=["nobody"])
    model.set_adapter("second")
    loaded = PeftModel.from_pretrained(make_base("qwen3"), tmp_path / "second").to(torch.float64)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("embeddings", ["auto", True, False])
@pytest.mark.parametrize("resized", [False, True])
def test_embeddings_are_saved_where_lora_saves_them(embeddings: bool | str, resized: bool, tmp_path: Path) -> None:
    saved = {}
    for kind, config in (("talan", make_config()), ("lora", make_lora_config())):
        base = make_base("qwen3", torch.float32)
        if resized:
            base.resize_token_embeddings(VOCABULARY + 3)
        model = get_peft_model(base, config).eval()
        model.save_pretrained(tmp_path / kind, save_embedding_layers=embeddings)
        saved[kind] = load_file(tmp_path / kind / "adapter_model.safetensors")
        base = make_base("qwen3", torch.float32)
        if resized:
            base.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
        loaded = PeftModel.from_pretrained(base, tmp_path / kind)
        if embeddings is True or not resized:
            assert torch.equal(logits(loaded), logits(model))
    assert {key for key in saved["talan"] if ".talan." not in key} == saved["lora"].keys()
    assert any("embed_tokens" in key for key in saved["talan"]) == (embeddings is True)


def test_keys_are_mapped_to_a_model_with_other_names(tmp_path: Path) -> None:
    model = make_model("qwen3", make_config(task_type=None, target_modules=["q_proj", "down_proj"]), torch.float32)
    model.save_pretrained(tmp_path)
    other = Wrapped(make_base("qwen3", torch.float32))
    with pytest.raises(ValueError, match="no place for"):
        PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
    loaded = PeftModel.from_pretrained(other, tmp_path, key_mapping={"^model": "inner.model"})
    assert torch.equal(logits(loaded), logits(model))


class Wrapped(nn.Module):
    """A model inside of another one: all names are longer."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def forward(self, input_ids: torch.Tensor) -> object:
        return self.inner(input_ids)


def test_ephemeral_offload_changes_nothing_where_all_is_on_one_device(tmp_path: Path) -> None:
    model = make_model("qwen3", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base("qwen3", torch.float32), tmp_path, ephemeral_gpu_offload=True)
    assert loaded.peft_config["default"].runtime_config.ephemeral_gpu_offload
    assert torch.equal(logits(loaded), logits(model))


def test_loaded_to_train_goes_on_as_if_never_saved(tmp_path: Path) -> None:
    model = make_model("qwen3", make_config(talan_trainable="side_path"), torch.float32)
    train_a_step(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base("qwen3", torch.float32), tmp_path, is_trainable=True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trainable
    for one in (model, loaded):
        train_a_step(one)
    assert torch.equal(logits(loaded), logits(model))


def test_config_comes_back_field_by_field(tmp_path: Path) -> None:
    config = make_config(
        talan_layers=[0.25, 1.0],
        talan_position="input",
        talan_mixer="mlp",
        talan_writeback="capped",
        talan_cap=0.25,
        talan_alpha=0.5,
        talan_dropout=0.1,
        talan_trainable="writeback",
        talan_grad_scale=2.0,
    )
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, TalanConfig)
    assert again.to_dict() == {**config.to_dict(), "inference_mode": again.inference_mode}


def rewrite(folder: Path, change: str) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in sorted(tensors) if "lora_talan_read" in key)
    if change == "missing":
        del tensors[next(key for key in sorted(tensors) if "lora_A" in key)]
    elif change == "extra":
        tensors[key.replace("lora_talan_read", "lora_talan_gate")] = torch.zeros(3)
    elif change == "misshaped":
        tensors[key] = tensors[key][:, :-1].clone()
    elif change == "nan":
        tensors[key][0, 0] = torch.nan
    elif change == "infinite":
        tensors[key][0, 0] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("change", ["extra", "misshaped", "nan", "infinite"])
def test_a_checkpoint_that_does_not_fit_is_not_loaded_silently(
    change: str, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    make_model("qwen3", dtype=torch.float32).save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises((ValueError, RuntimeError), match="lora_talan_"):
        PeftModel.from_pretrained(make_base("qwen3", torch.float32), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_missing_low_rank_tensor_is_reported_by_peft(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    make_model("qwen3", dtype=torch.float32).save_pretrained(tmp_path)
    rewrite(tmp_path, "missing")
    with pytest.warns(UserWarning, match="missing adapter keys.*lora_A"):
        PeftModel.from_pretrained(make_base("qwen3", torch.float32), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    make_model("qwen3", dtype=torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"[Ii]ncomplete|[Ii]nvalid"):
        PeftModel.from_pretrained(make_base("qwen3", torch.float32), tmp_path)


def test_bad_field_in_a_saved_config_is_named(tmp_path: Path) -> None:
    make_model("qwen3", dtype=torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "talan_mixer": "blender"}))
    with pytest.raises(ValueError, match="talan_mixer='blender'"):
        PeftModel.from_pretrained(make_base("qwen3", torch.float32), tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_a_half_precision_file_is_loaded_in_the_dtype_of_lora(
    base_dtype: torch.dtype, autocast: bool, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    make_model("qwen3", dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(
        make_base("qwen3", base_dtype),
        tmp_path,
        is_trainable=True,
        autocast_adapter_dtype=autocast,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    side_path = {parameter.dtype for name, parameter in trained.items() if ".talan." in name}
    assert side_path == {parameter.dtype for name, parameter in trained.items() if ".talan." not in name}
