"""The strength of side paths is changed at run time, per adapter and per block, and comes back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_talan import set_talan_strength, talan_strength

from ..small_models import logits, make_base, make_config, make_model, make_several, make_tokens, rounding


def low_rank_half_alone(model: PeftModel) -> torch.Tensor:
    alone = copy.deepcopy(model)
    for name, parameter in alone.named_parameters():
        if "lora_talan_write" in name:
            parameter.data.zero_()
    return logits(alone)


@pytest.mark.parametrize("writeback", ["add", "gated", "capped", "orthogonal"])
def test_zero_is_the_low_rank_half_alone_and_one_is_as_trained(writeback: str) -> None:
    model = make_several({"default": {"talan_writeback": writeback, "talan_alpha": 0.7}})
    trained = logits(model)
    with talan_strength(model, 0):
        off = logits(model)
    assert torch.equal(off, low_rank_half_alone(model))
    assert not torch.allclose(off, trained, **rounding())
    with talan_strength(model, 1):
        assert torch.equal(logits(model), trained)
    assert torch.equal(logits(model), trained)


def test_strength_multiplies_the_trained_alpha() -> None:
    model = make_several({"default": {"talan_alpha": 0.8}})
    with talan_strength(model, 0.5):
        halved = logits(model)
    torch.testing.assert_close(halved, logits(make_several({"default": {"talan_alpha": 0.4}})), **rounding())


def test_a_negative_strength_turns_the_perturbation_round() -> None:
    model = make_several({"default": {"talan_alpha": 0.8, "talan_layers": [-1]}})
    with talan_strength(model, -1):
        turned = logits(model)
    for name, parameter in model.named_parameters():
        if "lora_talan_write" in name:
            parameter.data.neg_()
    torch.testing.assert_close(turned, logits(model), **rounding())


def test_blocks_are_scaled_by_themselves() -> None:
    model = make_several({"default": {"talan_layers": [1, 3]}})
    with talan_strength(model, 0, layers=[3]):
        only_first = logits(model)
        with talan_strength(model, 0, layers=[1]):
            assert torch.equal(logits(model), low_rank_half_alone(model))
        assert torch.equal(logits(model), only_first)
    for name, parameter in model.named_parameters():
        if "layers.3.talan.lora_talan_write" in name:
            parameter.data.zero_()
    assert torch.equal(only_first, logits(model))


def test_adapters_are_scaled_by_themselves() -> None:
    model = make_several({"default": {}, "other": {"talan_layers": [2], "talan_slots": 2}})
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    set_talan_strength(model, 0, adapter_name="other")
    assert not torch.equal(logits(model), second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    set_talan_strength(model, 0)
    assert torch.equal(logits(model), low_rank_half_alone(model))
    set_talan_strength(model, 1)
    assert torch.equal(logits(model), first)


def test_strength_is_back_after_an_error_and_after_a_deleted_adapter() -> None:
    model = make_several({"default": {}, "other": {}})
    trained = logits(model)
    set_talan_strength(model, 0.5, adapter_name="default", layers=[1])
    mixed = logits(model)
    with pytest.raises(RuntimeError, match="inside"), talan_strength(model, 0):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), mixed)
    with talan_strength(model, 0):
        model.delete_adapter("other")
    assert torch.equal(logits(model), mixed)
    set_talan_strength(model, 1)
    assert torch.equal(logits(model), trained)


def test_generation_follows_the_strength_with_and_without_the_cache() -> None:
    model = make_model("qwen3")
    prompt = make_tokens(tokens=9)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with talan_strength(model, 0.5):
        cached = model.generate(input_ids=prompt, **options)
        plain = model.generate(input_ids=prompt, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), **rounding())
    whole = model.generate(input_ids=prompt, **options)
    assert not torch.allclose(whole.logits[0], cached.logits[0], **rounding())


def test_a_compiled_model_follows_the_strength() -> None:
    config = make_config(talan_layers=[0], target_modules=["q_proj"])
    model = make_model("llama", config, torch.float32, blocks=1)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for strength in (1.0, 0.5, 0.0, 0.5):
            with talan_strength(model, strength):
                right = model(make_tokens(), use_cache=False).logits
                found = compiled(make_tokens(), use_cache=False).logits
            torch.testing.assert_close(found, right, **rounding(torch.float32))


def test_strength_is_not_saved_and_alpha_is(tmp_path: Path) -> None:
    model = make_model("qwen3")
    trained = logits(model)
    set_talan_strength(model, 0.25)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base("qwen3"), tmp_path).to(torch.float64)
    assert torch.equal(logits(loaded), trained)


def test_a_merged_model_keeps_its_side_path_steerable() -> None:
    model = make_model("qwen3")
    with talan_strength(model, 0.5):
        halved = logits(model)
    merged = model.merge_and_unload()
    with talan_strength(merged, 0.5):
        torch.testing.assert_close(logits(merged), halved, **rounding())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": True}, "strength=True"),
        ({"strength": "1"}, "strength='1'"),
        ({"strength": 0, "adapter_name": "none"}, "adapter_name='none'.*'default'"),
        ({"strength": 0, "layers": [0]}, r"layers=\[0\].*\[1, 3\]"),
        ({"strength": 0, "layers": []}, r"layers=\[\]"),
        ({"strength": 0, "layers": 1}, "layers=1"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(options: dict[str, object], message: str) -> None:
    model = make_model("qwen3")
    trained = logits(model)
    with pytest.raises(ValueError, match=message):
        set_talan_strength(model, **options)
    with pytest.raises(ValueError, match=message), talan_strength(model, **options):
        pass
    assert torch.equal(logits(model), trained)


def test_a_model_without_a_side_path_is_refused() -> None:
    with pytest.raises(ValueError, match="no side path"):
        set_talan_strength(make_base("qwen3"), 0.5)
