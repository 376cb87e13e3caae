"""The memory study's runner, tables and picture at tiny size, and that the page shows the stored results."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import WordLevelTrainer
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.memory import (
    binding,
    generation,
    one_run,
    ordinary_rows,
    ordinary_rows_report,
    real_model,
    report,
    study,
)
from benchmarks.memory.row_maker import KINDS, RowMaker
from benchmarks.quality.tasks import plain_text
from benchmarks.runs import read_lines
from peft_talan.axes import RECALL_AXES
from peft_talan.demo import recall
from peft_talan.sft.prompts import encode

from ..offline_hub import save_tiny_model
from ..small_models import make_base

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
ARMS = ["LoRA", "LoRA, as many parameters", "TALAN, all blocks"]


def start(results: Path, *options: str) -> dict[str, dict[str, object]]:
    small = ["--steps", "1", "--batch-size", "2", "--rows", "4", "--scored", "1", "10"]
    study.main(["--results", str(results), "--arms", *ARMS, *small, *options])
    return study.finished(results)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("study") / "memory.jsonl"
    patched = pytest.MonkeyPatch()
    patched.setitem(one_run.BASE_STEPS, ("window", "key"), 2)
    start(file, "--seeds", "0", "1")
    patched.undo()
    return file


def test_every_arm_has_equally_many_tries_and_its_own_learning_rate(results: Path) -> None:
    rows = list(study.finished(results).values())
    assert len(rows) == len(ARMS) * (len(study.LEARNING_RATES) + 2)
    for arm in ARMS:
        of_arm = [row for row in rows if row["settings"]["arm"] == arm]
        tries = [row for row in of_arm if row["settings"]["seed"] == study.DEVELOPMENT_SEED]
        assert [row["settings"]["learning_rate"] for row in tries] == list(study.LEARNING_RATES)
        best = min(tries, key=lambda row: row["last_loss"])["settings"]["learning_rate"]
        fresh = [row for row in of_arm if row["settings"]["seed"] != study.DEVELOPMENT_SEED]
        assert {row["settings"]["learning_rate"] for row in fresh} == {best}
    trainable = {row["settings"]["arm"]: row["trainable"] for row in rows}
    assert trainable["LoRA"] < trainable["TALAN, all blocks"] <= trainable["LoRA, as many parameters"]
    # One base model a seed, and the adapters leave it as it was.
    assert len({row["weights"] for row in rows}) == 3
    assert all(len({str(r["base_recall"]) for r in rows if r["weights"] == row["weights"]}) == 1 for row in rows)


def test_a_study_goes_on_where_it_stopped(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(one_run.BASE_STEPS, ("window", "key"), 2)
    lines = results.read_text().splitlines()
    cut_off = tmp_path / "memory.jsonl"
    cut_off.write_text("\n".join(lines[:-1]) + "\n")
    assert len(start(cut_off, "--seeds", "0", "1")) == len(lines)
    again, before = (json.loads(text.splitlines()[-1]) for text in (cut_off.read_text(), results.read_text()))
    assert (again["key"], again["losses"], again["recall"]) == (before["key"], before["losses"], before["recall"])


def test_tables_and_picture(results: Path, tmp_path: Path) -> None:
    rows = list(study.finished(results).values())
    table = report.task_table(rows, "key", shown=(1, 10))
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {arm}" for arm in ["base model", *ARMS]]
    of = {(row["settings"]["arm"], row["settings"]["seed"]): row["recall"]["10"] for row in rows}
    mean = sum(of["TALAN, all blocks", seed] - of["LoRA", seed] for seed in (0, 1)) / 2
    assert f"{100 * mean:+.1f}" in table.splitlines()[-1]
    assert all(
        0 <= share.low <= share.mean <= share.high <= 1 for share in report.curves(rows, "key")["LoRA"].values()
    )
    page = tmp_path / "evidence.md"
    names = ("key", "findings", "real model", "generation", "binding")
    page.write_text("".join(f"<!-- table memory {name} -->\n<!-- end -->\n" for name in names))
    none = str(tmp_path / "none.jsonl")
    others = [word for name in ("generation", "real-model", "binding") for word in (f"--{name}", none)]
    report.main(["--results", str(results), *others, "--page", str(page)])
    assert "TALAN, all blocks" in page.read_text()
    assert (tmp_path / "images" / "memory_recall.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_the_stored_results() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, table in report.tables_of(report.RESULTS, report.GENERATION_RESULTS, real_model.RESULTS).items():
        assert table in text, f"{name}: run python -m benchmarks.memory.report --page docs/evidence.md"


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(("names", "facts"), [(3, 1), (3, 2), (3, 3), (8, 8)])
def test_each_question_of_a_text_has_its_own_answer_in_it(names: int, facts: int, spread: bool) -> None:
    questions = names
    generator = torch.Generator().manual_seed(0)
    tokens, ends, answers = binding.make_questions(2, 20, questions, facts, generator, names=names, spread=spread)
    assert tokens.shape == (20, 2 * recall.WINDOW) and answers.shape == ends.shape == (20, questions)
    assert (ends[:, 0] == tokens.shape[1] - 1).all()
    for text, places, right in zip(tokens.tolist(), ends.tolist(), answers.tolist(), strict=True):
        known = dict(divmod(token - recall.FIRST_PAIR, recall.ANSWERS) for token in text[1 : 1 + names])
        assert len(known) == facts
        # No question stands on another one, or on a fact.
        assert places == sorted(set(places), reverse=True) and min(places) > names + 1
        assert {place % 2 for place in places} == {1}
        assert all(text[place - 1] == recall.ASK for place in places)
        asked = [text[place] - recall.FIRST_NAME for place in places]
        if not spread:
            assert places == [2 * recall.WINDOW - 1 - 2 * question for question in range(questions)]
            assert len(set(asked)) == facts
        assert [known[name] + recall.FIRST_ANSWER for name in asked] == right


def test_each_question_of_a_count_is_about_the_marks_before_it() -> None:
    tokens, ends, answers = binding.make_counts(2, 20, 6, torch.Generator().manual_seed(0))
    assert (ends[:, 0] == tokens.shape[1] - 1).all()
    for text, places, right in zip(tokens.tolist(), ends.tolist(), answers.tolist(), strict=True):
        assert sorted(places, reverse=True) == places and len(set(places)) == 6
        assert [text[place] for place in places] == [recall.ASK] * 6
        assert [recall.FIRST_ANSWER + text[:place].count(recall.MARK) for place in places] == right


@pytest.mark.parametrize("task", ["pairs", "count"])
def test_a_study_of_binding_keeps_every_curve(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(one_run.BASE_STEPS, ("window", task), 2)
    file, small = tmp_path / "binding.jsonl", ["--steps", "21", "--batch-size", "2", "--rows", "4", "--seeds", "0"]
    arms = ["LoRA", "delta, first block, keys of its attention"]
    for _ in range(2):
        binding.main(["--results", str(file), "--task", task, "--arms", *arms, *small])
    rows = list(binding.finished(file).values())
    assert [row["settings"]["arm"] for row in rows] == arms
    assert all(len(row["losses"]) == 2 for row in rows)
    assert rows[0]["trainable"] < rows[1]["trainable"]
    assert len(binding.table(rows).splitlines()) == 4


def test_chunks_through_a_bounded_cache_answer_as_one_forward_does() -> None:
    base = recall.pretrained("key", 0, 1)
    adapter, axes = one_run.ARMS["TALAN, all blocks"]
    config = one_run.make_config(adapter, base, 2, "all-linear", {**axes, "init_talan_weights": False})
    model = get_peft_model(base, config).eval()
    sizes = []
    for windows in (8, 24):
        tokens, _ = recall.make_texts("key", windows, 3, torch.Generator().manual_seed(0))
        found, cache = generation.answer_in_chunks(model, tokens, 48)
        with torch.no_grad():
            assert torch.equal(found, recall.answer_logits(model, tokens).argmax(-1))
        sizes.append(generation.cache_bytes(cache))
    assert sizes[0] == sizes[1]
    assert min(sizes[0].values()) > 0


@pytest.mark.parametrize("windows", [1, 8])
def test_a_simulated_text_counts_what_attention_does_not_reach_from_the_key(windows: int) -> None:
    lengths, places = torch.tensor([30.0, 1e5]), set()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        tokens, answers, counts = generation.make_counted_texts(windows, lengths, generator)
        assert tokens.shape == counts.shape
        counted = (counts[1] > 1).nonzero().flatten()
        assert counts[1, counted].sum() == pytest.approx(1e5)
        key = (tokens[1] == answers[1]).nonzero().flatten()[-1] - 1
        assert tokens[1, key] == recall.MARK
        assert counted[-1] < key or counted[0] > key + 1 + recall.REACH
        assert counts[1, -1] == 1
        places.add(bool(counted[-1] < key))
    assert places == ({True} if windows == 1 else {False, True})


def test_simulated_lengths_are_trained_on_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(one_run.BASE_STEPS, ("window", "key"), 2)
    file = tmp_path / "generation.jsonl"
    arguments = ["--arms", "TALAN, all blocks", "--tokens", "48", "--rows", "2", "--steps", "2", "--soft-cap", "7"]
    generation.main([*arguments, "--simulated", "1000", "--results", str(file)])
    row = json.loads(file.read_text())
    assert (row["settings"]["soft_cap"], row["settings"]["simulated"], len(row["losses"])) == (7.0, 1000, 1)
    assert "| 1,000 | 7 | 0 |" in report.generation_table([row])


def test_a_llamas_weights_with_a_window(tmp_path: Path) -> None:
    base = make_base("llama", torch.float32)
    assert isinstance(base, LlamaForCausalLM)
    base.save_pretrained(tmp_path / "llama")
    tokens = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    wide, narrow = (real_model.load_with_window(str(tmp_path / "llama"), window).eval() for window in (24, 4))
    with torch.no_grad():
        expected = base.eval()(tokens).logits
        assert torch.equal(wide(tokens).logits, expected)
        assert not torch.allclose(narrow(tokens).logits[:, -1], expected[:, -1])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with a tokenizer that has every word of the story and every colour."""
    folder = str(tmp_path_factory.mktemp("llama") / "tiny")
    tokenizer = Tokenizer(WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    facts = [real_model.FACT.format(colour) for colour in real_model.COLOURS]
    words = [*plain_text(), *facts, " ".join(real_model.COLOURS)]
    tokenizer.train_from_iterator(words, WordLevelTrainer(special_tokens=["<unk>"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    model = make_base("llama", torch.float32)
    model.resize_token_embeddings(tokenizer.get_vocab_size())
    model.save_pretrained(folder)
    return folder


def start_real_model(folder: str, results: Path) -> dict[str, dict[str, Any]]:
    small = "--pieces 4 8 --steps 2 --batch-size 2 --story-tokens 3 --window 16 --scored 1 10 --rows 4 --seeds 0 1"
    real_model.main(["--model", folder, *small.split(), "--results", str(results)])
    return study.finished(results)


def test_every_arm_of_the_real_model_has_equally_many_tries(llama: str, tmp_path: Path) -> None:
    results = tmp_path / "real.jsonl"
    rows = start_real_model(llama, results)
    assert len(rows) == 2 + len(ARMS) * (len(real_model.RATES) + 2)
    for arm in ARMS:
        of_arm = [row for row in rows.values() if row["settings"]["arm"] == arm]
        tries = [row for row in of_arm if row["settings"]["seed"] == study.DEVELOPMENT_SEED]
        rates = [(row["settings"]["learning_rate"], row["settings"]["side_path_lr_scale"]) for row in tries]
        assert rates == list(real_model.RATES)
        best = min(tries, key=lambda row: row["last_loss"])["settings"]
        fresh = [row["settings"] for row in of_arm if row["settings"]["seed"] != study.DEVELOPMENT_SEED]
        assert fresh == [{**best, "seed": seed} for seed in (0, 1)]
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:-1]) + "\n")
    again = start_real_model(llama, results)[list(rows)[-1]]
    assert again["losses"] == list(rows.values())[-1]["losses"]
    table = report.real_model_table(list(rows.values()))
    names = [real_model.FULL, real_model.BASE, *ARMS]
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {name}" for name in names]
    assert len({line.count("|") for line in table.splitlines()}) == 1
    of = {(row["settings"]["arm"], row["settings"]["seed"]): row["recall"]["10"] for row in rows.values()}
    mean = sum(of["TALAN, all blocks", seed] - of["LoRA", seed] for seed in (0, 1)) / 2
    assert f"{100 * mean:+.1f}" in table.splitlines()[-1]


def test_a_text_holds_its_fact_once_and_asks_for_it_without_the_answer(llama: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    texts = real_model.Texts(tokenizer, plain_text()[0])
    tokens, answers, asked = texts.draw(3, [5, 20, 9], random.Random(0))
    question = tokenizer.decode(texts.question)
    for row, answer in zip(tokens, answers, strict=True):
        text = tokenizer.decode(row)
        assert text.count(question) == 1 + 3
        # The fact is the first sentence; no question is followed by its answer.
        assert text.startswith(real_model.FACT.format(tokenizer.decode(answer)).strip())
        for place in asked.tolist():
            assert tokenizer.decode(row[: place + 1]).endswith(question)
    assert asked[-1] == tokens.shape[1] - 1
    assert texts.of_length(3, 64, random.Random(0))[0].shape == (3, 64)


@pytest.fixture(scope="module")
def asked_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with a tokenizer of bytes, which takes any text, and a template for messages."""
    folder = str(tmp_path_factory.mktemp("asked") / "tiny")
    save_tiny_model(Path(folder), depth=2)
    return folder


@pytest.mark.parametrize("form", ["prompt-completion", "messages"])
def test_an_ordinary_row_is_a_fact_a_piece_of_text_and_a_question_of_the_wanted_length(
    asked_llama: str, form: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(asked_llama)
    trained, held_out = (RowMaker(tokenizer, form, part) for part in (False, True))
    rows = trained.rows(12, 150, 300, 0)
    assert trained.rows(12, 150, 300, 0) == rows
    lengths = [encode(tokenizer, row).length for row in rows]
    assert min(lengths) >= 140
    assert max(lengths) <= 300
    assert len(set(map(str, rows))) == 12
    for kind, row in zip([*range(3)] * 4, rows, strict=True):
        fact, question, asked, answers = KINDS[kind]
        talks = form == "messages"
        prompt, answer = (row[name][0]["content"] if talks else row[name] for name in ("prompt", "completion"))
        assert answer.strip() in answers.split()
        assert prompt.startswith(fact.format(answer.strip()))
        assert prompt.endswith(asked if talks else question)
    overlap = {tuple(text) for text in trained.texts} & {tuple(text) for text in held_out.texts}
    assert not overlap


def test_ordinary_rows_are_trained_on_and_scored(asked_llama: str, tmp_path: Path) -> None:
    changes = {"steps": 2, "batch_size": 2, "shortest": 120, "longest": 160, "window": 70, "scored": [2, 3], "rows": 3}
    tries: list[tuple[str, dict[str, Any]]] = [
        ("LoRA", {"shrinking": {}}),
        ("TALAN", {"shrinking": {}}),
        ("TALAN", {"by_command": True}),
    ]
    for arm, more in tries:
        words = ["--arms", arm, "--seeds", "0", "--results", str(tmp_path / "rows.jsonl")]
        ordinary_rows.main(["--model", asked_llama, *words, "--changes", json.dumps({**changes, **more, "rank": 2})])
    lora, here, command = study.finished(tmp_path / "rows.jsonl").values()
    assert all(set(row["right"]) == {"2", "3"} for row in (lora, here, command))
    assert lora["trainable"] < here["trainable"] == command["trainable"]
    # What was trained is stored, whatever the defaults become.
    assert (lora["axes"], here["axes"], command["axes"]) == ({}, RECALL_AXES, RECALL_AXES)
    # The answers' own loss is stored, too, and the prompts add to it.
    for row in (lora, here, command):
        assert all(answers < whole for answers, whole in zip(row["completion_losses"], row["losses"], strict=True))
    # The command does what the parts do, and what is saved says the same when it is loaded.
    assert command["windows"] == here["windows"]
    assert command["windows"][0] > 70
    assert command["losses"] == pytest.approx(here["losses"], abs=2e-3)
    assert command["text_loss"] == pytest.approx(here["text_loss"], abs=1e-4)
    page = tmp_path / "recall.md"
    page.write_text("<!-- table memory ordinary rows -->\n<!-- end -->\n")
    ordinary_rows.main(["--results", str(tmp_path / "rows.jsonl"), "--page", str(page)])
    assert page.read_text().count("| mixed |") == len(tries)


def test_the_page_on_recall_shows_the_stored_runs() -> None:
    rows = read_lines(ordinary_rows.RESULTS)
    remedy = "run python -m benchmarks.memory.ordinary_rows --page docs/how-to/recall.md docs/evidence.md"
    recall, evidence = (page.read_text(encoding="utf-8") for page in (PAGE.parent / "how-to" / "recall.md", PAGE))
    assert ordinary_rows_report.recall_table(rows) in recall, remedy
    assert ordinary_rows_report.loss_table(rows) in recall, remedy
    assert ordinary_rows_report.table(rows) in evidence, remedy


def test_the_losses_of_answers_are_shown_by_step(tmp_path: Path) -> None:
    stored = ordinary_rows_report.by_the_command(read_lines(ordinary_rows.RESULTS))[0]
    stored = {**stored, "completion_losses": [2.0] * 50 + [1.0] * 150}
    (line,) = ordinary_rows_report.loss_table([stored]).splitlines()[2:]
    assert line.endswith("| 2.00 | 2.00 | 1.00 | 1.00 | 1.00 | 1.00 |  |  |")
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="it has no place for a table"):
        ordinary_rows_report.fill(page, [stored])
