"""The command line, as a shell sees it: words in, text and files out, an exit code."""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_talan import TalanConfig, __version__, set_talan_strength
from peft_talan.checkpoint.merged_config import merged_side_paths
from peft_talan.cli import app, main
from peft_talan.cli.console import FAILED, MISUSED
from peft_talan.sft.prompts import PromptForm

from ..checkpoint.loopback_hub import Repository, running_hub
from ..offline_hub import make_tokenizer, write_conversations
from ..small_models import rounding

PROMPT = "What is 2 + 3?"


Answers = Callable[[list[str | Path]], str]
Fails = Callable[..., str]


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = make_tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(tokens).logits


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


def test_every_command_has_help_with_an_example(answers: Answers) -> None:
    listed = answers(["--help"])
    for command in typer.main.get_command(app).commands:
        assert command in listed
        assert f"peft-talan {command}" in answers([command, "--help"]).split("Example", 1)[1]


def test_no_option_is_without_help_and_no_hint_is_swallowed(answers: Answers) -> None:
    for name, command in typer.main.get_command(app).commands.items():
        shown = " ".join(answers([name, "--help"]).split())
        # A line may be broken after a hyphen.
        shown = shown.replace("- ", "-")
        for option in command.params:
            assert option.help, f"{name} {option.name}"
            assert " ".join(option.help.split()).replace("- ", "-") in shown, f"{name} {option.name}"
            assert all(spelling in shown for spelling in option.opts if spelling.startswith("-"))
    training = " ".join(answers(["train", "--help"]).split())
    for hint in ("twice the rank", "Number of memory slots. [default: 8]", "a third of the depth"):
        assert hint in training


def test_an_axis_has_the_help_of_the_configuration(answers: Answers) -> None:
    shown = " ".join(answers(["train", "--help"]).split())
    for name, field in TalanConfig.__dataclass_fields__.items():
        if name.startswith("talan_") and f"--{name.replace('_', '-')}" in shown:
            assert field.metadata["help"] in shown
    assert "--talan-grad-scale" in shown


def test_version(answers: Answers) -> None:
    assert answers(["--version"]).strip() == f"peft-talan {__version__}"


