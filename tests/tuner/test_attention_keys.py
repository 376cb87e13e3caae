"""Keys and queries of `delta` side paths that start from the attention of their blocks."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn

from peft_talan import TalanLayer, initialize_talan_keys

from ..small_models import make_base, make_config, make_model, make_tokens

DELTA = {"talan_mixer": "delta", "talan_position": "input", "init_talan_weights": True}
SLOTS, WIDTH = 16, 5
"""As many as the small models' keys have channels: nothing of the scores is cut off."""


def reads_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if "talan_read" in name}


@torch.no_grad()
@pytest.mark.parametrize("with_low_rank", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma3"])
def test_keys_and_queries_score_tokens_as_the_blocks_attention_does(architecture: str, with_low_rank: bool) -> None:
    config = make_config(**DELTA, talan_slots=SLOTS, talan_dim=WIDTH, r=4 if with_low_rank else 0)
    base = make_base(architecture)
    for name, parameter in base.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter)
    model = PeftModel(base, config)
    before = reads_of(model)
    before = {name: value.clone() for name, value in before.items()}
    initialize_talan_keys(model)
    stream = torch.randn(7, base.config.hidden_size, dtype=torch.float64)
    stream /= stream.square().mean(-1, keepdim=True).sqrt()
    for block in model.modules():
        for layer in (child for child in block.children() if isinstance(child, TalanLayer)):
            attention, x = block.self_attn, block.input_layernorm(stream)
            with model.disable_adapter():
                queries = attention.q_proj(x).unflatten(-1, (-1, attention.head_dim))
                keys = attention.k_proj(x).unflatten(-1, (-1, attention.head_dim))
            keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
            expected = torch.einsum("thd,ihd->ti", queries, keys)
            read = layer.lora_talan_read["default"].values
            found = (stream @ read[WIDTH : WIDTH + SLOTS].T) @ (stream @ read[-SLOTS:].T).T
            ratio = found.norm() / expected.norm()
            torch.testing.assert_close(found, ratio * expected, rtol=1e-4, atol=1e-4 * float(found.abs().max()))
    # Values and gates stay.
    for name, value in reads_of(model).items():
        assert torch.equal(value[:WIDTH], before[name][:WIDTH])
        assert torch.equal(value[WIDTH + SLOTS : -SLOTS], before[name][WIDTH + SLOTS : -SLOTS])
        assert not torch.equal(value, before[name])


@torch.no_grad()
def test_fewer_slots_take_the_strongest_directions_and_the_model_is_still_the_base_model() -> None:
    config = make_config(**DELTA, talan_slots=2, init_lora_weights=True)
    model = make_model("llama", config)
    more = make_model("llama", make_config(**{**DELTA, "talan_slots": SLOTS}))
    initialize_talan_keys(model)
    initialize_talan_keys(more)
    for few, all_of_them in zip(reads_of(model).values(), reads_of(more).values(), strict=True):
        few, strongest = few[-2:], all_of_them[-SLOTS:][:2]
        torch.testing.assert_close(few / few.norm(), strongest / strongest.norm())
    assert torch.equal(model(make_tokens()).logits, make_base("llama")(make_tokens()).logits)


@pytest.mark.parametrize(
    ("architecture", "options", "adapter_name", "error"),
    [
        ("llama", {"talan_mixer": "attention"}, "default", "talan_mixer='attention' has no keys"),
        ("llama", {"talan_position": "output"}, "default", "talan_position='output'"),
        ("llama", {}, "other", "adapter_name='other'"),
        ("llama", {"init_talan_weights": False}, "default", "adapter_name='default': its write-back isn't zero"),
        ("llama", {"talan_slots": SLOTS + 1}, "default", f"talan_slots={SLOTS + 1}: the block's keys have {SLOTS}"),
        ("gpt2", {"target_modules": ["c_attn"]}, "default", "model: GPT2Block has no attention"),
    ],
)
def test_what_has_no_keys_to_start_from_is_refused(
    architecture: str, options: dict[str, object], adapter_name: str, error: str
) -> None:
    model = make_model(architecture, make_config(**{**DELTA, **options}))
    before = {name: value.clone() for name, value in reads_of(model).items()}
    with pytest.raises(ValueError, match=error):
        initialize_talan_keys(model, adapter_name)
    assert all(torch.equal(value, before[name]) for name, value in reads_of(model).items())
