"""What continuous batching can't run exactly is refused before a request is taken."""

from __future__ import annotations

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from tests.small_models import make_model, make_tokens

PAGES = ContinuousBatchingConfig(page_size=8, num_blocks=32, max_batch_tokens=32)


def start(model: PreTrainedModel) -> None:
    model.init_continuous_batching(GenerationConfig(max_new_tokens=2, eos_token_id=-1), PAGES)


def test_continuous_batching_is_refused_before_a_request_is_taken() -> None:
    model = make_model("qwen3", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"use model\.generate"):
        start(model)
    with pytest.raises(ValueError, match=r"use model\.generate"):
        model.generate_batch(make_tokens().tolist(), continuous_batching_config=PAGES)


def test_a_disabled_side_path_is_not_refused() -> None:
    model = make_model("qwen3", dtype=torch.float32)
    with model.disable_adapter():
        start(model)