def test_module_is_the_same_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # `python -m` in this process, which has imported already what takes seconds.
    monkeypatch.setattr("sys.argv", ["peft_talan", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("peft_talan", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == f"peft-talan {__version__}"


@pytest.mark.parametrize("arguments", [["nothing"], ["inspect"], ["demo", "--steps", "x"], ["merge", "--nothing"]])
def test_words_that_are_no_command_line(arguments: list[str], fails: Fails) -> None:
    fails(arguments)


def test_traceback_on_demand() -> None:
    with pytest.raises(Exception, match="nowhere"):
        main(["--traceback", "inspect", "/nowhere/at all"])


def test_inspect_counts_what_was_saved(saved: Path, answers: Answers) -> None:
    found = json.loads(answers(["inspect", saved / "adapter", "--json"]))
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
        "import sys; from peft_talan.cli import main; code = main(['inspect', sys.argv[1]]);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", lines, str(tmp_path)], check=True, capture_output=True, text=True)
    assert "no/where" in shown.stdout
    assert "talan_mixer" in shown.stdout
    assert "\x1b" not in shown.stdout


def test_inspect_refuses_what_is_no_talan_adapter(saved: Path, tmp_path: Path, fails: Fails) -> None:
    assert "'LORA'" in fails(["inspect", saved / "lora"])
    assert "adapter_config.json" in fails(["inspect", saved / "model"])
    assert "no such file or folder" in fails(["inspect", tmp_path / "no" / "where"])
    (tmp_path / "adapter_config.json").write_text("{")
    assert "not JSON" in fails(["inspect", tmp_path])
    (tmp_path / "adapter_config.json").write_bytes((saved / "adapter" / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "safetensors" in fails(["inspect", tmp_path])


def test_generate_answers_as_the_model_does(saved: Path, answers: Answers) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "model"), saved / "adapter").eval()
    tokenizer = make_tokenizer()
    expected = []
    for strength in (1.0, 0.0):
        set_talan_strength(model, strength)
        tokens = tokenizer(PROMPT, return_tensors="pt")
        whole = model.generate(**tokens, max_new_tokens=9, do_sample=False)[0, tokens["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(whole, skip_special_tokens=True))
    command = ["generate", saved / "adapter", PROMPT, "--plain", "--max-new-tokens", "9", "--json"]
    shown = answers(command)
    assert json.loads(shown) == {"prompt": PROMPT, "completion": expected[0]}
    assert json.loads(answers([*command, "--strength", "0"]))["completion"] == expected[1]
    assert expected[0] != expected[1]


def test_generate_reads_prompts_from_a_pipe(saved: Path, monkeypatch: pytest.MonkeyPatch, answers: Answers) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\r\n"))
    shown = answers(["generate", saved / "adapter", "--max-new-tokens", "3", "--json"])
    assert [json.loads(line)["prompt"] for line in shown.splitlines()] == ["one", "two"]


def test_generate_refuses_before_it_loads(saved: Path, fails: Fails) -> None:
    adapter = saved / "adapter"
    assert "--strength inf" in fails(["generate", adapter, "a", "--strength", "inf"])
    assert "--dtype int8" in fails(["generate", adapter, "a", "--dtype", "int8"])
    fails(["generate", adapter, "a", "--max-new-tokens", "0"])
    assert "cuda:99" in fails(["generate", adapter, "a", "--device", "cuda:99"])
    assert "no such file" in fails(["generate", adapter, "a", "--model", "/no/such/model"])
    error = fails(["generate", adapter, "a", "--model", saved / "lora"])
    assert "the folder has no config.json; it is an adapter's: give its base model" in error
    assert "has no side path" in fails(["generate", saved / "lora", "a", "--strength", "0.5"])
    assert "--system" in fails(["generate", adapter, "a", "--plain", "--system", "b"])


@pytest.mark.parametrize("adapter", ["/no/where", "./adaptor", "no/such/adapter", "adaptor", "user/adaptor"])
def test_a_name_that_is_nothing_is_told_at_once(adapter: str, fails: Fails) -> None:
    before = os.times()
    assert "no such file or folder" in fails(["generate", adapter, "a"])
    assert os.times().user - before.user < 2.0


def test_the_hub_is_asked_once_and_its_answer_is_told(tmp_path: Path) -> None:
    def refused(name: str, url: str) -> str:
        lines = "import sys; from peft_talan.cli import main; sys.exit(main(sys.argv[1:]))"
        settings = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }
        command = [sys.executable, "-c", lines, "inspect", name]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **settings})
        assert (ended.returncode, ended.stderr.count("\n")) == (MISUSED, 1), ended.stderr
        return ended.stderr

    with running_hub() as hub:
        for name, files in (("user/empty", {}), ("user/lora", {"adapter_config.json": b'{"peft_type": "LORA"}'})):
            hub.repositories[name] = Repository(private=False)
            hub.repositories[name].commit("main", files)
        assert f"no adapter of that name that you may read on {hub.url}" in refused("user/nothing", hub.url)
        assert hub.log == ["GET /api/models/user/nothing"]
        assert "the hub gave no adapter_config.json" in refused("user/empty", hub.url)
        assert "'LORA'" in refused("user/lora", hub.url)
        url = hub.url
    assert "the hub can't be reached" in refused("user/adapter", url)


@pytest.mark.parametrize("adapter", ["adapter", "lora"])
@pytest.mark.parametrize("chat", [True, False])
def test_generate_asks_in_the_form_of_the_training(
    chat: bool, adapter: str, saved: Path, tmp_path: Path, answers: Answers
) -> None:
    folder = tmp_path / "trained"
    shutil.copytree(saved / adapter, folder)
    PromptForm(chat=chat, system="Add." if chat else None).save(folder)
    command = ["generate", folder, PROMPT, "--max-new-tokens", "8"]
    explicit = ["--chat", "--system", "Add."] if chat else ["--plain"]
    assert answers(command) == answers([*command, *explicit])
    assert answers(command) != answers([*command, "--plain" if chat else "--chat"])


def test_generate_stops_where_the_model_s_generation_config_says(
    saved: Path, tmp_path: Path, answers: Answers
) -> None:
    shutil.copytree(saved / "model", tmp_path / "model")
    command = ["generate", saved / "adapter", PROMPT, "--plain", "--model", tmp_path / "model"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "model"), saved / "adapter").eval()
    tokens = make_tokenizer()(PROMPT, return_tensors="pt")
    said = model.generate(**tokens, max_new_tokens=6, do_sample=False)[0, tokens["input_ids"].shape[1] :].tolist()
    stop = said[2]
    config = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [stop]}))
    expected = make_tokenizer().decode(said[: said.index(stop) + 1], skip_special_tokens=True)
    assert answers([*command, "--max-new-tokens", "6"]) == expected + "\n"


@pytest.mark.parametrize("side_path", ["keep", "drop"])
def test_merge_writes_a_model(
    side_path: str,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    answers: Answers,
    fails: Fails,
) -> None:
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
    assert bool(merged_side_paths(json.loads((output / "config.json").read_text()))) == (side_path == "keep")
    assert "not empty" in fails(["merge", saved / "adapter", output])
    if side_path == "keep":
        again = fails(["merge", output, tmp_path / "again"])
        assert "merged already" in again
        text = answers(["generate", output, PROMPT, "--plain", "--max-new-tokens", "5"])
        assert text == answers(["generate", saved / "adapter", PROMPT, "--plain", "--max-new-tokens", "5"])


