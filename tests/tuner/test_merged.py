"""A merged side path belongs to the base model of a second stage: always on, and no part of the next adapter."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoKrConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_talan import set_talan_strength, talan_strength
from peft_talan.analysis import measure_blocks

from ..bad_input.entrances import assert_unchanged, picture
from ..small_models import (
    adapter_calls_of_transformers,
    logits,
    make_base,
    make_config,
    make_lora_config,
    make_model,
    make_tokens,
    rounding,
)

SECOND: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: make_lora_config(init_lora_weights=False),
    "dora": lambda: make_lora_config(init_lora_weights=False, use_dora=True),
    "talan": lambda: make_config(talan_mixer="linear"),
    "talan at the input": lambda: make_config(talan_position="input"),
    "ia3": lambda: IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False
    ),
    "adalora": lambda: AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10, init_lora_weights=False
    ),
    "lokr": lambda: LoKrConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_weights=False),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def merge(**options: object) -> PreTrainedModel:
    return make_model("qwen3", make_config(**options), torch.float32).merge_and_unload()


@pytest.fixture(scope="module", params=["in memory", "from its folder"])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    model = merge(talan_dropout=0.5, talan_grad_scale=2.0)
    if request.param == "in memory":
        return model
    folder = tmp_path_factory.mktemp("merged")
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def second_stage(merged: PreTrainedModel, kind: str = "lora", name: str = "default") -> PeftModel:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(second time|already found a `peft_config`).*")
        return get_peft_model(copy.deepcopy(merged), SECOND[kind](), adapter_name=name).eval()


def merged_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if "merged_side_path" in name}


@pytest.mark.parametrize("kind", SECOND)
def test_every_kind_of_second_adapter_leaves_it_to_the_base(
    merged: PreTrainedModel, kind: str, tmp_path: Path
) -> None:
    expected = logits(merged)
    model = second_stage(merged, kind)
    adapted = logits(model)
    assert not torch.allclose(adapted[:, -21:], expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert merged_tensors(model)
    assert not any(parameter.requires_grad for parameter in merged_tensors(model).values())
    assert all("merged" not in name for name in get_peft_model_state_dict(model))
    model.save_pretrained(tmp_path)
    assert all("merged" not in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(copy.deepcopy(merged), tmp_path).eval()
    assert torch.equal(logits(loaded), adapted)
    if kind != "prompt":
        assert torch.equal(logits(model.unload()), expected)


@pytest.mark.parametrize("kind", ["lora", "talan", "talan at the input"])
def test_a_second_stage_trains_what_it_trains_on_any_base(merged: PreTrainedModel, kind: str) -> None:
    model = second_stage(merged, kind).train()
    before = {name: tensor.clone() for name, tensor in merged_tensors(model).items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01, weight_decay=0.1)
    model(make_tokens(), labels=make_tokens()).loss.backward()
    optimizer.step()
    after = merged_tensors(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with model.disable_adapter():
        assert torch.equal(logits(model.eval()), logits(merged))


def test_it_has_no_dropout_and_true_gradients_as_a_base_model(merged: PreTrainedModel) -> None:
    """What acts in training alone belonged to the adapter's training."""
    model, plain = copy.deepcopy(merged).train(), merge()
    assert torch.equal(logits(model), logits(merged))
    embeddings = model.get_input_embeddings()(make_tokens()).detach().requires_grad_()
    gradients = [
        torch.autograd.grad(one(inputs_embeds=embeddings).logits.square().mean(), embeddings)[0]
        for one in (model, plain)
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", ["lora", "talan", "talan at the input"])
def test_switching_deleting_and_merging_the_second_adapter(merged: PreTrainedModel, kind: str) -> None:
    base = copy.deepcopy(merged).to(torch.float64)
    expected = logits(base)
    model = second_stage(base, kind).to(torch.float64)
    model.add_adapter("other", make_lora_config(init_lora_weights=False) if kind == "lora" else make_config(r=2))
    model.to(torch.float64).eval()
    adapted = logits(model)
    model.set_adapter("other")
    other = logits(model)
    tokens = make_tokens()
    with torch.no_grad():
        mixed = model(tokens, adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed[0], adapted[0], **rounding())
    torch.testing.assert_close(mixed[1], other[1], **rounding())
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), adapted)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, **rounding())
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), adapted, **rounding())
    options = {"input_ids": tokens, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))
    status = model.get_model_status()
    assert status.available_adapters == ["default"]
    assert all("merged" not in layer.name for layer in model.get_layer_status())
    twice = model.merge_and_unload()
    torch.testing.assert_close(logits(twice), adapted, **rounding())
    assert not torch.allclose(adapted, expected)


@pytest.mark.parametrize("position", ["input", "output"])
def test_two_stages_on_one_block_run_in_their_order(position: str, tmp_path: Path) -> None:
    first = merge(talan_position=position).to(torch.float64)
    torch.manual_seed(5)
    second = (
        get_peft_model(first, make_config(r=0, talan_position=position, talan_mixer="mlp")).to(torch.float64).eval()
    )
    expected = logits(second)
    model = second.merge_and_unload()
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    options = {"input_ids": make_tokens(), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(logits(loaded), expected)
    assert list(loaded.state_dict()) == list(model.state_dict())


def test_a_second_stage_of_lora_is_merged_and_saved_with_it(merged: PreTrainedModel, tmp_path: Path) -> None:
    model = second_stage(merged).merge_and_unload()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.state_dict().keys() == model.state_dict().keys()


@adapter_calls_of_transformers
def test_transformers_own_adapters_leave_it_alone(merged: PreTrainedModel, tmp_path: Path) -> None:
    model, expected = copy.deepcopy(merged), logits(merged)
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.disable_adapters()
    model.add_adapter(make_lora_config(init_lora_weights=False))
    adapted = logits(model)
    model.disable_adapters()
    assert torch.equal(logits(model), expected)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    assert all("merged" not in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    again = copy.deepcopy(merged)
    assert not again.load_adapter(str(tmp_path)).missing_keys
    assert torch.equal(logits(again.eval()), adapted)
    model.delete_adapter("default")
    assert torch.equal(logits(model), expected)


def test_strength_scales_the_adapter_before_what_is_merged(merged: PreTrainedModel) -> None:
    expected = logits(merged)
    with talan_strength(merged, 0.0):
        assert not torch.allclose(logits(merged), expected)
    assert torch.equal(logits(merged), expected)
    model = second_stage(merged, "talan", "second")
    set_talan_strength(model, 0.0)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    set_talan_strength(model, 0.0, adapter_name="default")
    with model.disable_adapter():
        assert not torch.allclose(logits(model), expected)


def test_measures_take_it_as_a_part_of_the_base(merged: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="has no side path"):
        measure_blocks(merged, {"input_ids": make_tokens()})
    measured = measure_blocks(second_stage(merged, "talan"), {"input_ids": make_tokens()})
    assert all(block.low_rank_norm > 0 for block in measured)


def test_its_folder_is_no_adapter(tmp_path: Path) -> None:
    merge().save_pretrained(tmp_path)
    base = make_base("qwen3", torch.float32)
    before = picture(base)
    with pytest.raises(ValueError, match="it is a merged model, not an adapter"):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(ValueError, match="it is a merged model, not an adapter"):
        base.load_adapter(str(tmp_path))
    assert_unchanged(base, before)
