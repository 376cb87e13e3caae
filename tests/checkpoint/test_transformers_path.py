"""transformers' own way to adapters, without PEFT's wrapper: LoRA weights and side path, exactly."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from ..small_models import (
    CONFIGS,
    EXPERTS,
    VOCABULARY,
    adapter_calls_of_transformers,
    logits,
    make_base,
    make_config,
    make_lora_config,
    make_model,
    make_several,
    make_tokens,
    rounding,
)

subfolders = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="before 5.23, transformers looks for a local adapter above its subfolder",
)


def save(folder: Path, architecture: str = "qwen3", **options: object) -> PeftModel:
    """An adapter and its base model; magnitudes are changed, so that one that starts again would show."""
    model = make_model(architecture, make_config(**options), torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1.25)
    make_base(architecture, torch.float32).save_pretrained(folder / "base")
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("dora", [False, True])
def test_auto_class_gives_both_halves(architecture: str, dora: bool, tmp_path: Path) -> None:
    options = {"use_dora": True} if dora else {}
    if dora and architecture in ("mixtral", "qwen3_moe"):
        options["target_modules"] = ["q_proj", "v_proj"]  # PEFT has no DoRA for fused experts
    model = save(tmp_path, architecture, **options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", **EXPERTS).eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "how",
    [
        "folder",
        pytest.param("subfolder", marks=subfolders),
        "revision",
        "tensors",
        "to train",
        "low memory",
        "on a device",
    ],
)
def test_every_way_to_load(how: str, tmp_path: Path) -> None:
    twin = save(tmp_path)
    adapter = tmp_path / "adapter"
    options: dict[str, object] = {"peft_model_id": str(adapter)}
    options |= {
        "folder": {},
        "subfolder": {"peft_model_id": str(tmp_path), "adapter_kwargs": {"subfolder": "adapter"}},
        "revision": {"adapter_kwargs": {"revision": "main"}},
        "tensors": {
            "peft_model_id": None,
            "peft_config": PeftConfig.from_pretrained(adapter),
            "adapter_state_dict": load_file(adapter / "adapter_model.safetensors"),
        },
        "to train": {"is_trainable": True},
        "low memory": {"low_cpu_mem_usage": True},
        "on a device": {"device_map": {"": "cpu"}},
    }[how]
    model = make_base("qwen3", torch.float32)
    info = model.load_adapter(**options, adapter_name="mine")
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert torch.equal(logits(model.eval()), logits(twin))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert bool(trained) == (how == "to train")
    if trained:
        assert {".talan." in name for name in trained} == {True, False}


@adapter_calls_of_transformers
def test_state_dict_of_a_loaded_adapter(tmp_path: Path) -> None:
    twin = save(tmp_path)
    model = make_base("qwen3", torch.float32)
    model.load_adapter(str(tmp_path / "adapter"), adapter_name="mine")
    state, expected = model.get_adapter_state_dict("mine"), get_peft_model_state_dict(twin)
    assert {f"base_model.model.{key}" for key in state} == expected.keys()
    assert all(torch.equal(expected[f"base_model.model.{key}"], tensor) for key, tensor in state.items())


@subfolders
def test_auto_class_takes_adapter_kwargs(tmp_path: Path) -> None:
    twin = save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, adapter_kwargs={"subfolder": "adapter"}).eval()
    assert torch.equal(logits(loaded), logits(twin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_class_gives_both_halves_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    make_base("qwen3", dtype).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    torch.manual_seed(1)
    model = get_peft_model(base, make_config(), autocast_adapter_dtype=False).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=dtype).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_auto_class_gives_an_adapter_the_type_of_its_base_as_it_does_with_lora(tmp_path: Path) -> None:
    make_base("qwen3", torch.bfloat16).save_pretrained(tmp_path / "base")
    for kind, config in (("talan", make_config()), ("lora", make_lora_config(init_lora_weights=False))):
        torch.manual_seed(1)
        get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(
            tmp_path / kind
        )
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / kind).eval()
        assert {p.dtype for name, p in loaded.named_parameters() if "lora_" in name} == {torch.bfloat16}
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        by_peft = PeftModel.from_pretrained(base, tmp_path / kind, autocast_adapter_dtype=False)
        assert torch.equal(logits(loaded), logits(by_peft))


def test_a_head_that_was_trained_comes_with_both_halves(tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_config(copy.deepcopy(CONFIGS["qwen3"]))
    base.to(torch.float32).save_pretrained(tmp_path / "base")
    config = make_config(task_type="SEQ_CLS")
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), config).eval()
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))
    with model.disable_adapter():
        assert not torch.allclose(logits(model), logits(loaded))


@adapter_calls_of_transformers
def test_hotswap_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    save(tmp_path / "first")
    twin = save(tmp_path / "second", talan_layers=[0], talan_mixer="linear")
    model = make_base("qwen3", torch.float32)
    model.load_adapter(str(tmp_path / "first" / "adapter"))
    expected = logits(model)
    with pytest.raises(ValueError, match="only supported for LoRA, please set `hotswap=False`"):
        model.load_adapter(str(tmp_path / "second" / "adapter"), adapter_name="default", hotswap=True)
    assert torch.equal(logits(model), expected)
    # What to do instead.
    model.delete_adapter("default")
    model.load_adapter(str(tmp_path / "second" / "adapter"), hotswap=False)
    assert torch.equal(logits(model), logits(twin))


@adapter_calls_of_transformers
def test_adapters_are_active_at_once() -> None:
    kinds = {"first": {"talan_layers": [0, -1]}, "second": {"talan_layers": [1], "talan_mixer": "linear", "r": 2}}
    wrapped = make_several(kinds)
    model = make_base("qwen3")
    for name, options in kinds.items():
        model.add_adapter(make_config(**options), name)
        state = get_peft_model_state_dict(wrapped, adapter_name=name)
        set_peft_model_state_dict(model.to(torch.float64), state, name)
    model.set_adapter(["first", "second"])
    assert model.active_adapters() == ["first", "second"]
    wrapped.base_model.set_adapter(["first", "second"])
    assert torch.equal(logits(model), logits(wrapped))
    options = {"input_ids": make_tokens(), "max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    generated = model.generate(**options)
    assert torch.equal(generated, wrapped.generate(**options))
    assert torch.equal(generated, model.generate(**options, use_cache=False))
    model.delete_adapter(["first", "second"])
    assert torch.equal(logits(model), logits(make_base("qwen3")))


@adapter_calls_of_transformers
def test_deleting_an_active_adapter_leaves_one_whole_adapter_active() -> None:
    kinds = {"first": {"talan_layers": [0]}, "second": {"talan_layers": [1]}, "third": {"talan_layers": [1, 2]}}
    model = make_base("qwen3")
    for name, options in kinds.items():
        torch.manual_seed(3)
        model.add_adapter(make_config(**options), name)
    model.to(torch.float64).eval()
    model.set_adapter("first")
    expected = logits(model)
    model.set_adapter("third")
    with pytest.warns(UserWarning, match="Setting active adapter to first"):
        model.delete_adapter("third")
    assert model.active_adapters() == ["first"]
    assert torch.equal(logits(model), expected)


def assert_same(model: nn.Module, twin: PeftModel, name: str) -> None:
    """Bitwise the same tensors. transformers leaves them where they lie in the file, and how a matrix product rounds
    depends on how the memory is aligned."""
    state, expected = get_peft_model_state_dict(model, adapter_name=name), get_peft_model_state_dict(twin)
    assert {f"base_model.model.{key}" for key in state} == expected.keys()
    assert all(torch.equal(expected[f"base_model.model.{key}"], tensor) for key, tensor in state.items())
    torch.testing.assert_close(logits(model), logits(twin), **rounding(torch.float32))


@adapter_calls_of_transformers
def test_adapters_are_loaded_switched_and_deleted(architecture: str, tmp_path: Path) -> None:
    first = save(tmp_path / "first", architecture)
    second = save(tmp_path / "second", architecture, talan_layers=[0, 1], talan_mixer="mlp", talan_writeback="gated")
    model = make_base(architecture, torch.float32)
    plain = logits(model)
    model.load_adapter(str(tmp_path / "first" / "adapter"), "first")
    model.load_adapter(str(tmp_path / "second" / "adapter"), "second")
    for name, twin in (("first", first), ("second", second)):
        model.set_adapter(name)
        assert_same(model, twin, name)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert_same(model, second, "second")
    model.delete_adapter("second")
    assert not any(".second" in name for name in model.state_dict())
    model.set_adapter("first")
    assert_same(model, first, "first")
    model.delete_adapter("first")
    assert torch.equal(logits(model), plain)


@adapter_calls_of_transformers
def test_added_adapter_trains_and_is_saved(architecture: str, tmp_path: Path) -> None:
    model = make_base(architecture, torch.float32)
    expected = logits(model)
    model.add_adapter(make_config(init_lora_weights=True, init_talan_weights=True))
    assert torch.equal(logits(model), expected)
    model.train()
    tokens = make_tokens()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.eval()
    assert not torch.allclose(logits(model), expected)
    model.save_pretrained(tmp_path)
    by_peft = PeftModel.from_pretrained(make_base(architecture, torch.float32), tmp_path).eval()
    assert torch.equal(logits(by_peft), logits(model))
    by_transformers = make_base(architecture, torch.float32)
    by_transformers.load_adapter(str(tmp_path))
    assert torch.equal(logits(by_transformers), logits(model))


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0")


def test_pipeline_takes_the_adapter(tmp_path: Path) -> None:
    model = save(tmp_path)
    tokenizer = make_tokenizer()
    generate = pipeline("text-generation", model=str(tmp_path / "adapter"), tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "do_sample": False}
    prompt = tokenizer("w5 w7 w11", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(input_ids=prompt, **options)[0, prompt.shape[1] :])
    assert generate("w5 w7 w11", return_full_text=False, **options) == [{"generated_text": expected}]
