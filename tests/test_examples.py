"""The scripts in `examples/`, run as their users run them, at small size."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from .offline_hub import save_tiny_model

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, depth=4)
    return folder


def test_sft_with_trl_and_what_vllm_is_given(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl", reason="TRL needs Python 3.11")
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    options = ["--model", str(tiny_model), "--steps", "2", "--held-out", "2", "--output", str(adapter)]
    sft = load("sft_with_trl")
    sft["main"](options)
    printed = capsys.readouterr().out
    assert re.search(r"^exact answers before training: \d of 2$", printed, re.MULTILINE)
    (reloaded,) = re.findall(r"^reloaded: (.+) -> (.*)$", printed, re.MULTILINE)

    load("serve_with_vllm")["merge"](str(adapter), str(merged))
    request = [{"role": "user", "content": reloaded[0]}]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    assert any("merged_side_paths" in name for name in model.state_dict())
    assert repr(sft["answer"](model, tokenizer, request)) == reloaded[1]


def test_long_context(capsys: pytest.CaptureFixture[str]) -> None:
    load("long_context")["main"](["--steps", "2"])
    rows = re.findall(r"^(LoRA.*), right: .*\nbytes of the cache: +(.+)$", capsys.readouterr().out, re.MULTILINE)
    sizes = {name: {int(size) for size in cells.split()} for name, cells in rows}
    # Whatever the text's length; the side paths' memories are in it.
    ((lora,), (talan,)) = sizes["LoRA"], sizes["LoRA + TALAN"]
    assert talan > lora
