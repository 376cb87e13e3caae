"""Merging: the LoRA weights become weights; the side path stays live, is kept on its blocks, or is dropped."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_talan import TalanLayer, set_talan_strength

from ..small_models import EXPERTS, logits, make_base, make_config, make_model, make_tokens, rounding

HALVES = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


def make_two(half: str) -> PeftModel:
    model = make_model("qwen3", make_config(**HALVES[half]))
    model.add_adapter("second", make_config(**HALVES[half], talan_layers=[0, 1], talan_mixer="linear"))
    return model.to(torch.float64).eval()


def merge(model: PeftModel, **options: object) -> PreTrainedModel:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = model.merge_and_unload(**options)
    # Only what loses the side path says so.
    told = [warning for warning in caught if "can't become weights" in str(warning.message)]
    assert len(told) == (options.get("side_path") == "drop")
    return merged


def break_parameter(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        [p for n, p in model.named_parameters() if name in n][-1].view(-1)[0] = torch.nan


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


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("parameter", ["lora_talan_write", "lora_A"])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_refuses_a_nan_in_either_half_and_changes_nothing(method: str, parameter: str, half: str) -> None:
    model = make_model("qwen3", make_config(**HALVES[half]))
    names = list(model.state_dict())
    break_parameter(model, parameter)
    with pytest.raises(ValueError, match=f"NaNs detected.*default.*{parameter}"):
        getattr(model, method)(safe_merge=True)
    assert list(model.state_dict()) == names
    assert model.get_model_status().merged_adapters == []
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make_base("qwen3")))


def test_safe_merge_looks_at_the_adapters_that_it_merges() -> None:
    model = make_two("lora")
    break_parameter(model, "lora_A.second")
    model.merge_adapter(safe_merge=True)
    assert model.get_model_status().merged_adapters == ["default"]
    with pytest.raises(ValueError, match="second seems to be broken"):
        model.merge_adapter(["second"], safe_merge=True)


@pytest.mark.parametrize("half", ["lora", "rslora"])
def test_adapters_that_are_active_at_once_merge_and_come_back(half: str) -> None:
    """Not with DoRA: PEFT itself divides by the norm of weights into which the first adapter is already merged."""
    model = make_two(half)
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, **rounding())
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, **rounding())
    torch.testing.assert_close(logits(merge(model)), expected, **rounding())


def test_a_merge_beside_a_live_side_path_warns_once() -> None:
    model = make_two("lora")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model.merge_adapter()
            model.unmerge_adapter()
    assert len([warning for warning in caught if "the side path stays live" in str(warning.message)]) == 1


def test_a_merged_adapter_stays_when_its_deletion_is_refused() -> None:
    model = make_two("lora")
    model.merge_adapter()
    expected, names = logits(model), list(model.state_dict())
    with pytest.raises(ValueError, match=r"'default'.*merged"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), expected)
    assert list(model.state_dict()) == names
    model.delete_adapter("second")
    assert torch.equal(logits(model), expected)
    assert model.get_model_status().merged_adapters == ["default"]


UNLOADED: dict[str, dict[str, object]] = {
    **HALVES,
    "alone": {"r": 0},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("kind", UNLOADED)
@pytest.mark.parametrize("disabled", [False, True])
def test_unload_gives_back_every_tensor_and_leaves_no_trace(kind: str, disabled: bool) -> None:
    model = make_model("qwen3", make_config(**UNLOADED[kind]))
    model.add_adapter("second", make_config(**UNLOADED[kind], talan_layers=[0, 1], talan_position="input"))
    model.base_model.set_adapter("second" if kind in ("modules to save", "tokens") else ["default", "second"])
    if disabled:
        model.base_model.disable_adapter_layers()
    logits(model.to(torch.float64))
    unloaded, untouched = model.unload(), make_base("qwen3")
    assert traces(unloaded) == traces(untouched)
    state, expected = unloaded.state_dict(), untouched.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert torch.equal(logits(unloaded), logits(untouched))


def traces(model: nn.Module) -> list[tuple[object, ...]]:
    """All that an adapter could leave: modules, hooks and attributes."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return [
        (name, type(m), *(len(getattr(m, kind)) for kind in kinds), sorted(m.__dict__))
        for name, m in model.named_modules()
    ]


def test_an_adapter_that_is_off_is_kept_live_as_its_low_rank_half_is() -> None:
    model = make_model("qwen3")
    expected = logits(model)
    model.base_model.disable_adapter_layers()
    torch.testing.assert_close(logits(merge(model)), expected, **rounding())


def test_keep_gives_the_adapters_outputs_without_peft(architecture: str) -> None:
    model = make_model(architecture)
    expected = logits(model)
    kept = merge(model)
    assert type(kept) is type(make_base(architecture))
    torch.testing.assert_close(logits(kept), expected, **rounding())
    added = set(kept.state_dict()) - set(make_base(architecture).state_dict())
    assert added
    assert all(".merged_side_paths_0." in name for name in added)
    assert not any(parameter.requires_grad for name, parameter in kept.named_parameters() if name in added)


@pytest.mark.parametrize("half", HALVES)
def test_kept_folder_gives_back_exactly_that_model(half: str, tmp_path: Path) -> None:
    kept = merge(make_model("qwen3", make_config(**HALVES[half], modules_to_save=["lm_head"]), torch.float32))
    kept.save_pretrained(tmp_path)
    files = {"config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == files
    assert set(load_file(tmp_path / "model.safetensors")) == set(kept.state_dict())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(kept))
    assert set(loaded.state_dict()) == set(kept.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kept_folder_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    make_base("qwen3", dtype).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    kept = merge(get_peft_model(base, make_config(talan_mixer="mlp")).eval())
    kept.save_pretrained(tmp_path / "kept")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=dtype).eval()
    state, expected = loaded.state_dict(), kept.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) and state[name].dtype == dtype for name, tensor in expected.items())
    assert torch.equal(logits(loaded), logits(kept))


def test_kept_folder_of_every_architecture(architecture: str, tmp_path: Path) -> None:
    kept = merge(make_model(architecture, dtype=torch.float32))
    kept.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **EXPERTS).eval()
    assert torch.equal(logits(loaded), logits(kept))
    named = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name for name in kept.state_dict() if ".merged_side_paths_0." in name} <= named.keys()


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
    assert set(kept.state_dict()) - set(make_base("qwen3").state_dict())
    set_talan_strength(kept, 1.0, adapter_name="second")
    with pytest.raises(ValueError, match="no side path is named so; there are 'second'"):
        set_talan_strength(kept, 1.0, adapter_name="default")


def test_several_active_adapters_are_kept_and_saved(tmp_path: Path) -> None:
    model = make_two("lora")
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model)
    kept = merge(model)
    torch.testing.assert_close(logits(kept), expected, **rounding())
    kept.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(logits(loaded), logits(kept))
    set_talan_strength(loaded, 1.0, adapter_name="second")


def test_a_wrong_choice_touches_nothing() -> None:
    model = make_model("qwen3")
    expected = logits(model)
    with pytest.raises(ValueError, match=r"side_path='half'.*'keep' or 'drop'"):
        model.merge_and_unload(side_path="half")
    assert torch.equal(logits(model), expected)
