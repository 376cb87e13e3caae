"""Precision and quantization: adapters train, save, load and generate on every base that LoRA does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig
from torchao.utils import TorchAOBaseTensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    GgufConfig,
    PreTrainedModel,
    TorchAoConfig,
)

from peft_talan import TalanLayer

from ..small_models import (
    CONFIGS,
    DEPTH,
    VOCABULARY,
    logits,
    make_base,
    make_config,
    make_lora_config,
    make_model,
    make_tokens,
    rounding,
)

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
WIDTH = 64
"""Quantized weights come in blocks of 32 or 64 numbers."""
FEW = {"target_modules": ["q_proj"]}


def train_a_step(model: PeftModel) -> None:
    model.train()
    tokens = make_tokens()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in trained)
    optimizer.step()
    model.eval()


def dtypes(model: nn.Module) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """The types of the LoRA weights and of the side path."""
    named = [(name, parameter.dtype) for name, parameter in model.named_parameters() if "lora_" in name]
    return {dtype for name, dtype in named if ".talan." not in name}, {d for name, d in named if ".talan." in name}


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("way", ["get_peft_model", "from_pretrained", "add_adapter", "load_adapter"])
def test_both_halves_have_the_type_that_lora_has(
    way: str, autocast_adapter_dtype: bool, half: str, tmp_path: Path
) -> None:
    options = {"autocast_adapter_dtype": autocast_adapter_dtype}
    found = {}
    for kind, config in (("talan", make_config(**FEW)), ("lora", make_lora_config(**FEW))):
        base = make_base("qwen3", HALF[half])
        if way == "from_pretrained":
            get_peft_model(make_base("qwen3", HALF[half]), config).save_pretrained(tmp_path / kind)
            found[kind] = PeftModel.from_pretrained(base, tmp_path / kind, **options)
            continue
        found[kind] = get_peft_model(base, config, **options)
        if way == "add_adapter":
            found[kind].add_adapter("other", copy.deepcopy(config), **options)
        elif way == "load_adapter":
            found[kind].save_pretrained(tmp_path / kind)
            found[kind].load_adapter(tmp_path / kind, "other", **options)
    (expected, _), both = dtypes(found["lora"]), dtypes(found["talan"])
    assert expected == {torch.float32 if autocast_adapter_dtype else HALF[half]}
    assert both == (expected, expected)


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("adapter", ["float32", "half"])
def test_half_precision_trains_comes_back_and_generates(half: str, adapter: str, tmp_path: Path) -> None:
    options = {"autocast_adapter_dtype": adapter == "float32"}
    fresh = make_config(init_lora_weights=True, init_talan_weights=True)
    torch.manual_seed(1)
    model = get_peft_model(make_base("qwen3", HALF[half]), fresh, **options)
    assert torch.equal(logits(model), logits(make_base("qwen3", HALF[half])))
    for _ in range(2):  # the write-back and B begin at zero
        model.zero_grad()
        model.train()
        model(input_ids=make_tokens(), labels=make_tokens()).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    assert all(p.grad.any() and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base("qwen3", HALF[half]), tmp_path, **options)
    assert logits(loaded).dtype == HALF[half]
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(model), logits(make_base("qwen3", HALF[half])))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make_base("qwen3", HALF[half])))
    greedy = {"input_ids": make_tokens(), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(**greedy), model.generate(**greedy))


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("way", ["load_state_dict", "copy_", ".data.copy_", "PEFT", "copied"])
def test_a_side_path_in_half_precision_decodes_as_the_same_numbers_in_float32(half: str, way: str) -> None:
    """Whatever is written into it, in whatever mode, between two tokens of one generation."""
    config = make_config(r=0, talan_layers="all")
    models, caches = {}, {}
    for autocast in (True, False):
        torch.manual_seed(1)
        model = get_peft_model(make_base("qwen3", HALF[half]), config, autocast_adapter_dtype=autocast).eval()
        models[autocast], caches[autocast] = model, DynamicCache(config=model.config)
    assert [dtypes(models[autocast])[1] for autocast in (True, False)] == [{torch.float32}, {HALF[half]}]
    tokens = make_tokens()
    for step, part in enumerate(tokens.split([12, *[1] * 9], dim=1)):
        generator, found = torch.Generator().manual_seed(step), []
        drawn = {
            name: torch.randn(p.shape, generator=generator).to(HALF[half])
            for name, p in models[False].named_parameters()
            if ".talan." in name
        }
        for autocast, model in models.items():
            if way == "load_state_dict":
                model.load_state_dict(drawn, strict=False)
            elif way == "PEFT":
                state = get_peft_model_state_dict(model)
                names = dict(zip(state, drawn, strict=True))
                set_peft_model_state_dict(model, {name: drawn[own] for name, own in names.items()})
            elif way == "copied":
                models[autocast] = model = copy.deepcopy(model)
                caches[autocast] = copy.deepcopy(caches[autocast])
            for name, parameter in model.named_parameters():
                if name in drawn and way in ("copy_", ".data.copy_"):
                    with torch.no_grad():
                        (parameter if way == "copy_" else parameter.data).copy_(drawn[name])
            # Two tokens each.
            with torch.inference_mode() if step // 2 % 2 else torch.no_grad():
                found.append(model.train(step % 3 == 2)(part, past_key_values=caches[autocast]).logits.clone())
        assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("position", ["input", "output"])
def test_autocast_leaves_the_side_path_in_float32(half: str, position: str) -> None:
    model = make_model("qwen3", make_config(talan_position=position, r=0), torch.float32)
    layer = model.base_model.model.model.layers[1].talan
    seen: list[tuple[tuple[object, ...], torch.Tensor]] = []
    handle = layer.register_forward_hook(lambda _, args, output: seen.append((args, output)))
    with torch.autocast("cpu", dtype=HALF[half]):
        assert model(make_tokens(), use_cache=False).logits.dtype == HALF[half]
    handle.remove()
    calls = [(args, output) for args, output in seen if args[1] == position]
    assert calls
    for args, output in calls:
        assert not torch.equal(output, args[0])
        assert torch.equal(layer(*args), output)


def write_gguf(folder: Path) -> None:
    """A small Llama in the format of llama.cpp, its matrices in blocks of 8-bit numbers."""
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(DEPTH)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{token}" for token in range(VOCABULARY)])
    random = numpy.random.default_rng(0)
    matrices = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH)}
    norms = ["output_norm"]
    for block in range(DEPTH):
        place = f"blk.{block}."
        matrices |= {f"{place}{name}": (WIDTH, WIDTH) for name in ("attn_q", "attn_output")}
        matrices |= {f"{place}{name}": (WIDTH // 2, WIDTH) for name in ("attn_k", "attn_v")}
        matrices |= {f"{place}{name}": (2 * WIDTH, WIDTH) for name in ("ffn_gate", "ffn_up")}
        matrices[f"{place}ffn_down"] = (WIDTH, 2 * WIDTH)
        norms += [f"{place}attn_norm", f"{place}ffn_norm"]
    for name, shape in matrices.items():
        values = random.normal(0, 0.05, shape).astype(numpy.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in norms:
        writer.add_tensor(f"{name}.weight", numpy.ones(WIDTH, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bits_and_bytes(dtype: torch.dtype = torch.float32, **options: object) -> dict[str, object]:
    return {"dtype": dtype, "quantization_config": BitsAndBytesConfig(**options)}


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTIZED: dict[str, Callable[[], dict[str, object]]] = {
    "bitsandbytes 4-bit": lambda: bits_and_bytes(**NF4, bnb_4bit_compute_dtype=torch.float32),
    "bitsandbytes 4-bit, bfloat16": lambda: bits_and_bytes(
        torch.bfloat16, **NF4, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "bitsandbytes 8-bit": lambda: bits_and_bytes(load_in_8bit=True),
    "torchao int8": lambda: {
        "dtype": torch.float32,
        "quantization_config": TorchAoConfig(Int8WeightOnlyConfig()),
    },
    "torchao int8, bfloat16": lambda: {
        "dtype": torch.bfloat16,
        "quantization_config": TorchAoConfig(Int8WeightOnlyConfig()),
    },
    "gguf": lambda: {
        "dtype": torch.float32,
        "gguf_file": "model.gguf",
        "quantization_config": GgufConfig(dequantize=True),
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = copy.deepcopy(CONFIGS["qwen3"])
    config.hidden_size, config.intermediate_size, config.head_dim = WIDTH, 2 * WIDTH, 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_gguf(folder)
    return folder


def load(folder: Path, kind: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **QUANTIZED[kind]()).eval()


def adapt(folder: Path, kind: str, config: LoraConfig, **options: object) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(load(folder, kind), config, **options).eval()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base weights by their own names, as plain tensors."""
    state = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): (
            tensor.dequantize() if isinstance(tensor, TorchAOBaseTensor) else tensor.clone()
        )
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    }


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_base_trains_comes_back_and_generates(kind: str, folder: Path, tmp_path: Path) -> None:
    """Training and saving come before the first evaluation of each model, and the state dict of the base after it.

    On processors with AVX512-BF16, bitsandbytes packs 4-bit weights at the first evaluation: from then on they compute
    in bfloat16, pass on no gradients, and a state dict unpacks them with rounded scales.
    """
    base = load(folder, kind)
    expected, untouched = logits(base), weights(base)
    fresh = {"init_lora_weights": True, "init_talan_weights": True}
    assert torch.equal(logits(adapt(folder, kind, make_config(**fresh))), expected)

    model = adapt(folder, kind, make_config())
    train_a_step(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder, kind), tmp_path)
    saved, again = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[key], again[key]) for key in saved)
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(loaded), logits(model))
    options = {"input_ids": make_tokens(), "max_new_tokens": 6, "do_sample": False}
    generated = model.generate(**options)
    assert torch.equal(loaded.generate(**options), generated)
    assert torch.equal(model.generate(**options, use_cache=False), generated)

    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), expected)
    after = weights(unloaded)
    assert after.keys() == untouched.keys()
    assert all(torch.equal(after[name], untouched[name]) for name in untouched)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapters_of_quantized_bases_have_the_type_that_lora_has(
    kind: str, autocast_adapter_dtype: bool, folder: Path
) -> None:
    options = {"autocast_adapter_dtype": autocast_adapter_dtype}
    expected, _ = dtypes(adapt(folder, kind, make_lora_config(**FEW), **options))
    assert dtypes(adapt(folder, kind, make_config(**FEW), **options)) == (expected, expected)


