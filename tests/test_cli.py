"""Bad options and bad data get one clear line, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_talan.cli import MISUSED, main

GOOD = json.dumps({"prompt": "1 + 1?", "completion": "2"})

BAD_FILES: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 1, "0 examples"),
    "blank lines only": (b"\n \n\n", 1, "0 examples"),
    "one example": (GOOD.encode(), 1, "1 examples"),
    "not JSON": (f"{GOOD}\nhello\n".encode(), 2, "not JSON"),
    "an array": (f"{GOOD}\n\n[1, 2]\n".encode(), 3, "JSON object"),
    "missing key": (f'{GOOD}\n{{"prompt": "a"}}\n'.encode(), 2, "'completion' missing"),
    "both keys missing": (b'{"question": "a"}\n', 1, "'prompt' and 'completion' missing"),
    "wrong type": (f'{GOOD}\n{{"prompt": 3, "completion": "b"}}\n'.encode(), 2, "'prompt' must be a text"),
    "empty answer": (f'{GOOD}\n{{"prompt": "a", "completion": " "}}\n'.encode(), 2, "'completion' must be a text"),
    "Latin-1": (f"{GOOD}\n".encode() + '{"prompt": "é", "completion": "b"}'.encode("latin-1"), 2, "not UTF-8"),
    "messages no list": (b'{"messages": "hi"}\n', 1, "'messages' must be a list"),
    "message no object": (b'{"messages": ["a", "b"]}\n', 1, "each of 'messages'"),
    "message without role": (b'{"messages": [{"content": "a"}, {"content": "b"}]}\n', 1, "each of 'messages'"),
    "user speaks last": (
        b'{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}\n',
        1,
        "last of 'messages'",
    ),
}


def fails_with_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == MISUSED
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_data_is_named_by_file_and_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, line, message = BAD_FILES[kind]
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    error = fails_with_one_line(["demo", "--data", str(file)], capsys)
    assert f"{file}:{line}: " in error
    assert message in error


def test_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "nowhere.jsonl"
    assert str(file) in fails_with_one_line(["demo", "--data", str(file)], capsys)
    assert str(tmp_path) in fails_with_one_line(["demo", "--data", str(tmp_path)], capsys)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--batch-size", "-1"], "--batch-size -1"),
        (["--learning-rate", "0"], "--learning-rate 0.0"),
        (["--talan-slots", "0"], "talan_slots=0"),
        (["--talan-layers", "0.5,1.5"], "talan_layers=[0.5, 1.5]"),
        (["--talan-alpha", "-1"], "talan_alpha=-1.0"),
    ],
)
def test_bad_option_is_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in fails_with_one_line(["demo", *arguments], capsys)


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["demo", "--talan-layers", "x"], ["demo", "--talan-mixer", "x"]]
)
def test_words_that_are_no_command_line(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == MISUSED
