"""Every option of `LoraConfig` does what it does in LoRA, and what it trains is saved beside the side path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, initialize_lora_eva_weights
from torch import nn

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
    assert all(p.grad is not None and p.grad.any() for p in fresh.parameters() if p.requires_grad)
    fresh.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(architecture, torch.float32), tmp_path)
    assert torch.equal(logits(loaded), logits(fresh))
    assert not torch.allclose(logits(fresh), logits(lora))


STARTS = [True, "gaussian", "olora", "pissa", "pissa_niter_4", "orthogonal"]


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
