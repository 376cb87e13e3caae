"""The whole demo on a tiny model: table, adapters, plot, and the answer of a fresh process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from peft_talan.cli import FAILED, main

from ..small_models import CONFIGS

STEPS = 3


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A tiny Llama and a tokenizer of digits and signs."""
    vocabulary = {symbol: index for index, symbol in enumerate(["<pad>", "<s>", "</s>", *"0123456789+=? "])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    sums = [{"prompt": f"{a}+{b}=?", "completion": str(a + b)} for a in range(4) for b in range(4)]
    chats = [
        {"messages": [{"role": "user", "content": f"{a}+1=?"}, {"role": "assistant", "content": str(a + 1)}]}
        for a in range(4)
    ]
    file.write_text("\n".join(json.dumps(row) for row in sums + chats))
    return file


def test_the_demo_end_to_end(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    arguments = ["demo", "--model", str(model_folder), "--data", str(data_file), "--output", str(output)]
    arguments += ["--steps", str(STEPS), "--rank", "2", "--batch-size", "2", "--ask", "1+2=?"]
    arguments += ["--talan-layers", "1,-1", "--talan-mixer", "linear", "--talan-slots", "3"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for word in ("exact match", "LoRA+TALAN", "trainable", "reloaded in a fresh process: '1+2=?' ->"):
        assert word in printed
    results = json.loads((output / "results.json").read_text())["results"]
    assert set(results) == {"base", "LoRA", "LoRA+TALAN"}
    # The same first batch through a fresh adapter: the side path adds nothing yet.
    assert results["LoRA"]["losses"][0] == results["LoRA+TALAN"]["losses"][0]
    assert [len(results[arm]["losses"]) for arm in ("LoRA", "LoRA+TALAN")] == [STEPS, STEPS]
    assert results["LoRA+TALAN"]["trainable"] > results["LoRA"]["trainable"]
    assert (output / "losses.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((output / "LoRA+TALAN" / "adapter_config.json").read_text())
    assert (saved["talan_mixer"], saved["talan_layers"], saved["talan_slots"]) == ("linear", [1, -1], 3)


def test_a_model_that_can_not_be_loaded_fails_with_one_line(
    data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--model", str(tmp_path / "nowhere"), "--data", str(data_file)]
    assert main([*arguments, "--output", str(tmp_path / "output")]) == FAILED
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nowhere" in error
