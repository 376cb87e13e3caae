"""The script `examples/serve_with_vllm.py`: vLLM gives the answer of `generate`."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from peft_talan import set_talan_strength

from ..offline_hub import make_tokenizer
from . import engines

pytest.importorskip("vllm", reason="vLLM is installed in an environment of its own: make test-vllm")

SCRIPT = Path(__file__).parents[2] / "examples" / "serve_with_vllm.py"
PROMPT = "What is 2 + 3?"


def test_it_prints_the_answer_of_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer()
    config = copy.deepcopy(engines.CONFIGS["qwen3"])
    config.vocab_size = len(tokenizer)
    adapted = engines.make_model(config)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    adapted.unload().save_pretrained(tmp_path / "base")

    folder = tmp_path / "merged"
    words = ["--adapter", str(tmp_path / "adapter"), "--folder", str(folder), "--max-new-tokens", "8"]
    runpy.run_path(str(SCRIPT))["main"]([*words, "--prompts", PROMPT])
    printed = capsys.readouterr().out
    engines.clean_up()

    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answers = []
    for strength in (1.0, 0.0):
        set_talan_strength(model, strength)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert answers[0] != answers[1]
    assert f"{PROMPT} -> {answers[0]}\n" in printed
