"""Programs that have never heard of this package take its adapters: lm-eval and transformers' own server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from .checkpoint.test_transformers_path import make_tokenizer
from .small_models import VOCABULARY, make_base, make_config, make_model

TASK = """
task: continuation
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: " {{{{target}}}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""

# What `lm_eval run` calls, without its own thousands of tasks and without the interval, which takes seconds.
EVALUATION = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
tasks = TaskManager(include_path=sys.argv[1], include_defaults=False)
found = lm_eval.simple_evaluate(
    "hf", json.loads(sys.argv[2]), ["continuation"], device="cpu", task_manager=tasks, bootstrap_iters=0
)
print(repr(found["results"]["continuation"]["perplexity,none"]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter of it, their tokenizer and a task."""
    folder = tmp_path_factory.mktemp("apps")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "w1"
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    make_base("llama", torch.float32).save_pretrained(folder / "base")
    model = make_model("llama", make_config(), torch.float32)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    # The server asks for a model's config.json: a base model with the adapter embedded in its folder.
    for part in (make_base("llama", torch.float32), model, tokenizer):
        part.save_pretrained(folder / "both")
    tokenizer.save_pretrained(folder / "base")
    lines = [{"text": f"w{i} w{2 * i} w7", "target": f"w{3 * i}"} for i in range(2, VOCABULARY // 3)]
    (folder / "data.json").write_text("\n".join(map(json.dumps, lines)))
    (folder / "task.yaml").write_text(TASK.format(data=folder / "data.json"))
    return folder


@pytest.fixture
def environment(folder: Path) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    return {**os.environ, **offline, "OMP_NUM_THREADS": "1"}


def test_lm_eval_scores_the_adapter(folder: Path, environment: dict[str, str]) -> None:
    adapter = {"pretrained": str(folder / "base"), "peft": str(folder / "adapter"), "dtype": "float32"}
    command = [sys.executable, "-c", EVALUATION, str(folder), json.dumps(adapter)]
    finished = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)

    def here(model: torch.nn.Module) -> float:
        language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        tasks = TaskManager(include_path=str(folder), include_defaults=False)
        found = lm_eval.simple_evaluate(language_model, tasks=["continuation"], task_manager=tasks, bootstrap_iters=0)
        return found["results"]["continuation"]["perplexity,none"]

    without = here(base)
    with_adapter = here(PeftModel.from_pretrained(base, folder / "adapter").eval())
    assert float(finished.stdout.splitlines()[-1]) == with_adapter
    assert with_adapter != without


@pytest.fixture(params=[[], ["--continuous-batching", "--cb-block-size", "8", "--cb-num-blocks", "64"]])
def server(request: pytest.FixtureRequest, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder / "both")]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    process = subprocess.Popen(
        [*command, *options, *request.param], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=30)


def ask(address: str, body: dict) -> dict:
    """Post a chat request as soon as the server answers."""
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(600):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            time.sleep(0.5)
    raise TimeoutError(f"the server at {address} did not start within five minutes")


def test_transformers_server_answers_from_the_adapter(folder: Path, server: str) -> None:
    text = "w5 w7 w11"
    message = {"role": "user", "content": text}
    body = {"model": str(folder / "both"), "messages": [message], "max_tokens": 8, "temperature": 0}
    answer = ask(server, {**body, "stream": False})["choices"][0]["message"]["content"]

    tokenizer = AutoTokenizer.from_pretrained(folder / "both")
    prompt = tokenizer(f"{text} ", return_tensors="pt")

    def generated(model: torch.nn.Module) -> str:
        output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    without = generated(base)
    assert answer == generated(PeftModel.from_pretrained(base, folder / "adapter").eval())
    assert answer != without
