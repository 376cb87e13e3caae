"""Popular model types, each with what the others do not have; `benchmarks/architectures` tries all of transformers."""

from __future__ import annotations

import re

import pytest
import torch
from peft import get_peft_model

from benchmarks.architectures.compare import examine
from benchmarks.architectures.tiny import make_base
from peft_talan import TalanConfig
from peft_talan.tuner.blocks import find_blocks

CHECKS = ["effect", "causal", "neighbour", "left_padding", "packing", "cached", "checkpointing"]
POPULAR = {
    "causal": ("bamba", "falcon", "gemma4_text", "mamba2", "mpt", "qwen3_next"),
    "image-text": ("gemma4", "mllama"),
    "sequence-to-sequence": ("bart", "m2m_100"),
    "encoder": ("bert", "layoutlm"),
}
# Blocks that pass on several hidden states of each token, or in another order, or run more than once.
STREAMS = {
    "causal": ("cpmant", "deepseek_v4", "gemma3n_text", "hrm_text", "hy_v4", "prophetnet", "qwen4_exp_text", "xlnet"),
    "sequence-to-sequence": ("fsmt",),
    "encoder": ("xlm",),
}


@pytest.mark.parametrize(
    ("family", "model_type"),
    [(family, name) for types in (POPULAR, STREAMS) for family in types for name in types[family]],
)
def test_a_side_path_is_right_wherever_plain_lora_is(family: str, model_type: str) -> None:
    found = examine(family, model_type, CHECKS)
    faults = {
        (check, placement): cell
        for check, cells in found["checks"].items()
        for placement, cell in cells.items()
        if cell["outcome"] not in ("right", "LoRA fails")
    }
    assert not faults
    assert "lora" not in found["checks"]["neighbour"]


@pytest.mark.parametrize(
    ("family", "model_type", "name"),
    [
        ("causal", "git", "git.encoder.layer"),
        ("image-text", "florence2", "model.language_model.decoder.layers"),
        ("image-text", "llama4", "language_model.model.layers"),
        ("sequence-to-sequence", "t5", "decoder.block"),
    ],
)
def test_the_text_decoders_list_of_blocks_is_found_among_several(family: str, model_type: str, name: str) -> None:
    assert find_blocks(make_base(family, model_type), TalanConfig())[0] == name


@pytest.mark.parametrize(
    ("family", "model_type", "reason"),
    [
        ("causal", "reformer", "several hidden states of each token, which the backward pass computes anew"),
        ("encoder", "longformer", "hidden states that are padded to a multiple of the attention window"),
    ],
)
def test_blocks_that_pass_on_what_a_side_path_can_not_read_are_refused(
    family: str, model_type: str, reason: str
) -> None:
    base = make_base(family, model_type)
    names = list(base.state_dict())
    with pytest.raises(ValueError, match=rf"{re.escape(reason)}.*use a plain LoraConfig"):
        get_peft_model(base, TalanConfig(r=0))
    assert list(base.state_dict()) == names


def test_blocks_that_are_called_past_their_hooks_are_refused() -> None:
    base = make_base("encoder", "squeezebert")
    with pytest.raises(ValueError, match=r"SqueezeBertEncoder calls modules by \.forward\(\)"):
        get_peft_model(base, TalanConfig(r=0, talan_memory_scope="bidirectional"))


def test_blocks_that_run_more_than_once_are_named_and_work_where_the_message_says() -> None:
    base = make_base("encoder", "albert")
    options = {"r": 0, "talan_layers": [0], "talan_memory_scope": "bidirectional", "init_talan_weights": False}
    with pytest.raises(ValueError, match=r"set talan_blocks to .*'albert\.encoder\.albert_layer_groups'"):
        get_peft_model(base, TalanConfig(**options))
    tokens = torch.arange(5, 15)[None]
    with torch.no_grad():
        before = base(tokens).logits
        model = get_peft_model(base, TalanConfig(talan_blocks="albert.encoder.albert_layer_groups", **options))
        assert not torch.equal(model(tokens).logits, before)
        with model.disable_adapter():
            torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=0)