@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit", "bitsandbytes 8-bit"])
def test_prepared_for_kbit_training(kind: str, folder: Path) -> None:
    gradients = {}
    for checkpointing in (True, False):
        base = prepare_model_for_kbit_training(load(folder, kind), use_gradient_checkpointing=checkpointing)
        torch.manual_seed(1)
        model = get_peft_model(base, make_config(**FEW))
        train_a_step(model)
        gradients[checkpointing] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[True].items():
        torch.testing.assert_close(gradient, gradients[False][name], **rounding(torch.float32))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_merging_into_a_quantized_base_keeps_the_side_path_live(kind: str, folder: Path) -> None:
    """PEFT quantizes the merged weights again, so what is exact here is what the side path adds to them."""
    model = adapt(folder, kind, make_config(**FEW))
    lora = adapt(folder, kind, make_lora_config(**FEW))
    state = {key: t for key, t in get_peft_model_state_dict(model).items() if ".talan." not in key}
    set_peft_model_state_dict(lora, state)
    for either in (model, lora):
        either.merge_adapter()
    assert not torch.equal(logits(model), logits(lora))
    for layer in (module for module in model.modules() if isinstance(module, TalanLayer)):
        layer.enable_adapters(False)
    assert torch.equal(logits(model), logits(lora))
