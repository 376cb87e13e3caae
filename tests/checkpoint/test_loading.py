"""Loading: the header is checked before the model is touched, values once, and a failure leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.utils.save_and_load
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Qwen3Config

from peft_talan import TalanConfig

from ..bad_input.entrances import assert_unchanged, picture
from ..small_models import CONFIGS, logits, make_base, make_config, make_lora_config, make_model

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_model("qwen3", make_config(modules_to_save=["lm_head"]), torch.float32).save_pretrained(folder)
    return folder


def with_change(saved: Path, folder: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    tensors = load_file(saved / WEIGHTS)
    name = next(name for name in sorted(tensors) if part in name)
    tensors[name] = change(tensors[name])
    (folder / "adapter_config.json").write_bytes((saved / "adapter_config.json").read_bytes())
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def counting(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Count the calls of a function of PEFT's."""
    calls: list[str] = []
    function = getattr(owner, name)
    plain = getattr(function, "__func__", function)

    def count(*args: object, **kwargs: object) -> object:
        calls.append(name)
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, classmethod(count) if plain is not function else count)
    return calls


def test_file_is_read_and_names_are_mapped_as_often_as_for_lora(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("qwen3", make_lora_config(), torch.float32).save_pretrained(tmp_path)
    calls = {
        "reads": counting(monkeypatch, peft.utils.save_and_load, "safe_load_file"),
        "maps": counting(monkeypatch, BaseTuner, "_remap_adapter_state_dict_for_load"),
    }
    counts = []
    for folder in (tmp_path, saved):
        PeftModel.from_pretrained(make_base("qwen3", torch.float32), folder)
        counts.append({kind: len(made) for kind, made in calls.items()})
        for made in calls.values():
            made.clear()
    assert counts == 2 * [{"reads": 1, "maps": 1}]


@pytest.mark.parametrize("part", ["lora_talan_read", "lora_talan_write"])
@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_header_is_refused_before_anything_is_injected(
    part: str, change: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"shape": lambda tensor: tensor[:-1].clone(), "dtype": lambda tensor: tensor.to(torch.int32)}
    folder = with_change(saved, tmp_path, part, changes[change])
    injected = counting(monkeypatch, LoraModel, "inject_adapter")
    with pytest.raises(ValueError, match=part):
        PeftModel.from_pretrained(make_base("qwen3", torch.float32), folder)
    assert not injected


def with_checkpointing() -> PreTrainedModel:
    base = make_base("qwen3", torch.float32)
    base.gradient_checkpointing_enable()
    return base


def classifier() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(**{**CONFIGS["qwen3"].to_dict(), "num_labels": 2})
    return AutoModelForSequenceClassification.from_config(config)


def with_another_adapter() -> PeftModel:
    return make_model("qwen3", dtype=torch.float32)


ENTRANCES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Path], object]]] = {
    "from_pretrained": (lambda: make_base("qwen3", torch.float32), PeftModel.from_pretrained),
    "gradient checkpointing": (with_checkpointing, PeftModel.from_pretrained),
    "load_adapter": (with_another_adapter, lambda model, folder: model.load_adapter(folder, "new")),
    "load_adapter, to train": (
        with_another_adapter,
        lambda model, folder: model.load_adapter(folder, "new", is_trainable=True),
    ),
}
VALUES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "NaN in the side path": ("lora_talan_read", lambda tensor: tensor.fill_(torch.nan)),
    "infinity in the LoRA weights": ("lora_A", lambda tensor: tensor.fill_(torch.inf)),
    "NaN in a module that is saved whole": ("lm_head", lambda tensor: tensor.fill_(torch.nan)),
    "shape of the LoRA weights": ("lora_B", lambda tensor: tensor[:-1].clone()),
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_what_is_found_as_the_values_are_loaded_is_taken_back(
    entrance: str, value: str, saved: Path, tmp_path: Path
) -> None:
    folder = with_change(saved, tmp_path, *VALUES[value])
    make, load = ENTRANCES[entrance]
    model = make()
    before = picture(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="checkpoint of adapter"):
            load(model, folder)
        assert_unchanged(model, before)
    load(model, saved)


def test_a_classifier_is_taken_back(tmp_path: Path) -> None:
    get_peft_model(classifier(), make_config(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    with_change(tmp_path, tmp_path, "score", lambda tensor: tensor.fill_(torch.nan))
    model = classifier()
    before = picture(model)
    with pytest.raises(ValueError, match="NaN"):
        PeftModel.from_pretrained(model, tmp_path)
    assert_unchanged(model, before)


def test_an_adapter_that_has_run_is_not_taken_back(saved: Path) -> None:
    model = get_peft_model(make_base("qwen3", torch.float32), TalanConfig.from_pretrained(saved))
    logits(model)
    before = picture(model)
    tensors = get_peft_model_state_dict(model)
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match="NaN"):
        set_peft_model_state_dict(model, broken)
    assert_unchanged(model, before)
