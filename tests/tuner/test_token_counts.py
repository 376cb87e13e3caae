"""A token that counts n times enters the memories as n such tokens do, which attention can't reach."""

from __future__ import annotations

import pytest
import torch

from peft_talan import talan_token_counts

from ..small_models import DEPTH, WINDOW, logits, make_base, make_config, make_model, make_tokens, rounding

COUNT = 5


def counts_of(tokens: torch.Tensor) -> torch.Tensor:
    """The first token counts several times."""
    counts = torch.ones(tokens.shape)
    counts[:, 0] = COUNT
    return counts


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("mixer", ["attention", "linear", "mlp"])
def test_a_counted_token_stands_for_many(mixer: str, use_cache: bool) -> None:
    model = make_model("mistral", make_config(talan_mixer=mixer, talan_layers=[0], talan_position="input"))
    short = make_tokens(tokens=DEPTH * WINDOW + 2)
    repeated = torch.cat([short[:, :1].expand(-1, COUNT - 1), short], 1)
    # The same positions, as these are rounded.
    at = {"position_ids": torch.arange(COUNT - 1, repeated.shape[1])[None], "use_cache": use_cache}
    with torch.no_grad():
        once = model(short, **at).logits[:, -1]
        with talan_token_counts(model, counts_of(short)):
            counted = model(short, **at).logits[:, -1]
        torch.testing.assert_close(counted, model(repeated, use_cache=use_cache).logits[:, -1], **rounding())
        assert not torch.allclose(counted, once, **rounding())
        assert torch.equal(model(short, **at).logits[:, -1], once)


def test_padding_stays_out() -> None:
    model, tokens = make_model("qwen3"), make_tokens()
    padded = torch.cat([torch.zeros_like(tokens[:, :3]), tokens], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    counts = counts_of(tokens)
    with torch.no_grad():
        with talan_token_counts(model, torch.cat([torch.full((len(tokens), 3), 9.0), counts], 1)):
            found = model(padded, attention_mask=mask, use_cache=False).logits[:, 3:]
        with talan_token_counts(model, counts):
            # The same positions, as these are rounded.
            positions = torch.arange(3, padded.shape[1])[None]
            expected = model(tokens, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, expected, **rounding())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_that_is_recomputed_counts_again(reentrant: bool) -> None:
    model, tokens = make_model("qwen3").eval(), make_tokens()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        with talan_token_counts(model, counts_of(tokens)):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, **rounding())


@pytest.mark.parametrize("counts", [None, 2.0, torch.ones(21), torch.zeros(2, 21), torch.full((2, 21), torch.nan)])
def test_what_is_no_count_is_refused(counts: object) -> None:
    with pytest.raises(ValueError, match="counts: give a tensor"), talan_token_counts(make_model("qwen3"), counts):
        pass


def test_a_model_whose_memory_is_no_sum_is_refused() -> None:
    counts = counts_of(make_tokens())
    with pytest.raises(ValueError, match="no side path"), talan_token_counts(make_base("qwen3"), counts):
        pass
    delta = make_model("qwen3", make_config(talan_mixer="delta"))
    with pytest.raises(ValueError, match=r"talan_mixer='delta'.*'default'"), talan_token_counts(delta, counts):
        pass


def test_counts_of_other_tokens_are_refused_and_forgotten() -> None:
    model, tokens = make_model("qwen3"), make_tokens()
    before = logits(model)
    with pytest.raises(ValueError, match=r"\[2, 20\].*\[2, 21\]"), talan_token_counts(model, torch.ones(2, 20)):
        model(tokens, use_cache=False)
    assert torch.equal(logits(model), before)


@torch.no_grad()
def test_packed_samples_count_as_single_ones() -> None:
    model, lengths = make_model("qwen3"), (7, 1, 12)
    rows = [make_tokens(batch=1, tokens=length, seed=length) for length in lengths]
    drawn = [1.0 + 9 * torch.rand(1, length, generator=torch.Generator().manual_seed(length)) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with talan_token_counts(model, torch.cat(drawn, 1)):
        found = model(torch.cat(rows, 1), position_ids=positions, use_cache=False).logits.split(lengths, 1)
    for piece, row, counts in zip(found, rows, drawn, strict=True):
        with talan_token_counts(model, counts):
            expected = model(row, use_cache=False).logits
        torch.testing.assert_close(piece, expected, **rounding())
        if row.shape[1] > 1:
            assert not torch.allclose(piece, model(row, use_cache=False).logits, **rounding())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_that_half_precision_cannot_hold_are_not_rounded(dtype: torch.dtype) -> None:
    tokens = make_tokens()
    counts = torch.ones(tokens.shape)
    counts[:, :3] = torch.tensor([70_001.0, 100_003.0, 120_007.0])  # float16 ends at 65,504
    half = make_model("qwen3", dtype=dtype)
    exact = make_model("qwen3", dtype=torch.float32)
    exact.load_state_dict(half.state_dict())

    def both() -> list[torch.Tensor]:
        return [model(tokens, use_cache=False).logits.float() for model in (half, exact)]

    once, once_exactly = both()
    with talan_token_counts(half, counts), talan_token_counts(exact, counts):
        found, expected = both()
    error = (found - expected).norm()
    assert error < 2 * (once - once_exactly).norm()
    # The counts do more than the rounding.
    assert (expected - once_exactly).norm() > 2 * error
