"""The recipe for supervised fine-tuning, run as its users run it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from peft import LoraConfig, PeftConfig, PeftModel

from peft_talan import TalanConfig

from ..checkpoint.test_transformers_path import make_tokenizer
from ..small_models import VOCABULARY, make_base, make_tokens

RECIPES = Path(__file__).parents[2] / "benchmarks" / "recipes"
OPTIONS = {
    "talan": ["--talan_options", '{"talan_layers": [1], "talan_slots": 3}', "--side_path_lr_scale", "2"],
    "dora": ["--talan", "false", "--use_dora", "true"],
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    make_base("qwen3", torch.float32).save_pretrained(folder / "model")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "w1"
    tokenizer.save_pretrained(folder / "model")
    pairs = [{"prompt": f"w{i % VOCABULARY} w7 ", "completion": f"w{i % 5} w9"} for i in range(16)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(RECIPES)
    return importlib.import_module("sft")


@pytest.mark.parametrize("kind", OPTIONS)
def test_recipe_trains_and_saves(
    kind: str, recipe: ModuleType, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(RECIPES / "sft.py"), "--config", str(RECIPES / "one_gpu.yaml")]
    here = {
        "model_name_or_path": material / "model",
        "dataset_name": material / "data.jsonl",
        "output_dir": tmp_path,
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "bf16": "false",
        "packing": "false",
        "use_cpu": "true",
        "max_steps": "2",
        "logging_steps": "1",
        "gradient_accumulation_steps": "1",
    }
    overrides = [text for name, value in here.items() for text in (f"--{name}", str(value))]
    command = [*command, *overrides, *OPTIONS[kind]]
    if kind == "talan":
        subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    else:  # in this process, which has imported already what takes seconds
        monkeypatch.setattr("sys.argv", command)
        recipe.main()
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is (TalanConfig if kind == "talan" else LoraConfig)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "loss" in entry]) == 2
    assert any("talan/default/block_1/relative_norm" in entry for entry in history) == (kind == "talan")
    base = make_base("qwen3", torch.float32)
    with torch.no_grad():
        untrained = base(make_tokens()).logits
        assert not torch.equal(PeftModel.from_pretrained(base, tmp_path)(make_tokens()).logits, untrained)


def test_evaluation_needs_its_split(recipe: ModuleType, material: Path, tmp_path: Path) -> None:
    rows = (material / "data.jsonl").read_text()
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(rows)
    script = recipe.ScriptArguments(dataset_name=str(tmp_path))
    assert recipe.choose_split(recipe.load_data(script), "test", "dataset_test_split").num_rows == 16
    script.dataset_name = str(material / "data.jsonl")
    with pytest.raises(ValueError, match=r"dataset_test_split='test': the dataset has 'train'"):
        recipe.choose_split(recipe.load_data(script), "test", "dataset_test_split")


def test_recipe_refuses_what_it_does_not_know(
    recipe: ModuleType, material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--dataset_name", str(material / "data.jsonl"), "--use_cpu", "true", "--talan_slot", "3"]
    monkeypatch.setattr("sys.argv", ["sft.py", *words])
    with pytest.raises(ValueError, match="talan_slot"):
        recipe.main()


@pytest.mark.parametrize("file", ["one_gpu.yaml", "qlora.yaml"])
def test_files_are_understood(file: str, recipe: ModuleType) -> None:
    script, training, model, talan = recipe.parse_arguments(["--config", str(RECIPES / file), "--use_cpu", "true"])
    written = yaml.safe_load((RECIPES / file).read_text())
    for name, value in written.items():
        holder = next(part for part in (script, training, model, talan) if hasattr(part, name))
        assert getattr(holder, name) == value, name


def test_launcher_understands_eight_gpus() -> None:
    config = ClusterConfig.from_yaml_file(str(RECIPES / "eight_gpus_fsdp2.yaml"))
    assert (config.num_processes, config.fsdp_config["fsdp_version"]) == (8, 2)
