"""The experiment for PEFT's own benchmark: its files are the default setting, and its steps run."""

from __future__ import annotations

import json
from pathlib import Path

from peft import LoraConfig, PeftConfig, get_peft_model

from benchmarks.method_comparison import dry_run
from peft_talan import TalanConfig


def test_the_files_are_the_default_setting_at_the_anchors_rank() -> None:
    config = PeftConfig.from_pretrained(str(dry_run.EXPERIMENT))
    assert config == TalanConfig(r=32, lora_alpha=64, task_type="CAUSAL_LM")
    # As PEFT's script asks for it: ./experiments/<method>/<name>
    assert dry_run.EXPERIMENT.parts[-3] == "experiments"
    assert json.loads((dry_run.EXPERIMENT / "training_params.json").read_text()) == {
        "optimizer_kwargs": dry_run.DEFAULTS["optimizer_kwargs"]
    }


def test_every_step_runs_as_with_lora(tmp_path: Path) -> None:
    LoraConfig(r=32, lora_alpha=64, task_type="CAUSAL_LM").save_pretrained(tmp_path)
    (tmp_path / "training_params.json").write_text(json.dumps({"optimizer_kwargs": {"lr": 0.02}}))
    lora = dry_run.main(["--experiment", str(tmp_path), "--steps", "12"])
    TalanConfig(r=32, lora_alpha=64, task_type="CAUSAL_LM").save_pretrained(tmp_path)
    talan = dry_run.main(["--experiment", str(tmp_path), "--steps", "12"])
    for found in (lora, talan):
        assert found["train losses"][-1] < found["train losses"][0]
        assert found["forgetting"] != 0
        assert 0 <= found["test accuracy"] <= 1
        assert found["same answers with a growing cache"]
    # A fresh side path writes nothing.
    assert talan["train losses"][0] == lora["train losses"][0]
    assert talan["train losses"] != lora["train losses"]
    base = dry_run.make_base(dry_run.make_tokenizer())
    added = talan["trainable parameters"] - lora["trainable parameters"]
    side_path = get_peft_model(base, TalanConfig(r=0, task_type="CAUSAL_LM")).get_nb_trainable_parameters()[0]
    assert added == side_path
    assert talan["file size"] - lora["file size"] >= 4 * added


def test_the_stored_experiment_runs() -> None:
    assert len(dry_run.main(["--steps", "3"])["train losses"]) == 3
