"""A merged model's folder is an ordinary one: it loads wherever it lies, in every way in which models do, and trains.

The right values are the logits of the merged model in memory.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BitsAndBytesConfig,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from peft_talan.checkpoint.merged_config import merged_side_paths, merged_tensor

from ..small_models import VOCABULARY, logits, make_base, make_config, make_lora_config, make_model, make_tokens


@pytest.fixture(scope="module")
def merged() -> PreTrainedModel:
    return make_model("qwen3", dtype=torch.float32).merge_and_unload()


@pytest.fixture(scope="module")
def folder(merged: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    merged.save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def side_path_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if merged_tensor(name) is not None}


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_blocks_on_the_cpu_or_the_disk(device: str, merged: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    places = {f"model.layers.{block}": device if block % 2 else "cpu" for block in range(4)}
    others = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    model = load(folder, device_map={**dict.fromkeys(others, "cpu"), **places}, offload_folder=tmp_path)
    assert all(tensor.is_meta == (device == "disk") for tensor in side_path_of(model).values())
    assert torch.equal(logits(model), logits(merged))


def test_blocks_that_find_no_memory(merged: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    model = load(folder, device_map="auto", max_memory={"cpu": 70_000}, offload_folder=tmp_path)
    assert any(tensor.is_meta for tensor in side_path_of(model).values())
    assert torch.equal(logits(model), logits(merged))


def test_the_rest_is_quantized(merged: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="quantizes")
    quantized = load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    expected = side_path_of(merged)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in side_path_of(quantized).items())
    quantized.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(quantized))


def test_a_copy_and_a_subfolder_without_what_it_was_made_of(tmp_path: Path) -> None:
    make_base("qwen3", torch.float32).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merged = get_peft_model(base, make_config()).eval().merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    shutil.copytree(tmp_path / "merged", tmp_path / "outer" / "inner")
    for name in ("base", "merged"):
        shutil.rmtree(tmp_path / name)
    assert torch.equal(logits(load(tmp_path / "outer" / "inner")), logits(merged))
    assert torch.equal(logits(load(tmp_path / "outer", subfolder="inner")), logits(merged))
    assert str(tmp_path) not in (tmp_path / "outer" / "inner" / "config.json").read_text()


def test_a_second_stage_loads_with_the_first(merged: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    second = get_peft_model(load(folder), make_config(talan_mixer="linear")).eval()
    second.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(second))
    assert not torch.allclose(logits(second), logits(merged))


def test_without_head_and_with_a_new_one(merged: PreTrainedModel, folder: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        expected = merged.model(make_tokens()).last_hidden_state
        headless = AutoModel.from_pretrained(folder)
        assert torch.equal(headless(make_tokens()).last_hidden_state, expected)
        headless.save_pretrained(tmp_path)
        for place in (folder, tmp_path):
            classifier = AutoModelForSequenceClassification.from_pretrained(place)
            assert torch.equal(classifier.model(make_tokens()).last_hidden_state, expected)
            assert all(parameter.requires_grad for parameter in classifier.parameters())
        assert load(tmp_path).state_dict().keys() == merged.state_dict().keys()


def test_built_from_its_configuration_and_filled(merged: PreTrainedModel, folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not any(tensor.any() for name, tensor in side_path_of(model).items() if ".write." in name)
    model.load_state_dict(merged.state_dict())
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config).eval()
    assert all(tensor.is_meta for tensor in side_path_of(empty).values())
    assert torch.equal(logits(model), logits(merged))


def test_its_configuration_is_its_own() -> None:
    config = copy.deepcopy(make_base("qwen3").config)
    config.fusion_config = {"patch_embeddings": False}
    models = [AutoModelForCausalLM.from_config(config) for _ in range(2)]
    before = config.to_dict()
    merged = get_peft_model(models[0], make_config()).merge_and_unload()
    assert models[1].config is config and config.to_dict() == before
    assert all(getattr(module, "config", merged.config) is merged.config for module in merged.modules())
    assert merged.config.fusion_config == {"patch_embeddings": False, "talan": False}


def test_what_the_configuration_says(merged: PreTrainedModel, folder: Path) -> None:
    (side_path,) = merged_side_paths(json.loads((folder / "config.json").read_text()))
    assert [side_path] == merged_side_paths(merged.config.to_dict())
    assert side_path.adapter_name == "default" and side_path.blocks == ("model.layers.1", "model.layers.3")
    assert (side_path.axes["talan_slots"], side_path.axes["talan_dim"]) == (3, 5)
    found = {merged_tensor(name) for name in load_file(folder / "model.safetensors")} - {None}
    assert {(one.number, one.block_index) for one in found} == {(side_path.number, 1), (side_path.number, 3)}
    assert {one.parameter for one in found} == {"read", "write", "slot_bias"}
    assert merged_side_paths(make_base("qwen3").config.to_dict()) == []


def test_a_tensor_that_is_not_in_the_file_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.merged_side_paths_0.write.0.values"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"block 3 whose tensor merged_side_paths_0\.write\.0\.values is not in"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("talan_version", "99.0.0", "newer major version"),
        ("talan_mixer", "none", "talan_mixer='none'"),
        ("hidden_size", None, "lacks hidden_size"),
    ],
)
def test_a_description_that_can_not_be_used_is_refused(
    part: str, value: object, message: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["talan"][0] = {k: v for k, v in {**config["talan"][0], part: value}.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


ROWS = Dataset.from_list([{"input_ids": row, "labels": row} for row in make_tokens(8, 12).tolist()])


def make_trainer(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    common = {"use_cpu": True, "report_to": "none", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    return Trainer(model, TrainingArguments(folder, **{**common, **options}), train_dataset=ROWS, eval_dataset=ROWS)


def test_full_fine_tuning_saves_resumes_and_finds_its_best(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    assert all(parameter.requires_grad for parameter in model.parameters())
    make_trainer(model, tmp_path).train()
    assert all(
        not torch.equal(tensor, side_path_of(load(folder))[name]) for name, tensor in side_path_of(model).items()
    )
    resumed = load(folder)
    make_trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = load(tmp_path / "checkpoint-4").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
        assert torch.equal(tensor, again[name]), name


def test_the_best_model_comes_back_with_its_side_path(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1.0}
    trainer = make_trainer(model, tmp_path, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    best = load(Path(trainer.state.best_model_checkpoint)).state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in model.state_dict().items())


def test_in_memory_it_trains_what_a_merged_lora_model_does() -> None:
    def trains(model: PeftModel) -> set[str]:
        return {name for name, parameter in model.merge_and_unload().named_parameters() if parameter.requires_grad}

    assert trains(make_model("qwen3")) == trains(make_model("qwen3", make_lora_config()))


def make_talk(kind: str) -> PreTrainedModel:
    """Models of two stacks, which share one class or one configuration."""
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "decoder_start_token_id": 0}
    if kind == "t5":
        return T5ForConditionalGeneration(T5Config(**sizes, d_kv=8, d_ff=48, num_layers=4, num_heads=4))
    heads = {f"{stack}_{part}": 4 for stack in ("encoder", "decoder") for part in ("layers", "attention_heads")}
    widths = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, **widths))


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_each_stack_has_its_own(stack: str, kind: str, tmp_path: Path) -> None:
    blocks = {"t5": f"{stack}.block", "bart": f"model.{stack}.layers"}[kind]
    config = make_config(task_type="SEQ_2_SEQ_LM", talan_blocks=blocks)
    merged = get_peft_model(make_talk(kind), config).eval().merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path)
    assert side_path_of(loaded) and all(name.startswith(blocks) for name in side_path_of(loaded))
    call = {"decoder_input_ids": make_tokens(tokens=7)}
    assert torch.equal(logits(loaded, **call), logits(merged, **call))
    with pytest.raises(ValueError, match=rf"load it, with its side path, by {type(merged).__name__}\.from_pretrained"):
        PeftModel.from_pretrained(make_talk(kind), tmp_path)
    if kind == "t5":
        assert bool(side_path_of(T5EncoderModel.from_pretrained(tmp_path))) == (stack == "encoder")


def test_a_model_of_several_parts_and_its_text_model(tmp_path: Path) -> None:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["full_attention"] * 4,
    }
    vision = {"depth": 4, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    base = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))
    merged = get_peft_model(base, make_config()).eval().merge_and_unload()
    merged.save_pretrained(tmp_path)
    whole, alone = Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path), load(tmp_path)
    assert type(alone).__name__ == "Qwen3_5ForCausalLM"
    for loaded in (whole, alone):
        assert len(side_path_of(loaded)) == len(side_path_of(merged))
        assert torch.equal(logits(loaded), logits(merged))
