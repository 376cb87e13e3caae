"""AsyncGRPO's rows, in which samples share their beginning: each has the outputs and gradients that it has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl.experimental.async_grpo.packing import TREE_ATTENTION, TreeRow

from peft_talan import talan_token_counts

from ..small_models import make_config, make_model, make_tokens
from .on_processors import run_on_processors
from .test_trl import assert_same

KINDS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "at the input": {"talan_position": "input", "talan_mixer": "mlp", "talan_writeback": "gated"},
    "orthogonal": {"talan_writeback": "orthogonal", "talan_mixer": "linear"},
    "delta": {"talan_mixer": "delta", "talan_writeback": "capped"},
}


def samples() -> list[list[int]]:
    """One after the other; two with a common beginning, of which one goes on in a third; and one that is another's."""
    row = make_tokens().flatten().tolist()
    first, second, third = row[:9], row[:5] + row[20:24], row[:5] + row[20:22] + row[30:33]
    return [row[40:43], first, second, third, row[:7]]


def pack(rows: list[list[int]]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """A row of TRL's with all tokens trained, and the places of each sample's tokens but the last."""
    tree = TreeRow()
    for number, row in enumerate(rows):
        ids, trained = torch.tensor(row), torch.ones(len(row))
        tree.add({"input_ids": ids, "completion_mask": trained, "old_log_probs": trained, "advantage": 1.0,
                  "group_id": number})  # fmt: skip
    packed = tree.pack()
    places = [packed["token_index"][packed["segment_id"] == number] for number in range(len(rows))]
    return packed, places


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_as_if_alone(kind: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_processors(monkeypatch)
    model = make_model("qwen3", make_config(**KINDS[kind])).train()
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    rows = samples()
    expected = [model(torch.tensor([row])).logits[0, :-1].log_softmax(-1) for row in rows]
    weights = [torch.randn_like(logits) for logits in expected]
    sum((logits * weight).sum() for logits, weight in zip(expected, weights, strict=True)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any(".talan." in name for name in gradients)
    model.zero_grad()

    packed, places = pack(rows)
    assert len(packed["input_ids"]) < sum(map(len, rows))
    assert len(packed["tree_cu_seqlens_q"]) > len(rows) + 1
    model.set_attn_implementation(TREE_ATTENTION)
    tree = {name: packed[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    longest = dict(zip(("tree_max_seqlen_q", "tree_max_seqlen_k"), packed["tree_max_seqlens"].tolist(), strict=True))
    output = model(packed["input_ids"][None], position_ids=packed["position_ids"][None], **tree, **longest)
    found = [output.logits[0, place].log_softmax(-1) for place in places]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    sum((logits * weight).sum() for logits, weight in zip(found, weights, strict=True)).backward()
    found_gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # Norms compute in float32, and tokens that samples share get the sum of their gradients.
    assert_same((0.0, found_gradients), (0.0, gradients))


def test_counted_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens that samples share, nothing tells how often each sample counts them."""
    run_on_processors(monkeypatch)
    model = make_model("qwen3")
    model.set_attn_implementation(TREE_ATTENTION)
    packed, _ = pack(samples())
    tokens = packed["input_ids"][None]
    tree = {name: packed[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    longest = dict(zip(("tree_max_seqlen_q", "tree_max_seqlen_k"), packed["tree_max_seqlens"].tolist(), strict=True))
    refused = pytest.raises(ValueError, match=r"token_counts: not for .* rows that are packed as a tree")
    with refused, talan_token_counts(model, torch.ones(tokens.shape)):
        model(tokens, position_ids=packed["position_ids"][None], use_cache=False, **tree, **longest)


def test_a_bidirectional_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that samples share would have the later tokens of one of them."""
    run_on_processors(monkeypatch)
    model = make_model("qwen3", make_config(talan_memory_scope="bidirectional", task_type=None))
    model.set_attn_implementation(TREE_ATTENTION)
    packed, _ = pack(samples())
    tree = {name: packed[name] for name in packed if name.startswith("tree_") and name != "tree_max_seqlens"}
    with pytest.raises(ValueError, match="talan_memory_scope='bidirectional' can't generate"):
        model(packed["input_ids"][None], position_ids=packed["position_ids"][None], use_cache=False, **tree,
              tree_max_seqlen_q=1, tree_max_seqlen_k=1)  # fmt: skip
