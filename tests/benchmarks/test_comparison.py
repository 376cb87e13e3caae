"""The comparison of what reads long texts: its tasks, its masks, a run at tiny size, and the page."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.memory import comparison, comparison_report
from benchmarks.memory.context_arms import EQUAL, UNTRAINED, add_sinks, load_untrained, static_cache_bytes
from benchmarks.memory.recall_tasks import MAKERS, TaskRows
from benchmarks.runs import finished
from peft_talan import TalanConfig
from peft_talan.axes import RECALL_AXES
from peft_talan.sft.models import load_model
from peft_talan.sft.prompts import encode
from peft_talan.sft.window import with_sliding_window

from ..offline_hub import save_tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
TOKENS = 700


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a tokenizer of bytes, which takes any text."""
    found = tmp_path_factory.mktemp("comparison") / "tiny"
    save_tiny_model(found, depth=2)
    return str(found)


@pytest.fixture(scope="module")
def maker(folder: str) -> TaskRows:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    return TaskRows(tokenizer, held_out=True)


@pytest.mark.parametrize("task", list(MAKERS))
def test_a_row_has_the_wanted_length_and_all_of_its_sentences(task: str, maker: TaskRows) -> None:
    rows = maker.rows(task, 8, TOKENS, TOKENS, 0)
    assert rows == maker.rows(task, 8, TOKENS, TOKENS, 0)
    assert len(set(map(str, rows))) == 8
    lengths = [encode(maker.tokenizer, row).length for row in rows]
    assert min(lengths) >= TOKENS - 20 and max(lengths) <= TOKENS
    asked = MAKERS[task](random.Random(0), TOKENS)
    row = maker.make(task, TOKENS, random.Random(0))
    assert row["prompt"].endswith(asked.question) and row["completion"] == asked.answer
    assert [line for line in row["prompt"].splitlines() if line in asked.sentences] == asked.sentences


def test_a_text_that_is_too_short_is_refused(maker: TaskRows) -> None:
    with pytest.raises(ValueError, match=r"tokens=60: too few .*'16 facts'"):
        maker.rows("16 facts", 1, 60, 60, 0)


@pytest.mark.parametrize("task", ["1 fact", "4 facts", "16 facts", "needle", "4 keys"])
def test_one_sentence_says_the_answer(task: str, maker: TaskRows) -> None:
    for row in maker.rows(task, 8, TOKENS, TOKENS, 0):
        question = row["prompt"].splitlines()[-1]
        assert row["prompt"].count(question) == 2
        assert question + row["completion"] + "." in row["prompt"]


def test_the_last_variable_of_a_chain_has_the_number_of_its_first(maker: TaskRows) -> None:
    for row in maker.rows("variables", 8, TOKENS, TOKENS, 0):
        given = dict(line[4:-1].split(" be ") for line in row["prompt"].splitlines() if line.startswith("Let "))
        value = row["prompt"].splitlines()[-1].split()[-3]
        hops = 0
        while not value.startswith("#"):
            value, hops = given[value], hops + 1
        assert (value, hops) == ("#" + row["completion"], 3)


def test_the_frequent_word_is_more_frequent_than_others(maker: TaskRows) -> None:
    for row in maker.rows("frequent word", 8, TOKENS, TOKENS, 0):
        (first, most), (_, next_most) = Counter(row["prompt"].splitlines()[0].split()).most_common(2)
        assert first == row["completion"].strip() and most > next_most


@pytest.mark.parametrize("task", ["one supporting fact", "two supporting facts"])
def test_people_and_things_are_where_they_went_last(task: str, maker: TaskRows) -> None:
    for row in maker.rows(task, 16, 1400, 1400, 0):
        where, held, lies = {}, {}, {}
        for words in (line.rstrip(".").split() for line in row["prompt"].splitlines()):
            if words[1:4] == ["went", "to", "the"]:
                where[words[0]] = words[4]
            elif words[1:3] == ["took", "the"]:
                held[words[3]] = words[0]
            elif words[1:3] == ["left", "the"] and words[-1] == "there":
                lies[words[3]] = where[held.pop(words[3])]
        asked = row["prompt"].splitlines()[-1].split()[-4]
        found = where.get(asked) or lies.get(asked) or where[held[asked]]
        assert found == row["completion"].strip()


