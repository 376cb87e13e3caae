"""Every option of `LoraConfig` does what it does in LoRA, and what it trains is saved beside the side path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    BdLoraConfig,
    KasaConfig,
    LoraConfig,
    LoraGAConfig,
    MontecloraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
)
from peft.tuners.lora import VeloraConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig, LoftQConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.other import cast_mixed_precision_params
from torch import nn

from peft_talan import TalanConfig

from ..small_models import logits, make_base, make_config, make_lora_config, make_model, make_tokens

OPTIONS: dict[str, tuple[str, dict[str, object]]] = {
    "modules to save": ("qwen3", {"modules_to_save": ["lm_head"]}),
    "token indices": ("qwen3", {"trainable_token_indices": [3, 5, 9]}),
    "bias none": ("gpt2", {"bias": "none"}),
    "bias all": ("gpt2", {"bias": "all"}),
    "bias lora only": ("gpt2", {"bias": "lora_only"}),
    "parameters": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    "two parameters": (
        "qwen3_moe",
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "embeddings": ("qwen3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "rank pattern": ("qwen3", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "excluded": ("qwen3", {"exclude_modules": ["k_proj"]}),
    "layers": ("qwen3", {"target_modules": ["q_proj"], "layers_to_transform": [1, 3]}),
    "layers of one kind": (
        "qwen3",
        {"target_modules": ["q_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
    ),
    "bias of the matrices": ("qwen3", {"lora_bias": True}),
    "block-diagonal": (
        "qwen3",
        {"use_bdlora": BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=2, match_strict=False)},
    ),
    "spectra": ("qwen3", {"kasa_config": KasaConfig()}),
    "samples": ("qwen3", {"monteclora_config": MontecloraConfig(num_samples=2)}),
    "compressed activations": ("qwen3", {"velora_config": VeloraConfig(num_groups=4)}),
    "modules by expression": ("qwen3", {"target_modules": r".*\.layers\.[13]\.self_attn\.(q|v)_proj"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_lora_options_train_and_come_back(option: str, tmp_path: Path) -> None:
    architecture, options = OPTIONS[option]

    def model_of(config: LoraConfig) -> PeftModel:
        model = make_model(architecture, config, torch.float32)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=generator)
        return model

    fresh = model_of(make_config(**options, init_lora_weights=True, init_talan_weights=True))
    lora = model_of(make_lora_config(**options))
    assert torch.equal(logits(fresh), logits(lora))

    def trainable(model: nn.Module) -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad and ".talan." not in name}

    assert trainable(fresh) == trainable(lora)
    tokens = make_tokens()
    optimizer = torch.optim.SGD([p for p in fresh.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # the write-back begins at zero, so the rest of the side path moves at the second step
        optimizer.zero_grad()
        fresh(tokens, labels=tokens).loss.backward()
        optimizer.step()
    # MonteCLoRA's samplers learn by a loss of their own.
    trained = [p for name, p in fresh.named_parameters() if p.requires_grad and "monteclora" not in name]
    assert all(p.grad is not None and p.grad.any() for p in trained)
    fresh.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(architecture, torch.float32), tmp_path)
    assert torch.equal(logits(loaded), logits(fresh))
    assert not torch.allclose(logits(fresh), logits(lora))


STARTS = [True, "gaussian", "olora", "pissa", "pissa_niter_4", "orthogonal", "mica"]


@pytest.mark.parametrize("start", STARTS)
def test_every_start_of_the_low_rank_half_is_that_of_lora(start: bool | str) -> None:
    talan = make_config(init_lora_weights=start, init_talan_weights=True)
    lora = make_lora_config(init_lora_weights=start)
    models = [make_model("qwen3", config, torch.float32) for config in (talan, lora)]
    assert torch.equal(*map(logits, models))
    halves = [get_peft_model_state_dict(model) for model in models]
    assert all(torch.equal(halves[0][key], tensor) for key, tensor in halves[1].items())


def test_the_low_rank_half_starts_from_activations_as_lora_does() -> None:
    batches = [{"input_ids": make_tokens(seed=seed), "attention_mask": torch.ones(2, 21)} for seed in range(4)]
    options = {"init_lora_weights": "eva", "target_modules": ["q_proj"], "r": 2}
    models = []
    for config in (make_config(**options, init_talan_weights=True), make_lora_config(**options)):
        models.append(make_model("qwen3", config, torch.float32))
        initialize_lora_eva_weights(models[-1], batches, show_progress_bar=False)
    halves = [get_peft_model_state_dict(model) for model in models]
    assert all(torch.equal(halves[0][key], tensor) for key, tensor in halves[1].items())
    assert not torch.equal(logits(models[0]), logits(make_model("qwen3", make_config(r=2), torch.float32)))


def by_covariance(base: nn.Module, config: LoraConfig) -> None:
    # It reads one row a call.
    preprocess_corda(base, config, run_model=lambda: [base(make_tokens(batch=1, seed=seed)) for seed in range(2)])


def by_gradient(base: nn.Module, config: LoraConfig) -> None:
    tokens = make_tokens()
    preprocess_loraga(base, config, lambda: base(tokens, labels=tokens).loss.backward())


DATA_STARTS: dict[str, tuple[Callable[[nn.Module, LoraConfig], None], dict[str, Any]]] = {
    "knowledge": (by_covariance, {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")}),
    "instructions": (by_covariance, {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="ipm")}),
    "gradients": (by_gradient, {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}),
}


@pytest.mark.parametrize("start", DATA_STARTS)
def test_the_low_rank_half_starts_from_data_as_lora_does(start: str, tmp_path: Path) -> None:
    prepare, options = DATA_STARTS[start]
    models = []
    for make, others in ((make_config, {"init_talan_weights": False}), (make_lora_config, {})):
        config = make(**options, **others, target_modules=["q_proj"], r=2)
        base = make_base("qwen3", torch.float32)
        prepare(base, config)
        torch.manual_seed(1)
        models.append(get_peft_model(base, config).eval())
    talan, lora = models
    halves = [get_peft_model_state_dict(model) for model in models]
    assert all(torch.equal(halves[0][key], tensor) for key, tensor in halves[1].items())
    others = lora.state_dict()
    assert all(torch.equal(p, others[name]) for name, p in talan.state_dict().items() if "talan" not in name)
    assert not torch.equal(logits(talan), logits(lora))
    # As PEFT says of these starts, which change the base weights: not a second time.
    talan.peft_config["default"].init_lora_weights = True
    talan.save_pretrained(tmp_path)
    base = make_base("qwen3", torch.float32)
    kept = {name.replace("base_layer.", ""): p for name, p in lora.get_base_model().state_dict().items()}
    base.load_state_dict({name: p for name, p in kept.items() if "lora_" not in name})
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(talan))


def test_the_start_of_quantized_bases_is_passed_on_and_saved(tmp_path: Path) -> None:
    """LoftQ itself computes on an accelerator only."""
    config = make_config(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=2))
    assert config.loftq_config == {"loftq_bits": 2, "loftq_iter": 1}
    config.save_pretrained(tmp_path)
    assert TalanConfig.from_pretrained(str(tmp_path)).loftq_config == config.loftq_config


def test_a_model_that_peft_casts_for_mixed_precision() -> None:
    models = [make_model("qwen3", make_config(init_talan_weights=True, init_lora_weights=True), torch.float32)]
    models.append(make_model("qwen3", make_lora_config(), torch.float32))
    for model in models:
        cast_mixed_precision_params(model, torch.bfloat16)
    assert {p.dtype for p in models[0].parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(*map(logits, models))
    with torch.autocast("cpu", torch.bfloat16):
        models[0](make_tokens(), labels=make_tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in models[0].parameters() if p.requires_grad)
