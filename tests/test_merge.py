"""Merging: the low-rank half becomes weights; the side path stays live, is kept on its blocks, or is dropped."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_talan import TalanLayer

from .small_models import EXPERTS, make_base, make_config, make_lora_config, make_model, make_tokens, rounding

HALVES = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(make_tokens()).logits


def make_two(half: str) -> PeftModel:
    model = make_model("qwen3", make_config(**HALVES[half]))
    model.add_adapter("second", make_config(**HALVES[half], talan_layers=[0, 1], talan_mixer="linear"))
    return model.to(torch.float64).eval()


def merge(model: PeftModel, **options: object) -> PreTrainedModel:
    with pytest.warns(UserWarning, match="can't become weights") as caught:
        merged = model.merge_and_unload(**options)
    assert len([warning for warning in caught if "side path" in str(warning.message)]) == 1
    return merged


def break_parameter(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if name in n).view(-1)[0] = torch.nan


@pytest.mark.parametrize("half", HALVES)
def test_merged_adapters_keep_the_outputs_and_come_back(half: str) -> None:
    model = make_two(half)
    for names in ("default", "second"):
        model.set_adapter(names)
        expected, base_logits = logits(model), logits(make_base("qwen3"))
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(logits(model), expected, **rounding())
        with pytest.raises(ValueError, match="merged"):
            model.delete_adapter(names)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), expected, **rounding())
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), base_logits, **rounding())


def test_merging_twice_warns_and_changes_nothing() -> None:
    model = make_model("qwen3")
    model.merge_adapter()
    expected = logits(model)
    with pytest.warns(UserWarning, match="[Aa]lready"):
        model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    expected = logits(model)
    with pytest.warns(UserWarning, match="[Aa]lready"):
        model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("parameter", ["lora_talan_write", "lora_A"])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_refuses_a_nan_in_either_half(method: str, parameter: str) -> None:
    model = make_model("qwen3")
    break_parameter(model, parameter)
    with pytest.raises(ValueError, match="NaNs detected"):
        getattr(model, method)(safe_merge=True)


def test_keep_gives_the_adapters_outputs_without_peft(architecture: str) -> None:
    model = make_model(architecture)
    expected = logits(model)
    kept = merge(model)
    assert type(kept) is type(make_base(architecture))
    torch.testing.assert_close(logits(kept), expected, **rounding())
    added = set(kept.state_dict()) - set(make_base(architecture).state_dict())
    assert added
    assert all(".talan.lora_talan_" in name for name in added)
    assert not any(parameter.requires_grad for name, parameter in kept.named_parameters() if name in added)


@pytest.mark.parametrize("half", HALVES)
def test_kept_folder_gives_back_exactly_that_model(half: str, tmp_path: Path) -> None:
    kept = merge(make_model("qwen3", make_config(**HALVES[half], modules_to_save=["lm_head"]), torch.float32))
    kept.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(make_base("qwen3").state_dict())
    assert all(".talan." in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(kept))
    assert set(loaded.state_dict()) == set(kept.state_dict())


def test_kept_folder_of_every_architecture(architecture: str, tmp_path: Path) -> None:
    kept = merge(make_model(architecture, dtype=torch.float32))
    kept.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **EXPERTS).eval()
    assert torch.equal(logits(loaded), logits(kept))


def test_kept_model_generates_as_the_adapter() -> None:
    model = make_model("qwen3")
    prompt = {"input_ids": make_tokens(tokens=7), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**prompt)
    assert torch.equal(merge(model).generate(**prompt), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_kept_model_save_themselves(copied: object, tmp_path: Path) -> None:
    kept = merge(make_model("qwen3", dtype=torch.float32))
    twin = copied(kept)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    twin.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(twin))
    assert not torch.allclose(logits(twin), logits(kept))


def test_kept_side_path_is_switched_and_deleted_by_transformers(tmp_path: Path) -> None:
    kept = merge(make_model("qwen3", dtype=torch.float32))
    with_side_path = logits(kept)
    kept.disable_adapters()
    low_rank_alone = logits(kept)
    assert not torch.allclose(low_rank_alone, with_side_path)
    kept.enable_adapters()
    assert torch.equal(logits(kept), with_side_path)
    kept.delete_adapter("default")
    assert torch.equal(logits(kept), low_rank_alone)
    kept.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), low_rank_alone)
    assert not (tmp_path / "adapter_config.json").exists()


def test_drop_is_the_merged_low_rank_half_alone() -> None:
    plain = merge(make_model("qwen3"), side_path="drop")
    reference = make_model("qwen3", make_config(talan_alpha=0.0)).merge_and_unload(side_path="drop")
    assert torch.equal(logits(plain), logits(reference))
    assert set(plain.state_dict()) == set(make_base("qwen3").state_dict())
    assert not any(isinstance(module, TalanLayer) for module in plain.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def test_chosen_adapters_are_kept_and_the_others_removed() -> None:
    model = make_two("lora")
    model.set_adapter("second")
    expected = logits(model)
    model.set_adapter("default")
    kept = merge(model, adapter_names=["second"])
    torch.testing.assert_close(logits(kept), expected, **rounding())
    assert list(kept.peft_config) == ["second"]
    assert not any(".default" in name for name in kept.state_dict())


def test_several_active_adapters_are_kept_but_not_saved_as_one(tmp_path: Path) -> None:
    model = make_two("lora")
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    kept = merge(model)
    torch.testing.assert_close(logits(kept), expected, **rounding())
    with pytest.raises(ValueError, match="one side path only"):
        kept.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_wrong_choice_touches_nothing() -> None:
    model = make_model("qwen3")
    expected = logits(model)
    with pytest.raises(ValueError, match=r"side_path='half'.*'keep' or 'drop'"):
        model.merge_and_unload(side_path="half")
    assert torch.equal(logits(model), expected)


def test_kept_model_takes_a_new_adapter() -> None:
    kept = merge(make_model("qwen3"))
    expected = logits(kept)
    kept.add_adapter(make_lora_config(), "more")
    kept.set_adapter(["default", "more"])
    torch.testing.assert_close(logits(kept), expected, **rounding())
