"""A checkpoint over an adapter that is there: the checkpoint's adapter, or refused with the model as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_talan import TalanConfig

from ..bad_input.entrances import assert_unchanged, picture
from ..small_models import logits, make_base, make_config, make_lora_config, make_model

DECISIVE: dict[str, object] = {
    "talan_alpha": 0.5,
    "talan_position": "input",
    "talan_memory_scope": "bidirectional",
    "talan_writeback": "capped",
    "talan_mixer": "linear",
    "talan_slots": 4,
    "talan_layers": [1],
    "lora_alpha": 3,
    "use_rslora": True,
    "alpha_pattern": {"q_proj": 3},
    "rank_pattern": {"q_proj": 2},
    "use_dora": True,
    "bias": "lora_only",
    "target_modules": ["q_proj"],
    "init_lora_weights": "olora",
    "modules_to_save": ["lm_head"],
    "r": 0,
}


def config(**options: object) -> TalanConfig:
    return make_config(**{"task_type": None, **options})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("field", DECISIVE)
def test_another_configuration_is_refused_by_its_fields(field: str, tmp_path: Path) -> None:
    make_model("qwen3", config(**{field: DECISIVE[field]}), torch.float32).save_pretrained(tmp_path)
    model = make_model("qwen3", config(), torch.float32)
    before = picture(model)
    with pytest.raises(ValueError, match=rf"adapter_name='default'.*{field}=.*give another adapter_name"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_unchanged(model, before)
    model.load_adapter(tmp_path, "another")
    model.delete_adapter("default")
    model.set_adapter("another")
    expected = PeftModel.from_pretrained(make_base("qwen3", torch.float32), tmp_path)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("value", ["capped", "gated"])
def test_numbers_of_a_writeback(value: str, tmp_path: Path) -> None:
    make_model("qwen3", config(talan_writeback=value, talan_cap=0.5)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"talan_cap=0.1 \(checkpoint: 0.5\)"):
        make_model("qwen3", config(talan_writeback=value)).load_adapter(tmp_path, "default")


def test_a_configuration_that_was_edited_in_the_folder_counts(tmp_path: Path) -> None:
    model = make_model("qwen3")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "talan_alpha": 2.0}))
    with pytest.raises(ValueError, match=r"talan_alpha=1.0 \(checkpoint: 2.0\)"):
        model.load_adapter(tmp_path, "default")


def test_what_changes_nothing_is_no_reason(tmp_path: Path) -> None:
    options = {"talan_trainable": "side_path", "init_lora_weights": True, "task_type": "CAUSAL_LM"}
    saved = make_model("qwen3", config(**options), torch.float32)
    saved.save_pretrained(tmp_path)
    model = make_model("qwen3", config(), torch.float32)
    assert not model.load_adapter(tmp_path, "default").missing_keys
    assert torch.equal(logits(model), logits(saved))


def test_what_only_training_uses_is_warned_about(tmp_path: Path) -> None:
    saved = make_model("qwen3", config(talan_dropout=0.1, lora_dropout=0.2), torch.float32)
    saved.save_pretrained(tmp_path)
    model = make_model("qwen3", config(), torch.float32)
    with pytest.warns(UserWarning, match=r"goes on with lora_dropout=0.0 \(checkpoint: 0.2\), talan_dropout=0.0"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), logits(saved))


@pytest.mark.parametrize(("present", "saved"), [(config(), make_lora_config()), (make_lora_config(), config())])
def test_another_type_is_refused(present: LoraConfig, saved: LoraConfig, tmp_path: Path) -> None:
    make_model("qwen3", saved).save_pretrained(tmp_path)
    model = make_model("qwen3", present)
    before = picture(model)
    with pytest.raises(ValueError, match=r"adapter_name='default': the adapter of this name has the type"):
        model.load_adapter(tmp_path, "default")
    assert_unchanged(model, before)


def test_plain_lora_is_left_to_peft(tmp_path: Path) -> None:
    make_model("qwen3", make_lora_config()).save_pretrained(tmp_path)
    model = get_peft_model(make_base("qwen3"), make_lora_config(lora_alpha=3))
    model.load_adapter(tmp_path, "default")
    (tmp_path / "adapter_config.json").unlink()
    model.load_adapter(tmp_path, "default")
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        make_model("qwen3").load_adapter(tmp_path, "default")
