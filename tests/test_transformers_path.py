"""transformers' own way to adapters, without PEFT's wrapper: both halves, exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from .small_models import EXPERTS, VOCABULARY, make_base, make_config, make_lora_config, make_model, make_tokens


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(make_tokens()).logits


def save(folder: Path, architecture: str = "qwen3", **options: object) -> PeftModel:
    """An adapter and its base model; magnitudes are changed, so that one that starts anew would show."""
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


def test_dora_of_plain_lora_is_not_lost_either(tmp_path: Path) -> None:
    model = make_model("qwen3", make_lora_config(use_dora=True, init_lora_weights=False), torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1.25)
    model.save_pretrained(tmp_path)
    loaded = make_base("qwen3", torch.float32)
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))


def test_adapters_are_loaded_switched_and_deleted(tmp_path: Path) -> None:
    first = save(tmp_path / "first")
    second = save(tmp_path / "second", talan_layers=[0, 1], talan_mixer="mlp", talan_writeback="gated")
    model = make_base("qwen3", torch.float32)
    plain = logits(model)
    model.load_adapter(str(tmp_path / "first" / "adapter"), "first")
    model.load_adapter(str(tmp_path / "second" / "adapter"), "second")
    for name, twin in (("first", first), ("second", second)):
        model.set_adapter(name)
        assert torch.equal(logits(model), logits(twin))
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), logits(second))
    model.delete_adapter("second")
    assert not any(".second" in name for name in model.state_dict())
    model.set_adapter("first")
    assert torch.equal(logits(model), logits(first))
    model.delete_adapter("first")
    assert torch.equal(logits(model), plain)


def test_added_adapter_trains_and_is_saved(tmp_path: Path) -> None:
    model = make_base("qwen3", torch.float32)
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
    by_peft = PeftModel.from_pretrained(make_base("qwen3", torch.float32), tmp_path).eval()
    assert torch.equal(logits(by_peft), logits(model))
    by_transformers = make_base("qwen3", torch.float32)
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
