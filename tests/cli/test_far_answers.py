"""Rows whose answers stand beyond a window: what doesn't fit is told, and right answers are counted by length."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_talan.cli import main
from peft_talan.cli.console import MISUSED
from peft_talan.sft.data import DataError, Rows
from peft_talan.sft.far_answers import count_right
from peft_talan.sft.models import answer
from peft_talan.sft.prompts import PromptForm, encode, encode_rows
from peft_talan.sft.row_notes import describe_far_answers
from peft_talan.sft.window import with_sliding_window

from ..offline_hub import make_tokenizer

Answers = Callable[[list[str | Path]], str]
Fails = Callable[..., str]

WINDOW = 16
FILLER = "All of this was said before. "


def rows_of(rows: list[dict[str, Any]]) -> Rows:
    return Rows("data.jsonl", rows, [f"data.jsonl:{number}" for number in range(1, len(rows) + 1)])


def far_row(number: int, length: int, talks: bool = False) -> dict[str, Any]:
    """A row of some more bytes than `length`."""
    prompt, completion = f"It is {number}.\n{(FILLER * 9)[:length]}\nIt is", f" {number}"
    if not talks:
        return {"prompt": prompt, "completion": completion}
    said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": str(number)}]
    return {"messages": said}


def told_of(rows: list[dict[str, Any]]) -> list[str]:
    """What is told of rows for a window of 40."""
    tokenizer, read = make_tokenizer(), rows_of(rows)
    return describe_far_answers(tokenizer, read, encode_rows(tokenizer, read), 40)


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("talks", [False, True])
def test_what_was_learned_is_counted_by_train_and_by_generate(
    talks: bool, saved: Path, tmp_path: Path, answers: Answers, fails: Fails, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rows, learned by heart."""
    rows = [far_row(3, 20, talks), far_row(7, 90, talks)]
    data, output = write(tmp_path / "data.jsonl", rows), tmp_path / "out"
    words = ["--data", data, "--eval-data", data, "--output", output, "--window", str(WINDOW)]
    run = ["train", "--model", saved / "model", *words, "--steps", "60", "--batch-size", "2", "--rank", "8"]
    assert main([str(word) for word in [*run, "--learning-rate", "0.01", "--json"]]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)["right_answers"]
    lengths = [encode(make_tokenizer(), row).length for row in rows]
    for part, length in zip(found, lengths, strict=True):
        assert part["shortest"] <= length <= part["longest"] == WINDOW * part["windows"]
        assert part["rows"] == 1
        assert part["right"] == {"adapter": 1, "base model": 0, "base model without window": 0}
        assert part["wrong"] == []
    # What was told on the way.
    for line in (
        "without its window the model answers 0 of 2 rows right; training mends a right answer in other words",
        "side paths start from 2 rows; it can take",
        "side paths have started as a memory (",
        "2 rows are few",
    ):
        assert printed.err.count(f"note: {line}") == 1
    assert json.loads(answers(["generate", output, "--data", data, "--json"])) == found
    shown = answers(["generate", output, "--data", data])
    assert f"{found[0]['shortest']}-{found[0]['longest']}" in shown
    assert "base model without window" in shown
    assert "Wrong answers" not in shown
    assert json.loads((output / "right_answers.json").read_text()) == found
    # As text it is what the row says, and of other rows nothing is right.
    prompt = rows[0]["messages"][0]["content"] if talks else rows[0]["prompt"]
    assert answers(["generate", output, prompt]).strip() == "3"
    other = write(tmp_path / "other.jsonl", [far_row(8, 20, talks)])
    (part,) = json.loads(answers(["generate", output, "--data", other, "--json"]))
    assert part["right"]["adapter"] == 0
    # The answer is the one that was learned, up to its end, which is right, or to the first wrong token.
    (wrong,) = part["wrong"]
    question = f"It is 8. {FILLER[:20]} It is"
    assert wrong == {
        "place": f"{other}:1",
        "tokens": encode(make_tokenizer(), far_row(8, 20, talks)).length,
        "question": question,
        "expected": "8",
        "given": "3…",
    }
    shown = answers(["generate", output, "--data", other])
    assert all(text in shown for text in ("Wrong answers", f"{other}:1", question, "3…"))
    # A folder that was moved tells where its base model is.
    moved = output.rename(tmp_path / "moved")
    told = fails(["generate", moved, "--data", data])
    assert f"its base model {output / 'base_model'} is there no more; if the folder was moved" in told
    assert json.loads(answers(["generate", moved, "--data", data, "--model", moved / "base_model", "--json"])) == found


