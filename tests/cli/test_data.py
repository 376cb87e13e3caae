"""What can be trained on: every format loads and has the tokens that TRL gives it; what can't be used is one line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import deepseekv3_chat_template, qwen3_5_think_chat_template, qwen3_chat_template

from peft_talan.sft.data import DataError, read_rows
from peft_talan.sft.prompts import PromptForm, encode, encode_prompt, encode_rows, stop_tokens
from peft_talan.sft.recall import last_answers
from peft_talan.sft.training import make_trainer, marked_template

from ..offline_hub import CHAT_TEMPLATE, make_tokenizer

Fails = Callable[..., str]

GOOD = json.dumps({"prompt": "1 + 1?", "completion": "2"})
USER, ASSISTANT = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}

BAD_FILES: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 1, "no rows"),
    "blank lines only": (b"\n \n\n", 1, "no rows"),
    "empty array": (b"[]", 1, "no rows"),
    "not JSON": (f"{GOOD}\nhello\n".encode(), 2, "not JSON"),
    "trailing comma": (f"{GOOD}\n{GOOD[:-1]},}}\n".encode(), 2, "not JSON"),
    "truncated": (f"{GOOD}\n{GOOD[:20]}".encode(), 2, "not JSON"),
    "truncated array": (f"[{GOOD},\n{GOOD[:20]}".encode(), 2, "not JSON"),
    "UTF-16": (GOOD.encode("utf-16"), 1, "not UTF-8"),
    "Latin-1": (f"{GOOD}\n".encode() + '{"prompt": "é", "completion": "b"}'.encode("latin-1"), 2, "not UTF-8"),
    "an array a line": (f"{GOOD}\n\n[1, 2]\n".encode(), 3, "JSON object"),
    "a number a line": (f"{GOOD}\n7\n".encode(), 2, "JSON object"),
    "missing key": (f'{GOOD}\n{{"prompt": "a"}}\n'.encode(), 2, "'completion' missing"),
    "null": (f'{GOOD}\n{{"prompt": "a", "completion": null}}\n'.encode(), 2, "'completion' must be a text"),
    "mixed formats": (f'{GOOD}\n{{"text": "a"}}\n'.encode(), 2, "use one format"),
    "mixed messages and texts": (
        f"{GOOD}\n{json.dumps({'prompt': [USER], 'completion': [ASSISTANT]})}\n".encode(),
        2,
        "use one format",
    ),
    "half a conversation": (json.dumps({"prompt": [USER], "completion": "2"}).encode(), 1, "'prompt' must be a text"),
    "a number for a text": (
        f'{GOOD}\n{{"prompt": "a", "completion": 3}}\n'.encode(),
        2,
        "'completion' must be a text",
    ),
    "empty answer": (f'{GOOD}\n{{"prompt": "a", "completion": " "}}\n'.encode(), 2, "'completion' must be a text"),
    "other keys": (b'{"instruction": "a", "output": "b"}\n', 1, "rename 'instruction' to 'prompt'"),
    "unknown keys": (b'{"a": "b"}\n', 1, "give 'messages', 'prompt' and 'completion', or 'text'"),
    "messages no list": (b'{"messages": "hi"}\n', 1, "'messages' must be a list"),
    "no messages": (b'{"messages": []}\n', 1, "'messages' must be a list"),
    "message no object": (b'{"messages": ["a", "b"]}\n', 1, "each of 'messages'"),
    "message without role": (b'{"messages": [{"content": "a"}]}\n', 1, "each of 'messages'"),
    "message without content": (b'{"messages": [{"role": "user", "content": null}]}\n', 1, "each of 'messages'"),
}

FORMATS: dict[str, list[dict[str, object]]] = {
    "messages": [{"messages": [USER, ASSISTANT]}, {"messages": [{"role": "system", "content": "Add."}, USER]}],
    "conversational prompt": [{"prompt": [USER], "completion": [ASSISTANT]}],
    "plain prompt": [{"prompt": "1 + 1 = ", "completion": "2"}, {"prompt": "2 + 2 = ", "completion": "4"}],
    "text": [{"text": "One and one is two."}],
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_data_is_named_by_file_and_line(kind: str, saved: Path, tmp_path: Path, fails: Fails) -> None:
    content, line, message = BAD_FILES[kind]
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    words = ["--model", saved / "model", "--data", file, "--output", tmp_path / "out"]
    error = fails(["train", *words])
    assert f"{file}:{line}: " in error
    assert message in error


@pytest.mark.parametrize("command", ["compare", "analyze"])
def test_every_command_reads_with_the_same_reader(command: str, saved: Path, tmp_path: Path, fails: Fails) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f'{GOOD}\n{{"prompt": "a"}}\n')
    words = {
        "compare": ["compare", "--model", saved / "model", "--data", file, "--output", tmp_path / "out"],
        "analyze": ["analyze", saved / "adapter", file, tmp_path / "out"],
    }
    assert f"{file}:2: 'completion' missing" in fails(words[command])


@pytest.mark.parametrize("name", ["nowhere.jsonl", "no/such/data.csv"])
def test_missing_data_is_named(name: str, saved: Path, tmp_path: Path, fails: Fails) -> None:
    words = ["--model", saved / "model", "--data", tmp_path / name, "--output", tmp_path / "out"]
    assert f"{tmp_path / name}: no such file" in fails(["train", *words])


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet", "", "folder"])
def test_files_of_every_kind_hold_the_same_rows(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # Numbers and "NA" are texts here, and other columns are left out.
    rows = [{"prompt": f"{n} + {n} = ", "completion": str(2 * n) if n else "NA", "id": str(n)} for n in range(4)]
    file = tmp_path / f"data{ending}"
    if ending in (".csv", ".tsv"):
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]), delimiter="," if ending == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif ending == ".parquet":
        Dataset.from_list(rows).to_parquet(file)
    elif ending == "folder":
        Dataset.from_list(rows).save_to_disk(str(file))
    else:
        lines = [json.dumps(row) for row in rows]
        file.write_text(f"[{','.join(lines)}]" if ending == ".json" else "\ufeff" + "\n".join(lines) + "\n")
    found = read_rows(file)
    assert found.rows == [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    assert found.form == "prompt-completion"
    assert [row["prompt"] for row in read_rows(file, most=2).rows] == [row["prompt"] for row in rows[:2]]


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"data\.parquet: can't be"):
        read_rows(tmp_path / "data.parquet")
    for cells, message in (
        ("a,b\nc,\n", r":3: 'completion' must be a text"),
        ("Add 1, 2,3\n", r":2: more cells than the header has names; put a text that holds ','"),
    ):
        (tmp_path / "data.csv").write_text(f"prompt,completion\n{cells}")
        with pytest.raises(DataError, match=rf"data\.csv{message}"):
            read_rows(tmp_path / "data.csv")
    (tmp_path / "data.csv").write_bytes("prompt,completion\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"data\.csv:1: not UTF-8"):
        read_rows(tmp_path / "data.csv")


def test_what_is_seldom_meant_is_counted(tmp_path: Path) -> None:
    bot = {"role": "bot", "content": "2"}
    rows = [
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, bot]},
        {"messages": [USER, bot]},
        {"messages": [USER]},
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    notes = read_rows(file).notes
    assert f"2 of 4 rows have a message of the role 'bot' (the first: {file}:2)" in notes
    assert f"3 of 4 rows do not end with a message of the assistant (the first: {file}:2)" in notes


def test_sharegpt_names_are_taken(tmp_path: Path) -> None:
    turns = [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"conversations": turns}))
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read_rows(tmp_path / "data.jsonl").rows == [{"messages": expected}]


def tokenizer_with_bos() -> PreTrainedTokenizerBase:
    """It adds a token at the start of every text, and its chat template writes the same one, as Llama's does."""
    tokenizer = make_tokenizer()
    start = "<|im_start|>"
    number = tokenizer.convert_tokens_to_ids(start)
    tokenizer.bos_token = start
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, number)]
    )
    return tokenizer


