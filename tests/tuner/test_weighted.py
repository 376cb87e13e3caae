"""Weighted adapters: exact where a sum of adapters is an adapter, refused by name where it is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from ..small_models import (
    last_state,
    logits,
    make_base,
    make_config,
    make_lora_config,
    make_model,
    make_several,
    rounding,
)


@pytest.mark.parametrize("writeback", ["add", "gated", "capped", "orthogonal"])
@pytest.mark.parametrize("weight", [0.5, -3.0])
def test_weighted_adapter_scales_the_perturbation(writeback: str, weight: float, tmp_path: Path) -> None:
    model = make_model("qwen3", make_config(r=0, talan_layers=[-1], talan_writeback=writeback, talan_alpha=0.7))
    with model.disable_adapter():
        base = last_state(model)
    perturbation = last_state(model) - base
    model.add_weighted_adapter(["default"], [weight], "weighted")
    model.to(torch.float64).set_adapter("weighted")
    torch.testing.assert_close(last_state(model) - base, weight * perturbation, **rounding())
    model.save_pretrained(tmp_path, selected_adapters=["weighted"])
    loaded = PeftModel.from_pretrained(make_base("qwen3"), tmp_path / "weighted").to(torch.float64).eval()
    torch.testing.assert_close(last_state(loaded), last_state(model), **rounding(torch.float32))


@pytest.mark.parametrize("combination", ["linear", "svd", "cat"])
def test_weighted_adapter_has_the_low_rank_half_that_lora_has(combination: str) -> None:
    kinds = {"default": {"talan_layers": [0, 3]}, "other": {"talan_layers": [1]}}
    talan, lora = make_several(kinds), make_model("qwen3", make_lora_config())
    lora.add_adapter("other", make_lora_config())
    lora.to(torch.float64)
    for name in kinds:
        state = get_peft_model_state_dict(talan, adapter_name=name)
        state = {key: tensor for key, tensor in state.items() if ".talan." not in key}
        set_peft_model_state_dict(lora, state, adapter_name=name)
    for model in (talan, lora):
        model.add_weighted_adapter(["default", "other"], [2.0, -1.0], "sum", combination)
    halves = get_peft_model_state_dict(talan, adapter_name="sum")
    expected = get_peft_model_state_dict(lora, adapter_name="sum")
    assert halves.keys() > expected.keys()
    assert all(torch.equal(halves[key], expected[key]) for key in expected)
    assert talan.peft_config["sum"].talan_layers == [0, 1, 3]


def test_weighted_adapter_of_disjoint_blocks_is_both_at_once() -> None:
    kinds = {"default": {"talan_layers": [0, 3], "r": 0}, "other": {"talan_layers": [1], "r": 0}}
    model = make_several(kinds)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.to(torch.float64).set_adapter("sum")
    summed = logits(model)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(summed, logits(model), **rounding())


def test_weighted_adapter_takes_over_the_scaling_of_rslora() -> None:
    model = make_model("qwen3", make_config(use_rslora=True))
    expected = logits(model)
    # The rank makes the scaling a power of two, so PEFT's square roots in float32 are exact.
    model.add_weighted_adapter(["default"], [1.0], "same", "linear")
    model.to(torch.float64).set_adapter("same")
    torch.testing.assert_close(logits(model), expected, **rounding())


def test_side_paths_that_write_nothing_join_a_weighted_adapter() -> None:
    untrained = {"init_talan_weights": True, "r": 0, "talan_mixer": "linear"}
    model = make_several({"default": {"r": 0}, "untrained": untrained, "other": {"r": 0}})
    expected = logits(model)
    model.add_weighted_adapter(["untrained", "default", "other"], [2.0, 1.0, 0.0], "sum")
    model.to(torch.float64).set_adapter("sum")
    torch.testing.assert_close(logits(model), expected, **rounding())
    model.add_weighted_adapter(["other", "untrained"], [0.0, 2.0], "nothing")
    model.set_adapter("nothing")
    assert torch.equal(logits(model), logits(make_base("qwen3")))


REFUSED: dict[str, tuple[dict[str, object], list[object], str]] = {
    "both at one block": ({"talan_layers": [0, 1]}, [["default", "other"], [1.0, 1.0]], "block 1.*set_adapter"),
    "other mixer": ({"talan_layers": [0], "talan_mixer": "linear"}, [["default", "other"], [1.0, 1.0]], "talan_mixer"),
    "dora": ({"use_dora": True}, [["other"], [1.0]], "use_dora=True of adapter 'other'"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, [["other"], [1.0]], "modules_to_save"),
    "bias": ({"bias": "all"}, [["other"], [1.0]], "only 1 adapter with bias"),
    "unknown": ({}, [["nobody"], [1.0]], "'nobody' does not exist"),
    "weights": ({}, [["default"], [1.0, 2.0]], r"weights=\[1.0, 2.0\]"),
    "twice": ({}, [["default", "default"], [1.0, 2.0]], "each once"),
    "ranks": ({"talan_layers": [0], "r": 2}, [["default", "other"], [1.0, 1.0]], "same r"),
    "half made": ({"talan_layers": [0]}, [["default", "other"], [1.0, 1.0]], "NoneType"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_weighted_adapter_that_is_no_adapter_is_refused_and_leaves_the_model(case: str) -> None:
    options, arguments, message = REFUSED[case]
    model = make_model("qwen3", make_config(talan_layers=[1]))
    model.add_adapter("other", make_config(**options))
    before, configs = list(model.state_dict()), dict(model.peft_config)
    combination = "ties" if case == "half made" else "linear"
    with pytest.raises((ValueError, TypeError), match=message):
        model.add_weighted_adapter(*arguments, "sum", combination)
    assert list(model.state_dict()) == before
    assert model.peft_config == configs
    with pytest.raises(ValueError, match="adapter_name='other'"):
        model.add_weighted_adapter(["default"], [1.0], "other")