def test_the_base_model_is_counted_with_its_window_and_without_as_it_generates(saved: Path) -> None:
    """Answers are what the base model says after its window alone, or after the whole text; no end is asked for."""
    tokenizer, plain = make_tokenizer(), PromptForm(chat=False)
    base = AutoModelForCausalLM.from_pretrained(saved / "model")
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "proj" in name:
                parameter.mul_(40)  # As it is saved, it repeats the last token.
        for token in range(len(tokenizer)):
            text = tokenizer.decode([token])
            if not (text.isascii() and text.strip()) or token in tokenizer.all_special_ids:
                base.get_input_embeddings().weight[token] = 0  # It says no parts of letters.
    windowed = with_sliding_window(base, WINDOW)
    rows, expected = [], {"base model": 0, "base model without window": 0}
    for number in range(40):
        prompt = far_row(number, 40 + number)["prompt"]
        said = [answer(model, tokenizer, prompt, plain, 1) for model in (windowed, base)]
        if said[0] != said[1] and all(text.isascii() and text.strip() for text in said):
            # Two rows of each kind that differ.
            reader = list(expected)[len(rows) % 2]
            rows.append({"prompt": prompt, "completion": said[len(rows) % 2]})
            expected[reader] += 1
    assert len(rows) >= 4
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    found = count_right(get_peft_model(windowed, config), tokenizer, rows_of(rows))
    # A fresh adapter says the same, and doesn't end there.
    for reader, right in {"adapter": 0, **expected}.items():
        assert sum(part.right[reader] for part in found) == right
    assert sum(part.rows for part in found) == len(rows)
    assert windowed.config.sliding_window == WINDOW


def test_a_model_without_a_window_or_an_adapter_is_counted_alone(
    saved: Path, tmp_path: Path, answers: Answers
) -> None:
    data = write(tmp_path / "data.jsonl", [far_row(1, 20), far_row(2, 200)])
    found = json.loads(answers(["generate", saved / "lora", "--data", data, "--json"]))
    assert [(part["shortest"], part["longest"], part["windows"]) for part in found] == [
        (1, 128, None),
        (129, 256, None),
    ]
    assert [set(part["right"]) for part in found] == [{"adapter", "base model"}] * 2
    assert "windows" not in answers(["generate", saved / "lora", "--data", data])
    answers(["merge", saved / "adapter", tmp_path / "merged"])
    found = json.loads(answers(["generate", tmp_path / "merged", "--data", data, "--json"]))
    assert [set(part["right"]) for part in found] == [{"model"}] * 2


def test_some_wrong_answers_are_shown_and_all_are_in_json(saved: Path, tmp_path: Path, answers: Answers) -> None:
    rows = [{"prompt": f"It is [red]{number}[/red]. It is", "completion": f" [{number}]"} for number in range(5)]
    data = write(tmp_path / "data.jsonl", rows)
    shown = answers(["generate", saved / "lora", "--data", data])
    assert "Wrong answers: 3 of 5, all with --json" in shown
    assert [f"It is [red]{number}[/red]. It is" in shown for number in range(5)] == [True] * 3 + [False] * 2
    (part,) = json.loads(answers(["generate", saved / "lora", "--data", data, "--json"]))
    assert [wrong["place"] for wrong in part["wrong"]] == [f"{data}:{number}" for number in range(1, 6)]
    assert [wrong["expected"] for wrong in part["wrong"]] == [f"[{number}]" for number in range(5)]