def earlier_saves(saved: Path, folder: Path) -> None:
    """A model, shards of another, an adapter and a file of the user in one folder."""
    folder.mkdir()
    for part in ("model", "adapter"):
        shutil.copytree(saved / part, folder, dirs_exist_ok=True)
    (folder / "model-00001-of-00002.safetensors").write_bytes((saved / "model" / "model.safetensors").read_bytes())
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "notes.txt").write_text("mine")


@pytest.mark.parametrize("command", ["merge", "merge --side-path drop", "export-lora", "train"])
def test_a_filled_folder_is_written_as_an_empty_one(
    command: str, saved: Path, tmp_path: Path, answers: Answers, fails: Fails
) -> None:
    data = ["--data", tmp_path / "data.jsonl", "--max-steps", "1", "--batch-size", "2", "--rank", "2"]
    write_conversations(tmp_path / "data.jsonl", 2)
    earlier_saves(saved, tmp_path / "filled")
    assert main(["merge", str(saved / "adapter"), str(tmp_path / "filled"), "--overwrite"]) == 0
    for folder, options in (("empty", []), ("filled", ["--overwrite"])):
        name, *words = command.split()
        if name == "train":
            answers([name, "--model", saved / "model", *data, "--output", tmp_path / folder, *options])
        else:
            answers([name, saved / "adapter", tmp_path / folder, *words, *options])
    found = {folder: {file.name for file in (tmp_path / folder).iterdir()} for folder in ("empty", "filled")}
    assert found["filled"] == found["empty"] | {"notes.txt"}
    if command == "merge --side-path drop":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "filled")
        assert torch.equal(logits(plain), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "empty")))
        assert "talan" not in (tmp_path / "filled" / "config.json").read_text()


def test_nothing_is_written_over_what_is_read(saved: Path, tmp_path: Path, fails: Fails) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    write_conversations(tmp_path / "data.jsonl", 2)
    adapter, model = tmp_path / "adapter", tmp_path / "model"
    for words in (
        ["merge", adapter, adapter, "--overwrite"],
        ["merge", adapter, model, "--model", model, "--overwrite"],
        ["export-lora", adapter, adapter, "--overwrite"],
        ["train", "--model", model, "--data", tmp_path / "data.jsonl", "--output", model, "--overwrite"],
    ):
        assert "would replace" in fails(words)
    assert before == {file: file.read_bytes() for file in before}


def test_inspect_alone_takes_a_merged_model_for_an_adapter(
    saved: Path, tmp_path: Path, answers: Answers, fails: Fails
) -> None:
    main(["merge", str(saved / "adapter"), str(tmp_path / "merged")])
    load = f"load it, with its side path, by AutoModelForCausalLM.from_pretrained('{tmp_path / 'merged'}')"
    assert load in fails(["export-lora", tmp_path / "merged", tmp_path / "lora"])
    assert load in fails(["analyze", tmp_path / "merged", "no.jsonl", tmp_path / "out"])
    adapter = json.loads(answers(["inspect", saved / "adapter", "--json"]))
    (side_path,) = json.loads(answers(["inspect", tmp_path / "merged", "--json"]))["side_paths"]
    assert side_path["parameters"] == adapter["side_path"]["parameters"]
    assert [int(block.rpartition(".")[2]) for block in side_path["blocks"]] == adapter["side_path"]["blocks"]
    assert side_path["axes"].items() <= adapter["axes"].items()
    assert "talan_mixer" in answers(["inspect", tmp_path / "merged"])


def test_export_is_the_low_rank_half_and_needs_no_base_model(saved: Path, tmp_path: Path, answers: Answers) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in (saved / "adapter").iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    config = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "no/where"}))
    answers(["export-lora", alone, tmp_path / "lora"])
    assert type(PeftConfig.from_pretrained(tmp_path / "lora")) is LoraConfig
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "model"), tmp_path / "lora")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved / "model"), saved / "adapter")
    set_talan_strength(adapted, 0.0)
    assert torch.equal(logits(plain), logits(adapted))


def test_export_refuses_what_has_no_low_rank_half(saved: Path, tmp_path: Path, fails: Fails) -> None:
    config = TalanConfig(task_type="CAUSAL_LM", r=0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(saved / "model"), config).save_pretrained(tmp_path / "a")
    assert "no LoRA weights" in fails(["export-lora", tmp_path / "a", tmp_path / "b"])
    assert not (tmp_path / "b").exists()