def test_a_window_with_sinks(folder: str) -> None:
    tokens = torch.randint(5, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(tokens)
    padded[0, 20:] = 0
    full = load_model(folder, "float32", "cpu")

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=tokens, attention_mask=padded).logits[padded.bool()]

    def sinks(window: int, count: int) -> torch.Tensor:
        return logits(add_sinks(load_model(folder, "float32", "cpu"), window, count))

    assert torch.equal(sinks(24, 4), logits(full))
    assert torch.equal(sinks(6, 20), sinks(24, 0))
    assert torch.equal(sinks(6, 0), logits(with_sliding_window(full, 6)))
    assert not torch.allclose(sinks(6, 4), sinks(6, 0))
    # The first tokens reach the last one within one block; nothing between them and the window does.
    model = add_sinks(load_model(folder, "float32", "cpu"), 6, 4)
    model.model.layers = model.model.layers[:1]

    def last(changed: int | None) -> torch.Tensor:
        other = tokens.clone()
        if changed is not None:
            other[:, changed] = 7
        with torch.no_grad():
            return model(input_ids=other).logits[:, -1]

    seen = [place for place in range(24) if not torch.equal(last(place), last(None))]
    assert seen == [0, 1, 2, 3, *range(18, 24)]
    with pytest.raises(ValueError, match="it has a window already"):
        add_sinks(with_sliding_window(full, 6), 6, 4)


def test_the_wider_window_has_as_many_bytes_as_the_memory(folder: str) -> None:
    base = load_model(folder, "float32", "cpu")
    config = TalanConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", **RECALL_AXES)
    window = load_untrained(folder, "window", 8, "float32").state_bytes(40)
    wider = load_untrained(folder, EQUAL, 8, "float32").state_bytes(40)
    full = load_untrained(folder, "full attention", 8, "float32").state_bytes(40)
    one_token = full["keys_and_values"] // 40
    assert window == {"keys_and_values": 8 * one_token, "memories": 0}
    memories = static_cache_bytes(get_peft_model(base, config), 2)["memories"]
    more = wider["keys_and_values"] - window["keys_and_values"]
    assert 0 < memories <= more < memories + one_token


