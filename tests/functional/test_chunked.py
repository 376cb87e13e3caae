"""The memory's own operators: gradients by finite differences, and the size of what they make."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_talan.functional import chunked_autograd, fused, reference
from peft_talan.functional.parameters import MIXERS

from .inputs import LargestTensor, assert_equal_up_to_rounding, memory, mixer_tensors, remix_inputs, segments


@pytest.mark.parametrize("tokens", [2, 5, 33])
@pytest.mark.parametrize("mixer", MIXERS)
def test_gradcheck_of_the_remix(mixer: Any, tokens: int) -> None:
    leaves = [*remix_inputs(mixer, 1, tokens), memory(1, mixer), *mixer_tensors(mixer)]
    segment_ids = segments(1, tokens)
    for ids in (None, segment_ids):

        def run(
            z: torch.Tensor, q: torch.Tensor, e: torch.Tensor, state: torch.Tensor, *rest: torch.Tensor, ids: Any = ids
        ) -> Any:
            return fused.remix(z, q, e, mixer, rest, ids, state)

        assert torch.autograd.gradcheck(run, tuple(leaf.requires_grad_() for leaf in leaves), fast_mode=tokens > 5)


@pytest.mark.parametrize("mixer", ["attention", "linear"])
def test_several_tiles_equal_the_reference(mixer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, tokens = 3, 200
    # A tile of one chunk a sequence, and one of several with a remainder: both occur at full size with long sequences.
    for tile_tokens in (64, 3 * 64):
        monkeypatch.setattr(chunked_autograd, "TILE_TOKENS", tile_tokens)
        for ids, state in ((None, None), (segments(batch, tokens), memory(batch))):
            leaves = [leaf.requires_grad_() for leaf in (*remix_inputs(mixer, batch, tokens), *mixer_tensors(mixer))]
            if state is not None:
                leaves.append(state.requires_grad_())
            results = []
            for module in (fused, reference):
                r, final = module.remix(*leaves[:3], mixer, tuple(leaves[3:4]), ids, state)
                scalar = r.square().sum() + final.square().sum()
                results.append([r, final, *torch.autograd.grad(scalar, leaves)])
            for found, expected in zip(*results, strict=True):
                assert_equal_up_to_rounding(found, expected)


@pytest.mark.parametrize("with_segments", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
def test_no_tensor_has_tokens_times_slots_times_width(mixer: Any, with_segments: bool) -> None:
    batch, tokens, slots, width = 1, 2048, 8, 32
    inputs = remix_inputs(mixer, batch, tokens, slots, width)
    values, queries, weights = (tensor.float().requires_grad_() for tensor in inputs)
    # Of `delta`, the weights have the mixer's tensor in them already.
    read = mixer_tensors(mixer, slots, width) if mixer != "delta" else ()
    parameters = tuple(tensor.float().requires_grad_() for tensor in read)
    ids = (torch.arange(tokens) // 300).unsqueeze(0) if with_segments else None
    direction = torch.randn(batch, tokens, width)
    with LargestTensor() as largest:
        readouts, state = fused.remix(values, queries, weights, mixer, parameters, ids)
        torch.autograd.grad(readouts, (values, queries, weights, *parameters), direction)
    assert state.shape == (batch, slots, width if mixer == "delta" else width + 1)
    assert largest.elements <= batch * tokens * slots * width // 4