def test_analyze_writes_tables_and_pictures(saved: Path, tmp_path: Path, answers: Answers, fails: Fails) -> None:
    write_conversations(tmp_path / "data.jsonl", 2)
    words = [saved / "adapter", tmp_path / "data.jsonl", tmp_path / "out", "--examples", "2", "--max-tokens", "12"]
    written = json.loads(answers(["analyze", *words, "--json"]))
    assert {Path(file).name for file in written["tables"]} == {"blocks.csv", "propagation.csv", "tokens.csv"}
    assert written["pictures"]
    assert all(Path(file).stat().st_size > 0 for files in written.values() for file in files)
    assert "no such file" in fails(["analyze", saved / "adapter", "no.jsonl", tmp_path])
    assert "this is not a TALAN adapter" in fails(["analyze", saved / "lora", tmp_path / "data.jsonl", tmp_path])


def test_analyze_writes_over_files_only_when_told(saved: Path, tmp_path: Path, answers: Answers, fails: Fails) -> None:
    write_conversations(tmp_path / "data.jsonl", 1)
    output = tmp_path / "out"
    output.mkdir()
    (output / "blocks.csv").write_text("mine")
    words = ["analyze", saved / "adapter", tmp_path / "data.jsonl", output, "--max-tokens", "8"]
    assert "not empty; give another one, or --overwrite" in fails(words)
    assert (output / "blocks.csv").read_text() == "mine"
    answers([*words, "--overwrite"])
    assert (output / "blocks.csv").read_text() != "mine"


def test_doctor_sees_what_is_broken(
    monkeypatch: pytest.MonkeyPatch, answers: Answers, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PEFT_TALAN_AUTOLOAD", "0")
    assert "switched off" in answers(["doctor"])  # what it says of a whole installation: tests/test_packaging.py
    monkeypatch.delitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType("TALAN"))
    assert main(["doctor", "--json"]) == FAILED
    report = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in report["checks"] if check["passed"] is False] == ["registration"]
    assert not report["passed"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--batch-size", "-1"], "--batch-size"),
        (["--model", "/no/such/model"], "no such file"),
        (["--learning-rate", "0"], "--learning-rate 0.0"),
        (["--talan-slots", "0"], "talan_slots=0"),
        (["--talan-layers", "0.5,1.5"], "talan_layers=[0.5, 1.5]"),
        (["--talan-alpha", "-1"], "talan_alpha=-1.0"),
        (["--talan-layers", "x"], "--talan-layers 'x'"),
        (["--talan-layers", "every_1"], "--talan-layers 'every_1'"),
        (["--talan-mixer", "x"], "talan_mixer='x'"),
    ],
)
def test_bad_option_is_named(arguments: list[str], named: str, fails: Fails) -> None:
    assert named in fails(["demo", *arguments])


def test_options_are_checked_before_anything_heavy_is_imported(saved: Path, tmp_path: Path) -> None:
    lines = (
        "import sys; from peft_talan.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code if 'torch' not in sys.modules and 'peft' not in sys.modules else 99)"
    )
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"\n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    (tmp_path / "file").touch()
    words = ["--model", saved / "model", "--data", tmp_path / "good.jsonl", "--output", tmp_path / "out"]
    unusable = ["--output", tmp_path / "file" / "out"]
    commands = [
        ["train", *words, *wrong]
        for wrong in (
            ["--talan-mixer", "x"],
            ["--report-to", "x"],
            ["--learning-rate", "0"],
            ["--resume"],
            ["--data", tmp_path / "data.jsonl"],
            ["--lr-scheduler-type", "x"],
            ["--lr-scheduler-type", "greedy"],
            ["--assistant-only-loss"],
            unusable,
        )
    ]
    commands += [["compare", *words, *wrong] for wrong in (["--data", tmp_path / "data.jsonl"], unusable)]
    commands += [
        ["analyze", saved / "adapter", tmp_path / "data.jsonl", tmp_path / "out"],
        ["analyze", saved / "adapter", tmp_path / "good.jsonl", tmp_path / "file" / "out"],
        ["merge", saved / "adapter", tmp_path / "file" / "out"],
        ["demo", *unusable],
    ]
    for command in commands:
        before = os.times()
        ended = subprocess.run([sys.executable, "-c", lines, *command], check=False, capture_output=True, text=True)
        assert (ended.returncode, ended.stderr.count("\n")) == (MISUSED, 1), (command, ended.stderr)
        after = os.times()
        # Processor time: the wall clock of a machine that tests share says little.
        assert sum(after[2:4]) - sum(before[2:4]) < 2.0, command
