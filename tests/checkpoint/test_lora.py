"""Exchange with plain LoRA: export of the LoRA weights, and a warm start from a trained LoRA adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model

from peft_talan import TalanConfig, export_lora, warm_start

from ..small_models import logits, make_base, make_config, make_lora_config, make_model

HALVES = {
    "lora": {},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "bias": "lora_only"},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2, 3]},
}


def save_lora(folder: Path, architecture: str = "qwen3", **options: object) -> torch.Tensor:
    model = make_model(architecture, make_lora_config(init_lora_weights=False, **options), torch.float32)
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("half", HALVES)
def test_exported_half_is_the_adapter_without_its_side_path(half: str, tmp_path: Path) -> None:
    model = make_model("qwen3", make_config(**HALVES[half]), torch.float32)
    with pytest.warns(UserWarning, match="not equivalent"):
        export_lora(model, tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig
    assert "not equivalent" in (tmp_path / "README.md").read_text()
    exported = PeftModel.from_pretrained(make_base("qwen3", torch.float32), tmp_path).eval()
    without = make_model("qwen3", make_config(**HALVES[half], talan_alpha=0.0), torch.float32)
    assert torch.equal(logits(exported), logits(without))
    assert not torch.allclose(logits(exported), logits(model))


def test_exported_half_of_every_architecture(architecture: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not equivalent"):
        export_lora(make_model(architecture, dtype=torch.float32), tmp_path)
    exported = PeftModel.from_pretrained(make_base(architecture, torch.float32), tmp_path).eval()
    without = make_model(architecture, make_config(talan_alpha=0.0), torch.float32)
    assert torch.equal(logits(exported), logits(without))


def test_what_has_no_low_rank_half_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no LoRA weights"):
        export_lora(make_model("qwen3", make_config(r=0)), tmp_path / "lora")
    with pytest.raises(ValueError, match="no TALAN adapter"):
        export_lora(make_model("qwen3"), tmp_path / "lora", adapter_name="other")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("half", HALVES)
def test_warm_start_begins_where_the_lora_adapter_ended(half: str, tmp_path: Path) -> None:
    expected = save_lora(tmp_path, **HALVES[half])
    model = warm_start(make_base("qwen3", torch.float32), tmp_path, talan_layers=[1, -1]).eval()
    assert torch.equal(logits(model), expected)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in trained)
    assert any("lora_talan_write" in name for name in trained)


def test_warm_start_on_every_architecture(architecture: str, tmp_path: Path) -> None:
    expected = save_lora(tmp_path, architecture)
    assert torch.equal(logits(warm_start(make_base(architecture, torch.float32), tmp_path).eval()), expected)


def test_config_takes_over_the_options_of_lora() -> None:
    lora = make_lora_config(r=3, lora_alpha=5, use_rslora=True, inference_mode=True)
    config = TalanConfig.from_lora(lora, talan_slots=2)
    assert (config.r, config.lora_alpha, config.use_rslora, config.talan_slots) == (3, 5, True, 2)
    assert config.peft_type == "TALAN"
    assert not config.inference_mode


@pytest.mark.parametrize("other", [IA3Config(target_modules=["k_proj"]), make_config()])
def test_config_from_another_type_is_refused(other: PeftConfig) -> None:
    with pytest.raises(ValueError, match="expected an adapter of type LORA"):
        TalanConfig.from_lora(other)


def test_warm_start_that_does_not_fit_leaves_the_model(tmp_path: Path) -> None:
    save_lora(tmp_path, target_modules=["q_proj"])
    base = make_base("qwen3", torch.float32)
    expected, modules = logits(base), [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match="missing or have no place"):
        warm_start(base, tmp_path, target_modules=["q_proj", "v_proj"])
    assert torch.equal(logits(base), expected)
    assert [type(module) for module in base.modules()] == modules
    get_peft_model(base, make_config())
