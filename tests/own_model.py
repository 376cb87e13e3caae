"""A model that is not one of transformers': no configuration, blocks that take hidden states alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_talan import TalanConfig


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.proj(hidden_states)


class OwnModel(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.stack = nn.ModuleList(block() for _ in range(3))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden_states = self.embed(input_ids)
        for block in self.stack:
            hidden_states = block(hidden_states)
        return hidden_states


def adapt(base: OwnModel, **options: object) -> PeftModel:
    named = {"talan_blocks": "stack", "talan_hidden_size": 16, **options}
    return get_peft_model(base, TalanConfig(r=4, target_modules=r".*proj", **named))


def own_model(block: Callable[[], nn.Module] = Block, **options: object) -> PeftModel:
    return adapt(OwnModel(block), **options)
