"""The recall beyond the window: what the window model can reach, what the tasks ask, and what the demo shows."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import MistralForCausalLM

from peft_talan import TalanConfig
from peft_talan.demo import recall
from peft_talan.demo.recall_run import draw_recall, recall_difference, recall_table, run_recall

LOW_RANK = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CONFIGS = {
    "LoRA": LoraConfig(**LOW_RANK, init_lora_weights=False),
    "TALAN": TalanConfig(**LOW_RANK, **recall.LONG_CONTEXT, init_lora_weights=False, init_talan_weights=False),
}


def window_model() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(recall.window_config("key")).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_only_a_side_path_reaches_beyond_the_window(name: str) -> None:
    model = get_peft_model(window_model(), CONFIGS[name]).double().eval()
    length = recall.REACH + 2
    tokens, _ = recall.make_texts("key", 5, 1, torch.Generator().manual_seed(0))
    tokens = tokens[:, -length:]
    changed = {}
    for back in (recall.REACH, recall.REACH + 1):
        others = tokens.clone()
        others[0, -1 - back] = (others[0, -1 - back] + 1) % recall.FIRST_PAIR
        with torch.no_grad():
            changed[back] = not torch.equal(recall.answer_logits(model, tokens), recall.answer_logits(model, others))
    assert changed == {recall.REACH: True, recall.REACH + 1: name == "TALAN"}


def _answer(task: recall.Task, text: list[int]) -> int:
    """The answer as a reader of the text finds it."""
    if task == "key":
        return text[text.index(recall.MARK) + 1]
    if task == "pairs":
        assert text[-2] == recall.ASK
        name = text[-1] - recall.FIRST_NAME
        (pair,) = [token - recall.FIRST_PAIR for token in text if (token - recall.FIRST_PAIR) // 16 == name]
        return recall.FIRST_ANSWER + pair % 16
    return recall.FIRST_ANSWER + text.count(recall.MARK)


@pytest.mark.parametrize("task", recall.TASKS)
@pytest.mark.parametrize("windows", [1, 3])
def test_every_text_holds_its_answer(task: recall.Task, windows: int) -> None:
    tokens, answers = recall.make_texts(task, windows, 200, torch.Generator().manual_seed(1))
    assert tokens.shape == (200, windows * recall.WINDOW)
    assert [_answer(task, text) for text in tokens.tolist()] == answers.tolist()
    # One window has places for 14 marks.
    assert len(set(answers.tolist())) == (15 if (task, windows) == ("count", 1) else recall.ANSWERS)
    again, _ = recall.make_texts(task, windows, 200, torch.Generator().manual_seed(1))
    assert torch.equal(tokens, again)


def test_a_model_that_lost_full_attention_has_the_window() -> None:
    tokens, _ = recall.make_texts("key", 6, 1, torch.Generator().manual_seed(0))
    others = tokens.clone()
    others[0, 1] = recall.ASK
    model = recall.pretrained("key", 0, 1, full_attention=True)
    same = [torch.equal(recall.answer_logits(model, tokens), recall.answer_logits(model, others))]
    model.config.sliding_window = None
    same.append(torch.equal(recall.answer_logits(model, tokens), recall.answer_logits(model, others)))
    assert same == [True, False]


def test_the_demo_shows_recall_with_its_intervals(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    outcomes = run_recall(1, 0, console, windows=(1, 5))
    assert [outcome.arm for outcome in outcomes] == ["base model", "LoRA", "LoRA+TALAN"]
    base, lora, talan = outcomes
    assert base.trainable == 0 < lora.trainable < talan.trainable
    for outcome in outcomes:
        assert list(outcome.shares) == [1, 5]
        assert all(0 <= share.low < share.mean + 1e-9 < share.high + 1e-6 for share in outcome.shares.values())
    console.print(recall_table(outcomes))
    console.print(recall_difference(outcomes))
    printed = console.file.getvalue()
    for words in ("distance in windows", "chance 6 %", "LoRA+TALAN minus LoRA at 5 windows (80 tokens"):
        assert words in printed
    draw_recall({outcome.arm: outcome.shares for outcome in outcomes}, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
