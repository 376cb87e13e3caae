"""The model card is written where an adapter is saved, and nowhere else."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn

from peft_talan.checkpoint.card import write_card
from peft_talan.version import INSTALL

from ..bad_input.entrances import adapted, assert_unchanged, picture
from ..small_models import make_base, make_config, make_lora_config, make_model, make_several


@pytest.mark.parametrize("kind", ["PEFT", "transformers"])
def test_reading_an_adapters_tensors_has_no_effect(kind: str, tmp_path: Path) -> None:
    model: nn.Module = make_model("qwen3", dtype=torch.float32) if kind == "PEFT" else adapted()
    config = model.peft_config["default"]
    before, attributes = picture(model), dict(vars(config))
    get_peft_model_state_dict(model)
    assert_unchanged(model, before)
    assert vars(config) == attributes
    config.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter_config.json"]


@pytest.mark.parametrize("config", [make_lora_config(), make_config()], ids=["lora", "talan"])
def test_a_saved_model_is_freed_at_once(config: object, tmp_path: Path) -> None:
    model = make_model("qwen3", config, torch.float32)
    gc.collect()
    gc.disable()
    try:
        model.save_pretrained(tmp_path)
        get_peft_model_state_dict(model)
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_a_plain_lora_adapter_gets_peft_s_card_alone(tmp_path: Path) -> None:
    model = make_model("qwen3", dtype=torch.float32)
    model.save_pretrained(tmp_path / "talan")
    base = model.unload()
    get_peft_model(base, make_lora_config()).save_pretrained(tmp_path / "lora")
    assert "peft_talan" in (tmp_path / "talan" / "README.md").read_text()
    assert "talan" not in (tmp_path / "lora" / "README.md").read_text().lower()


def test_only_the_saved_adapters_are_in_the_card(tmp_path: Path) -> None:
    model = make_several({"default": {}, "first": {}, "second": {"talan_mixer": "mlp"}})
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    text = (tmp_path / "README.md").read_text()
    assert "## TALAN adapter `second`" in text and text.count("## TALAN adapter") == 1


def test_checkpoints_in_the_folder_are_not_in_the_card(tmp_path: Path) -> None:
    model = make_model("qwen3", dtype=torch.float32)
    model.save_pretrained(tmp_path / "checkpoint-10")
    model.save_pretrained(tmp_path)
    assert "checkpoint-10" not in (tmp_path / "README.md").read_text()


def test_another_process_than_the_main_one_writes_no_card(tmp_path: Path) -> None:
    model = make_model("qwen3", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink()
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_a_pickle_gets_a_card_without_numbers(tmp_path: Path) -> None:
    make_model("qwen3", dtype=torch.float32).save_pretrained(tmp_path, safe_serialization=False)
    card = ModelCard.load(tmp_path / "README.md")
    assert INSTALL in card.text and "### Parameters" not in card.text


def test_a_folder_without_a_talan_adapter_is_refused(tmp_path: Path) -> None:
    make_base("qwen3").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"folder=.*expected a saved TALAN adapter"):
        write_card(tmp_path)
