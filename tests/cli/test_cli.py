"""The command line, as a shell sees it: words in, text and files out, an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft_talan_cli import main
from peft_talan_cli.console import FAILED, MISUSED
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_talan import TalanConfig, __version__, set_talan_strength

from ..offline_hub import make_tokenizer, save_tiny_model, write_conversations
from ..small_models import rounding

GOOD = json.dumps({"prompt": "1 + 1?", "completion": "2"})
PROMPT = "What is 2 + 3?"

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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `adapter` and `lora` (a plain one), all with random weights."""
    folder = tmp_path_factory.mktemp("saved")
    save_tiny_model(folder / "model", depth=4)
    shared = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    talan = TalanConfig(**shared, talan_layers=[1, -1], talan_slots=3, talan_dim=5, init_talan_weights=False)
    for name, config in (("adapter", talan), ("lora", LoraConfig(**shared))):
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), config).save_pretrained(folder / name)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = make_tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(tokens).logits


def answers(arguments: list[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def fails_with_one_line(arguments: list[str | Path], capsys: pytest.CaptureFixture[str], code: int = MISUSED) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("peft-talan")
    return printed.err


def test_help_answers_within_a_second() -> None:
    program = Path(sys.executable).with_name("peft-talan")
    seconds = []
    for words in (["--help"], ["train", "--help"], ["--help"]):
        before = os.times()
        shown = subprocess.run([program, *words], check=True, capture_output=True, text=True).stdout
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
        assert "Usage" in shown
        assert "\x1b" not in shown  # no colours in a pipe
    # Processor time: the wall clock of a machine that tests share says little.
    assert min(seconds) < 1.0


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    listed = answers(["--help"], capsys)
    for command in ("inspect", "train", "generate", "analyze", "export-lora", "merge", "doctor", "demo"):
        assert command in listed
        assert f"peft-talan {command}" in answers([command, "--help"], capsys).split("Example", 1)[1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert answers(["--version"], capsys).strip() == f"peft-talan {__version__}"


def test_module_is_the_same_program() -> None:
    ran = subprocess.run([sys.executable, "-m", "peft_talan", "--version"], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == f"peft-talan {__version__}"


@pytest.mark.parametrize("arguments", [["nothing"], ["inspect"], ["demo", "--steps", "x"], ["merge", "--nothing"]])
def test_words_that_are_no_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    fails_with_one_line(arguments, capsys)


def test_traceback_on_demand() -> None:
    with pytest.raises(Exception, match="nowhere"):
        main(["--traceback", "inspect", "/nowhere/at all"])


def test_inspect_counts_what_was_saved(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(answers(["inspect", saved / "adapter", "--json"], capsys))
    tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
    side_path = {key: tensor for key, tensor in tensors.items() if "lora_talan" in key}
    low_rank = {key: tensor for key, tensor in tensors.items() if key not in side_path}
    for half, expected in (("side_path", side_path), ("low_rank", low_rank)):
        assert found[half]["parameters"] == sum(tensor.numel() for tensor in expected.values())
        assert found[half]["bytes"] == sum(tensor.nbytes for tensor in expected.values())
        assert found[half]["tensors"] == len(expected)
    assert found["side_path"]["blocks"] == [1, 3]
    assert found["low_rank"]["modules"] == len({key.split(".lora_")[0] for key in low_rank})
    assert found["axes"]["talan_slots"] == 3
    assert set(found["axes"]) == {name for name in TalanConfig.__dataclass_fields__ if name.startswith("talan_")} - {
        "talan_version"
    }
    assert found["base_model"]["name"] == str(saved / "model")
    assert found["other"]["tensors"] == 0


def test_inspect_reads_no_base_model_and_is_quick(saved: Path, tmp_path: Path) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((saved / "adapter" / file).read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "no/where"}))
    lines = (
        "import sys; from peft_talan_cli import main; code = main(['inspect', sys.argv[1]]);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", lines, str(tmp_path)], check=True, capture_output=True, text=True)
    assert "no/where" in shown.stdout
    assert "talan_mixer" in shown.stdout
    assert "\x1b" not in shown.stdout


def test_inspect_refuses_what_is_no_talan_adapter(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "'LORA'" in fails_with_one_line(["inspect", saved / "lora"], capsys)
    assert "adapter_config.json" in fails_with_one_line(["inspect", saved / "model"], capsys)
    assert "no hub id" in fails_with_one_line(["inspect", tmp_path / "no" / "where"], capsys)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "not JSON" in fails_with_one_line(["inspect", tmp_path], capsys)
    (tmp_path / "adapter_config.json").write_bytes((saved / "adapter" / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "safetensors" in fails_with_one_line(["inspect", tmp_path], capsys)


def test_generate_answers_as_the_model_does(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "model"), saved / "adapter").eval()
    tokenizer = make_tokenizer()
    expected = []
    for strength in (1.0, 0.0):
        set_talan_strength(model, strength)
        tokens = tokenizer(PROMPT, return_tensors="pt")
        whole = model.generate(**tokens, max_new_tokens=9, do_sample=False)[0, tokens["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(whole, skip_special_tokens=True))
    command = ["generate", saved / "adapter", PROMPT, "--plain", "--max-new-tokens", "9", "--json"]
    shown = answers(command, capsys)
    assert json.loads(shown) == {"prompt": PROMPT, "completion": expected[0]}
    assert json.loads(answers([*command, "--strength", "0"], capsys))["completion"] == expected[1]
    assert expected[0] != expected[1]


def test_generate_reads_prompts_from_a_pipe_and_uses_the_chat_template(saved: Path) -> None:
    command = [sys.executable, "-m", "peft_talan", "generate", saved / "adapter", "--max-new-tokens", "3", "--json"]
    ran = subprocess.run(command, input="one\n\ntwo\n", check=True, capture_output=True, text=True)
    assert [json.loads(line)["prompt"] for line in ran.stdout.splitlines()] == ["one", "two"]


def test_generate_refuses_before_it_loads(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = saved / "adapter"
    assert "--strength inf" in fails_with_one_line(["generate", adapter, "a", "--strength", "inf"], capsys)
    assert "--dtype int8" in fails_with_one_line(["generate", adapter, "a", "--dtype", "int8"], capsys)
    fails_with_one_line(["generate", adapter, "a", "--max-new-tokens", "0"], capsys)


@pytest.mark.parametrize("side_path", ["keep", "drop"])
def test_merge_writes_a_model(side_path: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "merged"
    assert main(["merge", str(saved / "adapter"), str(output), "--side-path", side_path]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(output)
    *_, last = printed.err.strip().splitlines()
    assert f"vllm serve {output}" in last
    assert ("peft-talan" in last) == (side_path == "keep")
    merged = AutoModelForCausalLM.from_pretrained(output)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "model"), saved / "adapter")
    if side_path == "drop":
        set_talan_strength(adapted, 0.0)
    torch.testing.assert_close(logits(merged), logits(adapted), **rounding(torch.float32))
    assert (output / "adapter_config.json").exists() == (side_path == "keep")
    assert "not empty" in fails_with_one_line(["merge", saved / "adapter", output], capsys)
    if side_path == "keep":
        again = fails_with_one_line(["merge", output, tmp_path / "again"], capsys)
        assert "merged already" in again
        text = answers(["generate", output, PROMPT, "--plain", "--max-new-tokens", "5"], capsys)
        assert text == answers(["generate", saved / "adapter", PROMPT, "--plain", "--max-new-tokens", "5"], capsys)


def test_export_is_the_low_rank_half_and_needs_no_base_model(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in (saved / "adapter").iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    config = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "no/where"}))
    answers(["export-lora", alone, tmp_path / "lora"], capsys)
    assert type(PeftConfig.from_pretrained(tmp_path / "lora")) is LoraConfig
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "model"), tmp_path / "lora")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "model"), saved / "adapter")
    set_talan_strength(adapted, 0.0)
    assert torch.equal(logits(plain), logits(adapted))


def test_export_refuses_what_has_no_low_rank_half(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TalanConfig(task_type="CAUSAL_LM", r=0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(saved / "model"), config).save_pretrained(tmp_path / "a")
    assert "no low-rank half" in fails_with_one_line(["export-lora", tmp_path / "a", tmp_path / "b"], capsys)
    assert not (tmp_path / "b").exists()


def test_train_learns_and_saves(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_conversations(tmp_path / "data.jsonl")
    output = tmp_path / "adapter"
    words = ["--data", tmp_path / "data.jsonl", "--output", output, "--steps", "2", "--batch-size", "2", "--rank", "2"]
    axes = ["--talan-layers", "0.5", "--talan-slots", "3", "--talan-mixer", "linear"]
    shown = answers(["train", "--model", saved / "model", *words, "--json", *axes], capsys)
    assert json.loads(shown)["steps"] == 2
    assert 0 < json.loads(shown)["loss"] < 20
    config = PeftConfig.from_pretrained(output)
    assert isinstance(config, TalanConfig)
    assert (config.r, config.talan_layers, config.talan_slots, config.talan_mixer) == (2, [0.5], 3, "linear")
    writes = [tensor for key, tensor in load_file(output / "adapter_model.safetensors").items() if "_write" in key]
    assert writes
    assert all(tensor.any() for tensor in writes)


@pytest.mark.parametrize(
    ("axes", "named"), [(["--talan-layers", "x"], "--talan-layers"), (["--talan-mixer", "x"], "talan_mixer='x'")]
)
def test_train_names_bad_axes(
    axes: list[str], named: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", saved / "model", "--data", tmp_path / "no", "--output", tmp_path / "out"]
    assert named in fails_with_one_line(["train", *words, *axes], capsys)


def test_analyze_writes_tables_and_pictures(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_conversations(tmp_path / "data.jsonl", 2)
    words = [saved / "adapter", tmp_path / "data.jsonl", tmp_path / "out", "--examples", "2", "--max-tokens", "12"]
    written = json.loads(answers(["analyze", *words, "--json"], capsys))
    assert {Path(file).name for file in written["tables"]} == {"blocks.csv", "propagation.csv", "tokens.csv"}
    assert written["pictures"]
    assert all(Path(file).stat().st_size > 0 for files in written.values() for file in files)
    assert "no such file" in fails_with_one_line(["analyze", saved / "adapter", "no.jsonl", tmp_path], capsys)


def test_doctor_finds_nothing_wrong() -> None:
    program = Path(sys.executable).with_name("peft-talan")
    report = json.loads(subprocess.run([program, "doctor", "--json"], check=True, capture_output=True).stdout)
    assert report["passed"]
    assert report["versions"]["peft-talan"] == __version__
    assert {check["name"]: check["passed"] for check in report["checks"]} == dict.fromkeys(
        ["versions are supported", "autoload", "registration", "fresh == LoRA", "cached == uncached"], True
    )


def test_doctor_sees_what_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PEFT_TALAN_AUTOLOAD", "0")
    assert "switched off" in answers(["doctor"], capsys)
    monkeypatch.delitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType("TALAN"))
    assert main(["doctor", "--json"]) == FAILED
    report = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in report["checks"] if check["passed"] is False] == ["registration"]
    assert not report["passed"]


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
        (["--talan-layers", "x"], "--talan-layers 'x'"),
        (["--talan-mixer", "x"], "talan_mixer='x'"),
    ],
)
def test_bad_option_is_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in fails_with_one_line(["demo", *arguments], capsys)