def tokens_of_trl(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Any], **options: Any) -> list[Any]:
    """What TRL makes of rows, each by itself: of several, Arrow gives each one all keys of all."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    arguments = SFTConfig("out", report_to="none", use_cpu=True, bf16=False, dataloader_pin_memory=False, **options)
    parts = [rows] if options.get("packing") else [[row] for row in rows]
    trainers = [
        SFTTrainer(model, arguments, train_dataset=Dataset.from_list(part), processing_class=tokenizer)
        for part in parts
    ]
    return [row for trainer in trainers for row in trainer.train_dataset]


@pytest.mark.parametrize("make", [make_tokenizer, tokenizer_with_bos])
@pytest.mark.parametrize("kind", [*FORMATS, "assistant only", "packed"])
def test_rows_become_the_tokens_that_trl_trains_on(
    kind: str, make: Callable[[], PreTrainedTokenizerBase], saved: Path, tmp_path: Path
) -> None:
    talks = [{"messages": [USER, ASSISTANT, {**USER, "content": f"{n}?"}, ASSISTANT]} for n in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, FORMATS.get(kind, talks))))
    rows, tokenizer = read_rows(tmp_path / "data.jsonl"), make()
    options = {"assistant only": {"assistant_only_loss": True}, "packed": {"packing": True, "max_length": 64}}
    marked = marked_template(tokenizer) if kind == "assistant only" else None
    trained_on = make_trainer(
        AutoModelForCausalLM.from_pretrained(saved / "model"),
        tokenizer,
        encode_rows(tokenizer, rows, marked),
        PromptForm.of(rows, tokenizer),
        None,
        tmp_path,
        **(options["packed"] if kind == "packed" else {}),
    ).train_dataset
    of_trl = tokens_of_trl(saved / "model", tokenizer, rows.rows, **options.get(kind, {}))
    for found, expected in zip(trained_on, of_trl, strict=True):
        for column in ("input_ids", "labels"):
            assert found[column] == expected[column]
        assert found["input_ids"].count(tokenizer.eos_token_id) >= 1
        if tokenizer.bos_token_id is not None:
            assert found["input_ids"][:2].count(tokenizer.bos_token_id) == 1


def test_rows_with_other_tools_and_arguments_are_trained_on_as_they_are(saved: Path, tmp_path: Path) -> None:
    def row(name: str, **more: object) -> dict[str, object]:
        tool = {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": {name: {"type": "string"}}}},
        }
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {name: "x"}}}]}
        return {"messages": [USER, call, {"role": "tool", "content": "y"}, ASSISTANT], "tools": [tool], **more}

    data = [row("a"), row("b", chat_template_kwargs={"enable_thinking": False})]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, data)))
    rows, tokenizer = read_rows(tmp_path / "data.jsonl"), make_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    model = AutoModelForCausalLM.from_pretrained(saved / "model")
    form, encoded = PromptForm.of(rows, tokenizer), encode_rows(tokenizer, rows)
    trained_on = make_trainer(model, tokenizer, encoded, form, None, tmp_path).train_dataset
    of_trl = tokens_of_trl(saved / "model", tokenizer, rows.rows)
    for found, expected in zip(trained_on, of_trl, strict=True):
        assert "null" not in tokenizer.decode(found["input_ids"])
        assert (found["input_ids"], found["labels"]) == (expected["input_ids"], expected["labels"])


THOUGHT = {**ASSISTANT, "reasoning_content": "One more."}


@pytest.mark.parametrize(
    ("template", "answer", "asked", "end"),
    [
        # The generation prompt has no marks of thoughts, and the answer has.
        (qwen3_chat_template, ASSISTANT, "<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>"),
        # The model writes its thoughts by itself.
        (qwen3_chat_template, THOUGHT, "<|im_start|>assistant\n", "<|im_end|>"),
        (qwen3_5_think_chat_template, ASSISTANT, "assistant\n<think>\n\n</think>\n\n", "<|im_end|>"),
        # The generation prompt has a mark of thoughts, and the answer none.
        (deepseekv3_chat_template, ASSISTANT, "<\uff5cAssistant\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"),
        (CHAT_TEMPLATE, ASSISTANT, "<|im_start|>assistant\n", "<|im_end|>"),
        # A space belongs to the answer's first token.
        ("{% for message in messages %}: {{ message['content'] }}<|im_end|>{% endfor %}"
         "{% if add_generation_prompt %}:{% endif %}", ASSISTANT, ":", "<|im_end|>"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("talks", [True, False])
def test_what_a_template_writes_around_an_answer_is_none_of_it(
    template: str, answer: dict[str, str], asked: str, end: str, talks: bool, tmp_path: Path
) -> None:
    row = {"messages": [USER, answer]} if talks else {"prompt": [USER], "completion": [answer]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    rows, tokenizer = read_rows(tmp_path / "data.jsonl"), make_tokenizer()
    tokenizer.chat_template = template
    (encoded,) = encode_rows(tokenizer, last_answers(rows))
    assert encoded == encode(tokenizer, rows.rows[0])
    assert tokenizer.decode(encoded.prompt).endswith(f"{asked}")
    said = "<think>\nOne more.\n</think>\n\n2" if answer is THOUGHT else "2"
    assert tokenizer.decode(encoded.answer).strip() == said
    assert tokenizer.decode(encoded.end) == end
    PromptForm.of(rows, tokenizer).save(tmp_path)
    form = PromptForm.load(str(tmp_path))
    assert form.generation_prompt == (answer is THOUGHT)
    assert encode_prompt(tokenizer, USER["content"], form) == encoded.prompt


@pytest.mark.parametrize("ends_texts", ["<|im_end|>", "<|endoftext|>"])
def test_an_answer_stops_where_training_ended_it(ends_texts: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = ends_texts
    ends = [tokenizer.convert_tokens_to_ids(name) for name in dict.fromkeys((ends_texts, "<|im_end|>"))]
    assert stop_tokens(tokenizer, PromptForm(chat=True)) == ends
    assert stop_tokens(tokenizer, PromptForm(chat=False)) == ends[:1]


def test_tools_and_options_of_every_row_are_asked_with(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    options = {"tools": [tool], "chat_template_kwargs": {"enable_thinking": False}}
    lines = [json.dumps({"messages": [{**USER, "content": f"{n}"}, THOUGHT], **options}) for n in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    rows, tokenizer = read_rows(tmp_path / "data.jsonl"), make_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    PromptForm.of(rows, tokenizer).save(tmp_path)
    form = PromptForm.load(str(tmp_path))
    assert (
        encode_prompt(tokenizer, "2", form)
        == tokenizer.apply_chat_template(
            [{**USER, "content": "2"}], tools=[tool], enable_thinking=False, add_generation_prompt=True
        )["input_ids"]
    )
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, json.dumps({"messages": [USER, ASSISTANT]})]))
    form = PromptForm.of(read_rows(tmp_path / "data.jsonl"), tokenizer)
    assert (form.tools, form.chat_template_kwargs) == (None, None)


@pytest.mark.parametrize("kind", ["conversational prompt", "plain prompt"])
def test_a_prompt_is_asked_as_it_was_trained_on(kind: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, FORMATS[kind])))
    rows, tokenizer = read_rows(tmp_path / "data.jsonl"), make_tokenizer()
    PromptForm.of(rows, tokenizer).save(tmp_path)
    form = PromptForm.load(str(tmp_path))
    assert form == PromptForm(chat=kind != "plain prompt")
    for row in rows.rows:
        question = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"]
        assert encode_prompt(tokenizer, question, form) == encode(tokenizer, row).prompt


def test_a_system_message_that_every_row_has_is_asked_with(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Add."}
    lines = [json.dumps({"messages": [system, {**USER, "content": f"{n}"}, ASSISTANT]}) for n in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    rows, tokenizer = read_rows(tmp_path / "data.jsonl"), make_tokenizer()
    form = PromptForm.of(rows, tokenizer)
    assert form.system == "Add."
    assert encode_prompt(tokenizer, "2", form) == encode(tokenizer, rows.rows[2]).prompt
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, json.dumps({"messages": [USER, ASSISTANT]})]))
    assert PromptForm.of(read_rows(tmp_path / "data.jsonl"), tokenizer).system is None
