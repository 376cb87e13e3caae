"""The runs of several facts at tiny size, and that the page shows the stored results."""

from __future__ import annotations

import json
import random
from itertools import groupby
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.memory import several_facts
from benchmarks.memory.recall_tasks import TaskRows
from benchmarks.runs import finished, read_lines

from ..offline_hub import save_tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with a tokenizer of bytes, which takes any text."""
    path = tmp_path_factory.mktemp("facts") / "tiny"
    save_tiny_model(path, depth=3)
    return str(path)


def test_a_row_of_several_facts_asks_for_each_and_marks_the_answers(folder: str) -> None:
    tokenizer, settings = AutoTokenizer.from_pretrained(folder), several_facts.Settings("TALAN", 0, questions=3)
    row = TaskRows(tokenizer, False).make("4 facts", 240, random.Random(0))
    made = several_facts.encode(row, settings, tokenizer, random.Random(0))
    runs = [
        (asked, tokenizer.decode([token for token, _ in part]))
        for asked, part in groupby(zip(*made.values(), strict=True), key=lambda pair: pair[1])
    ]
    assert [asked for asked, _ in runs] == [0, 1] * 3
    facts, questions = row["prompt"].split("\n")[:4], set()
    for (_, text), (_, answer) in zip(runs[::2], runs[1::2], strict=True):
        question = text.split("\n")[-1]
        assert answer.endswith(tokenizer.eos_token)
        assert f"{question}{answer.removesuffix(tokenizer.eos_token)}." in facts
        questions.add(question)
    assert len(questions) == 3


def test_several_facts_are_trained_on_and_scored(folder: str, tmp_path: Path) -> None:
    results = tmp_path / "facts.jsonl"
    small = {"steps": 2, "batch_size": 2, "shortest": 240, "longest": 280, "window": 100, "rows": 3, "rank": 2}
    small |= {"blocks": [0, 1], "slots": 4, "scored": [3], "bf16": False}
    words = ["--model", folder, "--arms", *several_facts.ARMS, "--seeds", "0", "--results", str(results)]
    several_facts.main([*words, "--changes", json.dumps(small)])
    of = {row["settings"]["arm"]: row for row in finished(results).values()}
    assert set(of) == set(several_facts.ARMS)
    assert of["LoRA"]["trainable"] < of["TALAN"]["trainable"]
    # The side paths have started: the first loss is another one.
    assert of["LoRA"]["losses"][0] != of["TALAN"]["losses"][0]
    assert all(set(row["right"]) == {"3"} and len(row["losses"]) == 2 for row in of.values())


def test_the_evidence_page_shows_the_stored_runs_of_several_facts() -> None:
    remedy = "run python -m benchmarks.memory.several_facts --page docs/evidence.md"
    assert several_facts.table(read_lines(several_facts.RESULTS)) in PAGE.read_text(encoding="utf-8"), remedy
