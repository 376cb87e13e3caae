"""What PEFT demands of its own tuners: states, low-level functions, and every way to load; LoRA is the yardstick."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_layer_status,
    get_model_status,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft import functional as peft_functional
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import AutoModelForCausalLM

from peft_talan import TalanLayer

from ..small_models import logits, make_base, make_config, make_lora_config, make_model, make_tokens, rounding

PREFIX = "base_model.model."


def two_adapters(**options: object) -> PeftModel:
    model = make_model("qwen3", make_config(talan_layers=[1, -1]))
    model.add_adapter("other", make_config(talan_layers=[0, 1], **options))
    return model.to(torch.float64)


def tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def test_merging_twice_warns_and_changes_nothing() -> None:
    model = make_model("qwen3")
    model.merge_adapter()
    expected = logits(model)
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_adapters_merge_one_after_the_other_and_a_switch_takes_them_out_again() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    model.merge_adapter(["other"])
    assert model.get_model_status().merged_adapters == ["other"]
    with pytest.warns(UserWarning, match="additionally merging default"):
        model.merge_adapter(["other", "default"])
    torch.testing.assert_close(logits(model), expected, **rounding())
    assert model.get_model_status().merged_adapters == ["default", "other"]
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("default")
    assert model.get_model_status().merged_adapters == []


def test_running_disabled_unmerges_both_halves() -> None:
    model = make_model("qwen3")
    expected = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(make_base("qwen3")), **rounding())
    assert model.get_model_status().merged_adapters == []
    torch.testing.assert_close(logits(model), expected, **rounding())
    model.delete_adapter("default")


def test_disabling_is_nested_and_mends_irregular_states() -> None:
    model, base = make_model("qwen3"), logits(make_base("qwen3"))
    expected = logits(model)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert model.get_model_status().enabled is False
    model.base_model.enable_adapter_layers()
    next(layer for layer in tuner_layers(model) if isinstance(layer, TalanLayer)).enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"
    with pytest.warns(UserWarning, match="some adapter layers that are enabled"), model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)


def test_an_adapter_that_is_added_while_disabled_stays_off() -> None:
    model = make_model("qwen3", make_config(talan_layers=[1]))
    with model.disable_adapter():
        model.add_adapter("other", make_config(talan_layers=[0]))
        model.set_adapter("other")
        assert model.get_model_status().enabled is False
        assert torch.equal(logits(model), logits(make_base("qwen3")))
    assert not torch.allclose(logits(model), logits(make_base("qwen3")))


def test_status_is_that_of_lora_with_the_side_paths_beside() -> None:
    talan, lora = two_adapters(), make_model("qwen3", make_lora_config())
    lora.add_adapter("other", make_lora_config())
    for model in (talan, lora):
        model.base_model.set_adapter(["default", "other"])
        model.set_requires_grad("other", False)
    layers = [layer for layer in talan.get_layer_status() if layer.module_type != "TalanLayer"]
    assert layers == lora.get_layer_status()
    side_paths = [layer for layer in talan.get_layer_status() if layer.module_type == "TalanLayer"]
    assert {layer.name: layer.available_adapters for layer in side_paths} == {
        "model.model.layers.0.talan": ["other"],
        "model.model.layers.1.talan": ["default", "other"],
        "model.model.layers.3.talan": ["default"],
    }
    status, expected = vars(talan.get_model_status()), vars(lora.get_model_status())
    assert status.pop("adapter_model_type") == "TalanModel"
    assert status.pop("peft_types") == {"default": "TALAN", "other": "TALAN"}
    assert status.pop("num_adapter_layers") == len(layers) + len(side_paths)
    for count in ("trainable_params", "total_params"):
        own = status.pop(count) - expected[count]
        trains = ("default",) if count == "trainable_params" else ("default", "other")
        names = [(name, p) for name, p in talan.named_parameters() if ".talan." in name]
        assert own == sum(p.numel() for name, p in names if name.split(".")[-2] in trains)
    assert status == {name: expected[name] for name in status}


def test_set_requires_grad_keeps_to_the_trainability_scope() -> None:
    model = two_adapters(talan_trainable="writeback")

    def trainable() -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    start = trainable()
    model.set_requires_grad("default", False)
    assert not trainable()
    model.set_requires_grad(["default", "other"], True)
    writeback = {name for name, _ in model.named_parameters() if name.endswith("lora_talan_write.other.values")}
    assert trainable() == start | writeback
    model.base_model.set_adapter("default", inference_mode=True)
    assert not trainable()


def test_training_changes_the_adapter_that_is_active_and_nothing_else() -> None:
    model = two_adapters()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.train()
    model.set_adapter("other")
    model(make_tokens(), labels=make_tokens()).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    adapters = {name for name in before if name.endswith((".other", ".other.weight", ".other.values"))}
    assert changed == adapters


def test_what_would_lose_the_side_path_is_refused(tmp_path: Path) -> None:
    model = make_model("qwen3", make_config(init_lora_weights="pissa"), torch.float32)
    expected = logits(model)
    with pytest.raises(NotImplementedError, match="would lose the side path"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=tmp_path / "start")
    assert not (tmp_path / "adapter_model.safetensors").exists()
    with pytest.raises(TypeError, match=r"do not support LoRA conversion.*TalanLayer"):
        convert_to_lora(model, rank=2)
    assert not model.supports_lora_conversion()
    assert torch.equal(logits(model), expected)


def test_rescaling_scales_the_low_rank_half() -> None:
    model = make_model("qwen3", make_config(init_talan_weights=True))
    expected = logits(model)
    with rescale_adapter_scale(model, 0.0):
        assert torch.equal(logits(model), logits(make_base("qwen3")))
    assert torch.equal(logits(model), expected)


def test_disabling_warns_of_trained_biases_as_lora_does() -> None:
    model = make_model("gpt2", make_config(bias="lora_only"))
    with pytest.warns(UserWarning, match="bias configured to be 'lora_only'"), model.disable_adapter():
        logits(model)


def test_generate_takes_tokens_by_position() -> None:
    model, tokens = make_model("qwen3"), make_tokens()
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(tokens, **options), model.generate(input_ids=tokens, **options))


def test_the_representation_names_blocks_and_axes() -> None:
    text = repr(make_model("qwen3", make_config(talan_mixer="linear")))
    assert "(talan): TalanLayer(" in text
    assert "block_index=3" in text and "mixer='linear'" in text


def test_hotswap_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    model = make_model("qwen3", dtype=torch.float32)
    expected = logits(model)
    make_model("qwen3", make_config(talan_alpha=0.5), torch.float32).save_pretrained(tmp_path / "talan")
    make_model("qwen3", make_lora_config(), torch.float32).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but TALAN was passed"):
        hotswap_adapter(model, tmp_path / "talan", "default")
    with pytest.raises(ValueError, match="Incompatible PEFT types found: TALAN and LORA"):
        hotswap_adapter(model, tmp_path / "lora", "default")
    assert torch.equal(logits(model), expected)


def test_every_tuner_layer_gives_its_widths() -> None:
    layers = tuner_layers(make_model("qwen3"))
    assert all(layer.in_features > 0 and layer.out_features > 0 for layer in layers)
    side_paths = [layer for layer in layers if isinstance(layer, TalanLayer)]
    assert {(layer.in_features, layer.out_features) for layer in side_paths} == {(32, 32)}
    # Code that walks over modules asks each for a weight.
    assert not any(hasattr(layer, "weight") for layer in side_paths)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("from_keys", [False, True])
def test_injected_into_a_plain_model(low_cpu_mem_usage: bool, from_keys: bool) -> None:
    trained = two_adapters()
    model = make_base("qwen3")
    for name in ("default", "other"):
        trained.set_adapter(name)
        state = get_peft_model_state_dict(trained, adapter_name=name)
        keys = {key.removeprefix(PREFIX): tensor for key, tensor in state.items()} if from_keys else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            model = inject_adapter_in_model(trained.peft_config[name], model, name, low_cpu_mem_usage, keys)
        model.to(torch.float64)
        result = set_peft_model_state_dict(model, state, name, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.unexpected_keys
        assert not [key for key in result.missing_keys if key.endswith((name, f"{name}.weight"))]
        peft_functional.set_adapter(model, name)
        assert torch.equal(logits(model), logits(trained))
        again = get_peft_model_state_dict(model, adapter_name=name)
        assert {PREFIX + key for key in again} == state.keys()
        assert all(torch.equal(again[key.removeprefix(PREFIX)], tensor) for key, tensor in state.items())
    assert get_model_status(model).active_adapters == ["other"]
    peft_functional.set_requires_grad(model, "other", False)
    assert get_model_status(model).requires_grad == {"default": False, "other": False}
    peft_functional.delete_adapter(model, "other", prefix="lora_")
    assert not [layer for layer in get_layer_status(model) if "other" in layer.available_adapters]


@pytest.mark.parametrize("how", ["config", "device map", "torch device", "other name", "reloaded"])
def test_every_way_to_load(how: str, tmp_path: Path) -> None:
    make_base("qwen3", torch.float32).save_pretrained(tmp_path / "base")
    model = make_model("qwen3", dtype=torch.float32)
    model.save_pretrained(tmp_path / "adapter")
    device_map = {"device_map": {"": "cpu"}} if how == "device map" else {}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **device_map)
    if how == "reloaded":
        torch.manual_seed(9)
        loaded = PeftModel(base, make_config())
        loaded.load_adapter(tmp_path / "adapter", "default")
    else:
        options = {
            "config": {"config": PeftConfig.from_pretrained(tmp_path / "adapter")},
            "device map": device_map,
            "torch device": {"torch_device": "cpu"},
            "other name": {"adapter_name": "another"},
        }[how]
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", **options)
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_a_config_that_is_given_wins_over_the_saved_one(tmp_path: Path) -> None:
    model = make_model("qwen3", make_config(init_lora_weights=True), torch.float32)
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.talan_alpha = 0.0
    loaded = PeftModel.from_pretrained(make_base("qwen3", torch.float32), tmp_path, config=config)
    assert torch.equal(logits(loaded), logits(make_base("qwen3", torch.float32)))


def test_embeddings_instead_of_tokens(architecture: str) -> None:
    model = make_model(architecture)
    tokens = make_tokens()
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(tokens)
        assert torch.equal(model(inputs_embeds=embeddings).logits, logits(model))
    generated = model.generate(inputs_embeds=embeddings, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, model.generate(input_ids=tokens, max_new_tokens=6, do_sample=False)[:, -6:])


def test_a_model_pickles() -> None:
    model = make_model("qwen3")
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), logits(model))
    assert torch.equal(logits(twin.unload()), logits(make_base("qwen3")))
