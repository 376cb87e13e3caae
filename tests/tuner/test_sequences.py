"""Invariants 2 and 4: no token sees later ones, and padding, neighbours and packing change no real token's result."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ..small_models import ARCHITECTURES, VOCABULARY, make_config, make_model, make_tokens, rounding

ATTENTIONS = {"sdpa": torch.float64, "eager": torch.float32}
"""Eager attention takes its softmax in float32, where the additive mask of float64 overflows in the base model."""
POSITIONS = ("input", "output")


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("mixer", ["attention", "linear", "mlp", "delta"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_no_logit_depends_on_a_later_token(mixer: str, position: str, use_cache: bool) -> None:
    model = make_model("qwen3", make_config(talan_mixer=mixer, talan_position=position))
    tokens = make_tokens(tokens=150)
    before = model(tokens, use_cache=use_cache).logits
    for changed in (1, 63, 64, 65, 149):
        others = tokens.clone()
        others[:, changed:] = make_tokens(tokens=150 - changed, seed=9)
        after = model(others, use_cache=use_cache).logits
        torch.testing.assert_close(after[:, :changed], before[:, :changed], **rounding())
        assert not torch.allclose(after[:, changed:], before[:, changed:])


@torch.no_grad()
def test_no_logit_depends_on_a_later_token_in_any_architecture(architecture: str) -> None:
    model = make_model(architecture)
    tokens = make_tokens()
    before = model(tokens).logits
    tokens[:, 10:] = make_tokens(tokens=11, seed=9)
    torch.testing.assert_close(model(tokens).logits[:, :10], before[:, :10], **rounding())


def pad(row: torch.Tensor, left: int, right: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Padding of random tokens: what stands there must not matter."""
    generator = torch.Generator().manual_seed(left + 100 * right)
    before = torch.randint(2, VOCABULARY, (1, left), generator=generator)
    after = torch.randint(2, VOCABULARY, (1, right), generator=generator)
    tokens = torch.cat([before, row, after], dim=1)
    mask = torch.cat([torch.zeros_like(before), torch.ones_like(row), torch.zeros_like(after)], dim=1)
    return tokens, mask


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padding_changes_no_real_token(architecture: str, attention: str) -> None:
    dtype = ATTENTIONS[attention]
    model = make_model(architecture, dtype=dtype, attention=attention)
    row = make_tokens(batch=1)
    expected = model(row).logits
    for padding in ((0, 9), (9, 0), (5, 3), (70, 0)):
        tokens, mask = pad(row, *padding)
        logits = model(tokens, attention_mask=mask, position_ids=positions_of(mask)).logits
        torch.testing.assert_close(
            logits[mask.bool()], expected[0], **rounding(dtype), msg=lambda text, at=padding: f"{at}: {text}"
        )


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
def test_neighbours_in_the_batch_change_no_real_token(architecture: str, position: str) -> None:
    model = make_model(architecture, make_config(talan_position=position))
    rows = [make_tokens(batch=1, tokens=length, seed=length) for length in (4, 11, 20)]
    padded = [
        pad(row, 0, 20 - row.shape[1]) if i % 2 else pad(row, 20 - row.shape[1], 0) for i, row in enumerate(rows)
    ]
    tokens, mask = (torch.cat(parts) for parts in zip(*padded, strict=True))
    logits = model(tokens, attention_mask=mask, position_ids=positions_of(mask)).logits
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index][mask[index].bool()], model(row).logits[0], **rounding())


LENGTHS = (7, 1, 64, 12, 3)


def packed() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    rows = [make_tokens(batch=1, tokens=length, seed=length) for length in LENGTHS]
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    return torch.cat(rows, dim=1), positions, rows


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("mixer", ["attention", "linear", "mlp", "delta"])
def test_packed_samples_equal_single_ones(attention: str, mixer: str) -> None:
    dtype = ATTENTIONS[attention]
    model = make_model("qwen3", make_config(talan_mixer=mixer), dtype, attention)
    tokens, positions, rows = packed()
    logits = model(tokens, position_ids=positions, use_cache=False).logits.split(LENGTHS, dim=1)
    for piece, row in zip(logits, rows, strict=True):
        torch.testing.assert_close(piece, model(row, use_cache=False).logits, **rounding(dtype))


@torch.no_grad()
@pytest.mark.parametrize("architecture_", [name for name in ARCHITECTURES if name != "opt"])
def test_packing_in_every_architecture(architecture_: str) -> None:
    model = make_model(architecture_)
    tokens, positions, rows = packed()
    logits = model(tokens, position_ids=positions, use_cache=False).logits.split(LENGTHS, dim=1)
    for piece, row in zip(logits, rows, strict=True):
        torch.testing.assert_close(piece, model(row, use_cache=False).logits, **rounding())


