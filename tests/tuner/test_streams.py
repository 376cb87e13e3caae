"""Models of others: a residual stream that is not [batch, tokens, hidden_size] is never taken for one that is."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ..small_models import VOCABULARY, make_config, make_tokens, rounding

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.linear(hidden_states)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class PlainModel(nn.Module):
    """Its blocks see the hidden states in the order of dimensions that is given."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder, self.order = Encoder(), order

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        # Taking dimensions one and zero, or one and two, twice changes nothing.
        return self.encoder(self.embedding(tokens).permute(self.order)).permute(self.order)


class OwnConfig(PreTrainedConfig):
    model_type = "a_type_of_its_own"

    def __init__(self, order: tuple[int, ...] = (0, 1, 2), hidden_size: int = WIDTH, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.order, self.hidden_size, self.num_hidden_layers = order, hidden_size, 2


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.inner = PlainModel(config.order)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids)


AutoConfig.register("a_type_of_its_own", OwnConfig)
AutoModel.register(OwnConfig, OwnModel)
BATCH_FIRST, TOKENS_FIRST = (0, 1, 2), (1, 0, 2)


def make_custom(kind: str, order: tuple[int, ...]) -> PeftModel:
    torch.manual_seed(0)
    options: dict[str, object] = {"target_modules": ["linear"], "task_type": None, "talan_layers": "all"}
    if kind == "plain":
        base: nn.Module = PlainModel(order)
        options |= {"talan_blocks": "encoder.layers", "talan_hidden_size": WIDTH}
    else:
        base = AutoModel.from_config(AutoConfig.for_model("a_type_of_its_own", order=order))
    return get_peft_model(base, make_config(**options)).to(torch.float64).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "pretrained"])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 5), (5, 2), (1, 6), (4, 1), (3, 3)])
def test_tokens_before_rows_are_refused(kind: str, batch: int, tokens: int) -> None:
    model = make_custom(kind, TOKENS_FIRST)
    with pytest.raises(ValueError, match=r"talan_layers: block 0 has hidden states of shape"):
        model(make_tokens(batch, tokens))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "pretrained"])
def test_rows_before_tokens_are_known_from_the_first_call_that_shows_them(kind: str) -> None:
    model, square = make_custom(kind, BATCH_FIRST), make_tokens(3, 3)
    with pytest.raises(ValueError, match=r"whether their rows or their tokens come first.*call it once"):
        model(square)
    alone = model(square[:1])
    torch.testing.assert_close(model(square)[:1], alone, **rounding())


def test_a_dimension_more_is_refused() -> None:
    model = make_custom("plain", BATCH_FIRST)
    blocks = model.get_base_model().encoder
    blocks.register_forward_pre_hook(lambda _, args: (args[0].unsqueeze(0),))
    with torch.no_grad(), pytest.raises(ValueError, match=r"shape \[1, 2, 5, 16\], expected \[2, tokens, hidden_size"):
        model(make_tokens(2, 5))
