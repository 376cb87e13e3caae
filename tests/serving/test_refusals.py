"""What continuous batching can't run exactly is refused before a request is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import ContinuousBatchingConfig, GenerationConfig

from tests.small_models import make_config, make_model, make_several, make_tokens

PAGES = {"page_size": 8, "num_blocks": 32, "max_batch_tokens": 32}


def start(model: Any, **options: Any) -> None:
    config = ContinuousBatchingConfig(**{**PAGES, **options})
    model.init_continuous_batching(GenerationConfig(max_new_tokens=2, eos_token_id=-1), config)


@pytest.mark.parametrize("space", [None, 1.0])
def test_pages_that_move_to_the_cpu_are_refused(space: float | None) -> None:
    model = make_model("qwen3", dtype=torch.float32)
    attention = model.config._attn_implementation
    for served in (model, model.base_model.model):
        with pytest.raises(ValueError, match=r"cpu_offload_space=.*set cpu_offload_space=0"):
            start(served, cpu_offload_space=space)
    with pytest.raises(ValueError, match=r"cpu_offload_space=.*set cpu_offload_space=0"):
        model.generate_batch(
            make_tokens().tolist(), continuous_batching_config=ContinuousBatchingConfig(cpu_offload_space=space)
        )
    assert model.config._attn_implementation == attention
    with model.disable_adapter():
        start(model, cpu_offload_space=0.5)
    with pytest.raises(ValueError, match=r"cpu_offload_space=.*set cpu_offload_space=0"):
        start(model.merge_and_unload(), cpu_offload_space=space)


def test_a_bidirectional_memory_is_refused() -> None:
    model = make_model("qwen3", make_config(talan_memory_scope="bidirectional", task_type=None), dtype=torch.float32)
    with pytest.raises(ValueError, match="talan_memory_scope='bidirectional' of adapter 'default' can't generate"):
        start(model)


def generate_paged(model: PeftModel) -> None:
    model.generate(input_ids=make_tokens(), cache_implementation="paged", adapter_names=["one", "other"])


def generate_batch(model: PeftModel) -> None:
    model.generate_batch(make_tokens().tolist(), adapter_names=["one", "other"])


@pytest.mark.parametrize("call", [generate_paged, generate_batch])
def test_batches_of_mixed_adapters_are_refused(call: Any) -> None:
    model = make_several({"one": {}, "other": {}})
    with pytest.raises(ValueError, match=r"adapter_names=.*set_adapter\(name\)"):
        call(model)