@torch.no_grad()
def test_packing_by_a_block_diagonal_mask_with_padding_between() -> None:
    model = make_model("qwen3")
    tokens, positions, rows = packed()
    segments = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    real = torch.ones(tokens.shape[1], dtype=torch.bool)
    # Two rows of padding between the samples: at the end of the third.
    gap = sum(LENGTHS[:3])
    tokens = torch.cat([tokens[:, :gap], torch.zeros(1, 2, dtype=torch.long), tokens[:, gap:]], dim=1)
    positions = torch.cat([positions[:, :gap], torch.zeros(1, 2, dtype=torch.long), positions[:, gap:]], dim=1)
    segments = torch.cat([segments[:gap], torch.tensor([-1, -1]), segments[gap:]])
    real = torch.cat([real[:gap], torch.tensor([False, False]), real[gap:]])
    mask = (segments.unsqueeze(0) == segments.unsqueeze(1)).tril() & real & real.unsqueeze(1)
    logits = model(tokens, attention_mask=mask[None, None], position_ids=positions, use_cache=False).logits
    for piece, row in zip(logits[:, real].split(LENGTHS, dim=1), rows, strict=True):
        torch.testing.assert_close(piece, model(row, use_cache=False).logits, **rounding())


class TwoLayouts(nn.Module):
    """Blocks that are told of packing by position ids alone, as under flash attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.blocks = nn.ModuleList([PositionwiseBlock()])

    def forward(self, tokens: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return self.blocks[0](self.embedding(tokens), **kwargs)


class PositionwiseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.linear(hidden_states)


def positionwise_model() -> nn.Module:
    torch.manual_seed(0)
    config = make_config(
        target_modules=["linear"], task_type=None, talan_layers=[0], talan_blocks="blocks", talan_hidden_size=16
    )
    return get_peft_model(TwoLayouts(), config).to(torch.float64).eval()


@torch.no_grad()
def test_positions_alone_tell_of_packing_and_a_flat_mask_of_padding() -> None:
    model = positionwise_model()
    tokens, positions, rows = packed()
    for piece, row in zip(model(tokens, position_ids=positions).split(LENGTHS, dim=1), rows, strict=True):
        torch.testing.assert_close(piece, model(row), **rounding())
    padded, mask = pad(rows[0], 3, 4)
    torch.testing.assert_close(model(padded, attention_mask=mask)[mask.bool()], model(rows[0])[0], **rounding())


@torch.no_grad()
def test_positions_of_three_dimensions_are_not_packing() -> None:
    model = positionwise_model()
    row = make_tokens(batch=1)
    multimodal = torch.zeros(3, 1, row.shape[1], dtype=torch.long)
    assert torch.equal(model(row, position_ids=multimodal), model(row))


def test_a_mask_that_does_not_show_padding_is_refused() -> None:
    with pytest.raises(TypeError, match=r"attention_mask=str.*\[batch, keys\]"):
        positionwise_model()(make_tokens(), attention_mask="causal")


@torch.no_grad()
def test_bidirectional_memory_sees_the_whole_sequence_and_no_padding() -> None:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(0)
    base = BertModel(config, add_pooling_layer=False)
    adapter = make_config(
        task_type="FEATURE_EXTRACTION", talan_memory_scope="bidirectional", target_modules=["query"], talan_layers=[0]
    )
    model = get_peft_model(base, adapter).to(torch.float64).eval()
    row = make_tokens(batch=1)
    expected = model(input_ids=row).last_hidden_state
    tokens, mask = pad(row, 0, 6)
    hidden_states = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(hidden_states[mask.bool()], expected[0], **rounding())
    causal = make_config(task_type="FEATURE_EXTRACTION", target_modules=["query"], talan_layers=[0])
    torch.manual_seed(0)
    other = get_peft_model(BertModel(config, add_pooling_layer=False), causal).to(torch.float64).eval()
    assert not torch.allclose(other(input_ids=row).last_hidden_state[:, 0], expected[:, 0])


def test_packing_by_the_text_row_of_multimodal_positions() -> None:
    """Qwen2.5-VL and its kin take positions [4, batch, tokens] and separate samples by the first row."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    base = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    model = get_peft_model(base, make_config(talan_layers="all")).to(torch.float64).eval()
    tokens = make_tokens(batch=1)
    positions = torch.cat([torch.arange(8), torch.arange(13)]).expand(4, 1, 21)
    embeddings = base.get_input_embeddings()(tokens).detach().requires_grad_()
    packed = model(inputs_embeds=embeddings, position_ids=positions, use_cache=False).logits
    with torch.no_grad():
        alone = model(inputs_embeds=embeddings[:, 8:], use_cache=False).logits
    torch.testing.assert_close(packed[:, 8:], alone, **rounding())
    packed[:, 8:].square().sum().backward()
    assert not embeddings.grad[:, :8].any()
    assert embeddings.grad[:, 8:].any()
