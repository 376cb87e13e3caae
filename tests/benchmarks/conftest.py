"""The backbone that the studies' tests train on."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality import backbones

from ..small_models import make_base


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("backbone") / "tiny"
    model = make_base("qwen3", torch.float32)
    model.resize_token_embeddings(backbones.VOCABULARY)
    model.save_pretrained(folder)
    backbones.make_tokenizer().save_pretrained(folder)
    return str(folder)