def test_counting_refuses_what_rows_leave_no_room_for(saved: Path, tmp_path: Path, fails: Fails) -> None:
    data = write(tmp_path / "data.jsonl", [far_row(1, 20)])
    command = ["generate", saved / "adapter", "--data", data]
    assert "--data: prompts can't be given with it" in fails([*command, "a prompt"])
    assert "--data: --temperature and --seed can't" in fails([*command, "--seed", "1", "--temperature", "0.5"])
    assert "--data: --max-new-tokens can't" in fails([*command, "--max-new-tokens", "5"])
    assert "no such file" in fails(["generate", saved / "adapter", "--data", "/no/where.jsonl"])
    plain = write(tmp_path / "plain.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"plain\.jsonl: rows of 'text' have no answers; give 'prompt'"):
        main(["--traceback", "generate", str(saved / "adapter"), "--data", str(plain)])
    assert main(["generate", str(saved / "adapter"), "--data", str(plain)]) == MISUSED


def glued(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "completion": row["completion"].strip()}


def nearer(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "prompt": f"{row['prompt']}{row['completion']}, so it is"}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ([], []),
        (
            [far_row(1, 0)] * 3,
            ["3 of 70 rows have at most 40 tokens, the window: nothing lies beyond it; give longer"],
        ),
        ([nearer(far_row(1, 90))], ["1 of 70 rows have their answer in the last 40 tokens of the prompt, where"]),
        # A part of another word is no answer.
        ([{"prompt": f"It is 1. {FILLER * 2}It is 11 or", "completion": " 1"}], []),
        (
            [{"prompt": FILLER * 2, "completion": "said otherwise"}],
            [
                "1 of 70 rows have an answer that their prompt doesn't hold",
                "1 of 70 rows have an answer of more than 8 tokens",
            ],
        ),
        ([glued(far_row(1, 90))] * 2, ["2 of 70 rows have a completion that is written on to the prompt's last word"]),
    ],
)
def test_rows_that_teach_no_recall_are_counted_with_what_to_change(
    changed: list[dict[str, Any]], told: list[str]
) -> None:
    rows = [*changed, *(far_row(number, 90) for number in range(100, 170 - len(changed)))]
    lines = told_of(rows)
    assert len(lines) == len(told)
    for line, beginning in zip(lines, told, strict=True):
        assert line.startswith(beginning)
        assert line.endswith("(the first: data.jsonl:1)")


def test_few_rows_and_plain_texts_are_told() -> None:
    assert told_of([far_row(n, 90) for n in range(63)]) == [
        "63 rows are few: they are learned by heart; give some hundred that differ"
    ]
    (line,) = told_of([{"text": "a"}] * 3)
    assert line.startswith("all 3 rows are plain 'text'")


def test_side_paths_that_cannot_start_as_a_memory_tell_why(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl", [far_row(n, 0) for n in range(4)])
    words = ["--data", data, "--output", tmp_path / "out", "--window", "64", "--steps", "1", "--rank", "2"]
    assert main([str(word) for word in ["train", "--model", saved / "model", *words]]) == 0
    told = capsys.readouterr().err
    assert "note: 4 of 4 rows have at most 64 tokens, the window" in told
    assert "note: side paths have started whitened, not as a memory: dataloader: no answer has a token further" in told


@torch.no_grad()
def test_the_command_s_window_is_back_after_reading_without_it(saved: Path) -> None:
    model = with_sliding_window(AutoModelForCausalLM.from_pretrained(saved / "model"), WINDOW)
    tokens = torch.tensor([make_tokenizer()(FILLER * 3)["input_ids"]])
    before = model(tokens).logits
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    adapted = get_peft_model(model, config)
    assert adapted.train().training
    count_right(adapted, make_tokenizer(), rows_of([far_row(1, 20)]))
    assert adapted.training
    assert torch.equal(adapted.eval()(tokens).logits, before)