@pytest.fixture(scope="module")
def adapters(folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters on a base model that has a window, as the command saves them."""
    home = tmp_path_factory.mktemp("adapters")
    with_sliding_window(load_model(folder, "float32", "cpu"), 8).save_pretrained(home / "base_model")
    AutoTokenizer.from_pretrained(folder).save_pretrained(home / "base_model")
    low_rank = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": "all-linear"}
    found = []
    for config in (LoraConfig(**low_rank), TalanConfig(**low_rank, talan_layers="all")):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(home / "base_model")
        found.append(home / type(config).__name__)
        get_peft_model(base, config).save_pretrained(found[-1])
    return found


def test_all_arms_are_scored_and_shown(folder: str, adapters: list[Path], tmp_path: Path) -> None:
    results, page = tmp_path / "results.jsonl", tmp_path / "evidence.md"
    common = ["--model", folder, "--results", str(results), "--rows", "2", "--window", "8", "--dtype", "float32"]
    small = ["--tasks", "1 fact", "needle", "plain text", "--lengths", "128"]
    for _ in range(2):
        comparison.main([*common, *small])
        for adapter in adapters:
            words = ["--adapter", str(adapter), "--trained-on", "1 fact", "--training", "1 step"]
            comparison.main([*common, *small, *words])
    rows = list(finished(results).values())
    assert len(rows) == len(results.read_text().splitlines())
    cells = [row for row in rows if "right" in row]
    assert len(cells) == 2 * (len(UNTRAINED) + len(adapters))
    assert all(len(cell["exact"]) == 2 and cell["right"] == sum(cell["exact"]) for cell in cells)
    of = {(row["settings"]["arm"], row["settings"]["task"]): row for row in rows}
    # Fresh adapters compute what the window alone does, with the memory's bytes beside its keys.
    for kind, memories in (("LoRA", False), ("TALAN", True)):
        mine, its = of[kind, "1 fact"], of["window", "1 fact"]
        assert mine["bytes_a_row"]["keys_and_values"] == its["bytes_a_row"]["keys_and_values"]
        assert (mine["bytes_a_row"]["memories"] > 0) == memories
    assert of["LoRA", "1 fact"]["loss"] == of["window", "1 fact"]["loss"]
    texts = [row for row in rows if row["settings"]["task"] == comparison.PLAIN_TEXT]
    assert len(texts) == 1 + len(comparison.TEXT_WINDOWS) * (1 + len(adapters))
    page.write_text("".join(f"<!-- table {name} -->\n<!-- end -->\n" for name in comparison_report.tables_of(rows)))
    # Cells with other windows, of other precision, of other models or of more rows are in no table.
    others = {"window": 16, "dtype": "bfloat16", "model": "other", "rows": 3}
    with results.open("a") as file:
        for number, (name, value) in enumerate(others.items()):
            cell = cells[0]
            wrong = {**cell, "key": str(number), "right": 1, "settings": {**cell["settings"], name: value}}
            file.write(json.dumps(wrong) + "\n")
    about = ["--model", Path(folder).name, "--rows", "2", "--window", "8", "--dtype", "float32"]
    comparison_report.main(["--results", str(results), "--page", str(page), *about])
    assert all(table in page.read_text() for table in comparison_report.tables_of(rows).values())
    shown = page.read_text()
    assert shown.count("%*") == len(adapters)
    assert all(f"| {arm}" in shown for arm in (*UNTRAINED, "LoRA, 1 step", "TALAN, 1 step"))
    for table in comparison_report.tables_of(rows).values():
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert (tmp_path / "images" / "memory_comparison.png").read_bytes().startswith(b"\x89PNG")


def test_an_adapter_of_other_weights_is_refused(adapters: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_tiny_model(other, depth=2)
    model = AutoModelForCausalLM.from_pretrained(other)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(other)
    words = ["--model", str(other), "--adapter", str(adapters[0]), "--results", str(tmp_path / "results.jsonl")]
    with pytest.raises(ValueError, match=r"LoraConfig was trained on other weights, of .*base_model; give that model"):
        comparison.main([*words, "--tasks", "1 fact", "--lengths", "128", "--rows", "1"])


def test_rows_to_train_on_are_of_other_parts_of_the_texts(folder: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    words = ["--model", folder, "--rows-to", str(file), "--rows", "7"]
    with pytest.raises(SystemExit, match="the shortest and longest row as --lengths"):
        comparison.main([*words, "--tasks", "1 fact"])
    comparison.main([*words, "--tasks", "1 fact", "2 facts", "--lengths", "200", "300"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(row["prompt"].count("The home of ") - 1 for row in rows) == [1] * 4 + [2] * 3
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert all(180 <= encode(tokenizer, row).length <= 300 for row in rows)
    trained, held_out = (
        [tokenizer.decode(text) for text in TaskRows(tokenizer, held_out=part).texts] for part in (False, True)
    )
    for row in rows:
        *_, piece, _ = row["prompt"].splitlines()
        assert len(piece) > 80
        assert any(piece in text for text in trained)
        assert not any(piece in text for text in held_out)


def test_the_page_shows_the_stored_comparison() -> None:
    text, stored = PAGE.read_text(encoding="utf-8"), list(finished(comparison.RESULTS).values())
    for name, table in comparison_report.tables_of(comparison_report.comparable(stored)).items():
        assert table in text, f"{name}: run python -m benchmarks.memory.comparison_report --page docs/evidence.md"
