"""Several adapters on one model: each is what it would be alone, and PEFT's LoRA is the yardstick for all else."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from peft_talan import TalanLayer

from ..small_models import (
    logits,
    make_base,
    make_config,
    make_lora_config,
    make_model,
    make_several,
    make_tokens,
    rounding,
)

KINDS: dict[str, dict[str, object]] = {
    "default": {"talan_layers": [0, -1]},
    "linear": {"talan_layers": [1], "talan_mixer": "linear", "talan_slots": 7, "talan_position": "input", "r": 2},
    "mixing": {"talan_layers": [0, 1, 2], "talan_mixer": "mlp", "talan_dim": 3, "target_modules": ["v_proj"]},
    "alone": {"talan_layers": [2], "talan_writeback": "gated", "r": 0},
}


def blocks_with_side_path(model: nn.Module) -> list[int]:
    return [layer.block_index for layer in model.modules() if isinstance(layer, TalanLayer)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_is_what_it_would_be_alone(kind: str) -> None:
    model = make_several(KINDS)
    model.set_adapter(kind)
    alone = make_model("qwen3", make_config(**KINDS[kind]))
    set_peft_model_state_dict(alone, get_peft_model_state_dict(model, adapter_name=kind))
    assert torch.equal(logits(model), logits(alone))


def test_a_deleted_adapter_leaves_no_trace_and_its_name_is_free() -> None:
    model, without = make_several(KINDS), make_several({name: KINDS[name] for name in ("default", "linear", "mixing")})
    for name in ("linear", "mixing", "alone"):
        model.delete_adapter(name)
    without.delete_adapter("linear")
    without.delete_adapter("mixing")
    assert blocks_with_side_path(model) == [0, 3]
    assert list(model.state_dict()) == list(without.state_dict())
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    assert sum(hooks.values()) == 6, "two hooks at each block that has a side path, and two at the decoder"
    model.add_adapter("linear", make_config(**KINDS["mixing"]))
    model.set_adapter("linear")
    assert model.get_model_status().active_adapters == ["linear"]
    assert blocks_with_side_path(model) == [0, 1, 2, 3]


@pytest.mark.parametrize("active", ["default", ["default", "linear"], ["mixing", "default"]])
def test_deleting_an_active_adapter_leaves_the_one_active_that_lora_would(active: str | list[str]) -> None:
    talan = make_several({name: options for name, options in KINDS.items() if name != "alone"})
    lora = make_model("qwen3", make_lora_config())
    for name in ("linear", "mixing"):
        lora.add_adapter(name, make_lora_config())
    for model in (talan, lora):
        model.base_model.set_adapter(active)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PEFT warns of the adapter that it chooses
            model.delete_adapter("default")
    assert talan.get_model_status().active_adapters == lora.get_model_status().active_adapters
    assert talan.get_model_status().requires_grad == lora.get_model_status().requires_grad
    expected = logits(talan)
    talan.base_model.set_adapter(lora.active_adapters)
    assert torch.equal(logits(talan), expected)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_a_side_path_alone_takes_over_when_the_last_low_rank_half_goes(saved: list[str] | None) -> None:
    kinds = {name: {**KINDS[name], "modules_to_save": saved} for name in ("default", "alone")}
    model = make_several(kinds)
    if saved:
        with torch.no_grad():
            model.get_output_embeddings().modules_to_save["alone"].weight.mul_(1.5)
    model.set_adapter("alone")
    expected = logits(model)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["alone"]
    assert torch.equal(logits(model), expected)


def test_only_an_adapter_that_exists_is_deleted() -> None:
    model = make_several(KINDS)
    expected, names = logits(model), list(model.state_dict())
    with pytest.raises(ValueError, match="nobody does not exist"):
        model.delete_adapter("nobody")
    assert torch.equal(logits(model), expected)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("name", ["", "a.b", "__base__", "keys", "forward"])
def test_a_name_that_no_adapter_can_have_is_refused_before_the_model_is_touched(name: str) -> None:
    base = make_base("qwen3")
    before = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=f"adapter_name={name!r}"):
        get_peft_model(base, make_config(), adapter_name=name)
    assert [type(module) for module in base.modules()] == before
    model = make_model("qwen3")
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=f"adapter_name={name!r}"):
        model.add_adapter(name, make_config(r=0))
    assert list(model.state_dict()) == names
    assert list(model.peft_config) == ["default"]


def test_a_second_bias_is_refused_before_the_model_is_touched() -> None:
    model = make_model("gpt2", make_config(bias="all"))
    expected, names = logits(model), list(model.state_dict())
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", make_config(bias="all"))
    assert list(model.state_dict()) == names
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


def test_adapters_of_different_blocks_are_active_at_once() -> None:
    model = make_several({"default": {"talan_layers": [1], "r": 0}, "other": {"talan_layers": [2], "r": 0}})
    both = make_model("qwen3", make_config(talan_layers=[1, 2], r=0))
    state = {**get_peft_model_state_dict(model), **get_peft_model_state_dict(model, adapter_name="other")}
    set_peft_model_state_dict(both, state)
    model.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(model), logits(both))


def test_adapters_that_are_active_at_once_generate_with_the_cache_what_they_do_without() -> None:
    model = make_several(KINDS)
    model.base_model.set_adapter(list(KINDS))
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (model.generate(make_tokens(), use_cache=use_cache, **options) for use_cache in (True, False))
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), **rounding())


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_an_adapter_without_low_rank_half_takes_part_in_a_mixed_batch(saved: list[str] | None) -> None:
    rows = ["alone", "__base__", "default"]
    model = make_several(
        {"default": {"modules_to_save": saved}, "alone": {**KINDS["alone"], "modules_to_save": saved}}
    )
    if saved:
        with torch.no_grad():
            model.get_output_embeddings().modules_to_save["alone"].weight.mul_(1.5)
    tokens = make_tokens(batch=len(rows))
    with torch.no_grad():
        mixed = model(tokens, adapter_names=rows).logits
        for index, name in enumerate(rows):
            if name != "__base__":
                model.set_adapter(name)
            with model.disable_adapter() if name == "__base__" else nullcontext():
                alone = model(tokens[index : index + 1]).logits
            torch.testing.assert_close(mixed[index : index + 1], alone, **rounding())


def test_a_mixed_batch_that_fails_leaves_the_model_as_it_was() -> None:
    model = make_several(KINDS)
    expected = logits(model)
    with pytest.raises(ValueError, match="adapter_names"):
        model(make_tokens(), adapter_names=["default"])
    with pytest.raises(IndexError):
        model(make_tokens() + 64, adapter_names=["default", "linear"])
    assert torch.equal(logits(model), expected)


def test_a_mixed_batch_is_refused_where_lora_refuses_it() -> None:
    rows = ["alone", "__base__"]
    talan, lora = make_several(KINDS), make_model("qwen3", make_lora_config())
    for model, names in ((talan, rows), (talan, ["default", "linear"]), (lora, ["default", "__base__"])):
        model.train()
        with pytest.raises(ValueError, match="training mode"):
            model(make_tokens(), adapter_names=names)
        model.eval()
    for model in (talan, lora):
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged adapters"):
            model(make_tokens(), adapter_names=["default", "__base__"])
        model.unmerge_adapter()
        with model.disable_adapter(), torch.no_grad():
            assert torch.equal(
                model(make_tokens(), adapter_names=["default", "__base__"]).logits, model(make_tokens()).logits
            )


def test_mixed_model_is_refused_by_peft_with_the_types_that_it_takes() -> None:
    with pytest.raises(ValueError, match=r"'TALAN' is not compatible with the `PeftMixedModel`.*LORA"):
        get_peft_model(make_base("qwen3"), make_config(), mixed=True)
    model = get_peft_model(make_base("qwen3"), make_lora_config(), mixed=True)
    with pytest.raises(ValueError, match=r"'TALAN' is not compatible with the `PeftMixedModel`.*LORA"):
        model.add_adapter("other", make_config())


def test_another_type_is_refused() -> None:
    model = make_model("qwen3")
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("other", make_lora_config())
    assert list(model.state_dict()) == before
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("names", [("a", "aa", "default_2", "lora"), ("0a", "a0", "layer", "read")])
def test_names_that_are_parts_of_one_another_are_kept_apart(names: tuple[str, ...], tmp_path: Path) -> None:
    model = make_several({"default": {}, **{name: {"talan_layers": [index]} for index, name in enumerate(names)}})
    model.save_pretrained(tmp_path)
    for name in names:
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(make_base("qwen3"), tmp_path / name, adapter_name=name[::-1])
        assert torch.equal(logits(loaded.to(torch.float64)), logits(model))


@pytest.mark.parametrize("name", ["talan", "mlp", "1"])
def test_an_adapter_that_is_named_like_a_module_does_not_cost_another_its_tensors(name: str) -> None:
    model = make_several({"default": {}, name: {}})
    with pytest.raises(ValueError, match=f"adapter 'default' would be saved without.*{name!r}.*delete"):
        get_peft_model_state_dict(model)
    alone = get_peft_model_state_dict(model, adapter_name=name)
    model.delete_adapter(name)
    assert get_peft_model_state_dict(model).keys() == alone.keys()
