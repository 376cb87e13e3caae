"""The OpenAI server with adapters by request, which are loaded and unloaded while it runs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from ..offline_hub import make_tokenizer
from . import engines
from .adapters import PLAIN, Family

pytest.importorskip("vllm", reason="vLLM is installed in an environment of its own: make test-vllm")


@pytest.fixture(scope="module")
def port(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    make_tokenizer().save_pretrained(family.base)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    words = ["--model", family.base, "--port", port, "--dtype", "float32", "--max-model-len", 256, "--enforce-eager"]
    words += ["--block-size", engines.PAGE, "--num-gpu-blocks-override", 64, "--max-num-seqs", 8]
    words += ["--gpu-memory-utilization", 0.15, "--enable-lora", "--max-loras", 3, "--max-lora-rank", 8]
    words += ["--lora-modules", *(f"{name}={family.folder / name}" for name in ("first", PLAIN))]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)]
    printed = tmp_path_factory.mktemp("server") / "printed"
    environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with printed.open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            end = time.monotonic() + 900
            while True:
                assert process.poll() is None and time.monotonic() < end, printed.read_text()[-8000:]
                with suppress(OSError):
                    if post(port, "/health", None)[0] == 200:
                        break
                time.sleep(1)
            yield port
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def post(port: int, path: str, body: dict[str, Any] | None) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    words = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, words, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read().decode()


def complete(port: int, adapter: str, prompts: list[list[int]]) -> list[list[int]]:
    body = {"model": adapter, "prompt": prompts, "temperature": 0, "max_tokens": engines.NEW_TOKENS}
    body |= {"return_token_ids": True, "ignore_eos": True, "stop_token_ids": [2]}
    status, text = post(port, "/v1/completions", body)
    assert status == 200, text
    choices = sorted(json.loads(text)["choices"], key=lambda choice: choice["index"])
    return [choice["token_ids"] for choice in choices]


def test_adapters_are_loaded_and_unloaded(family: Family, port: int, tmp_path: Path) -> None:
    """Those of the command line; one more, under a new name for each version, as TRL does it; and one in place."""
    prompts = family.prompts
    for name in ("first", PLAIN):
        assert complete(port, name, prompts) == family.answers[name]
    # It has the kind of the first one, at one of its blocks.
    load = {"lora_name": "policy-v1", "lora_path": str(family.folder / "second")}
    assert post(port, "/v1/load_lora_adapter", load)[0] == 200
    assert complete(port, "policy-v1", prompts) == family.answers["second"]
    folder = tmp_path / "policy"
    adapted = engines.adapt(engines.make_base(engines.CONFIGS["qwen3"]), "default", 7)
    adapted.save_pretrained(folder)
    load = {"lora_name": "policy-v2", "lora_path": str(folder)}
    assert post(port, "/v1/load_lora_adapter", load)[0] == 200
    assert post(port, "/v1/unload_lora_adapter", {"lora_name": "policy-v1"})[0] == 200
    before = engines.generate(family.base, prompts, adapter=folder)
    assert complete(port, "policy-v2", prompts) == before
    # The same name and folder with other tensors: in place, and after it was unloaded.
    for seed, in_place in ((8, True), (9, False)):
        engines.adapt(engines.make_base(engines.CONFIGS["qwen3"]), "default", seed).save_pretrained(folder)
        if not in_place:
            assert post(port, "/v1/unload_lora_adapter", {"lora_name": "policy-v2"})[0] == 200
        assert post(port, "/v1/load_lora_adapter", {**load, "load_inplace": in_place})[0] == 200
        after = engines.generate(family.base, prompts, adapter=folder)
        assert after != before
        for _ in range(2):
            assert complete(port, "policy-v2", prompts) == after
        before = after
    engines.adapt(engines.make_base(engines.CONFIGS["qwen3"]), "default", talan_layers=[0]).save_pretrained(folder)
    status, text = post(port, "/v1/load_lora_adapter", {"lora_name": "elsewhere", "lora_path": str(folder)})
    assert status == 500
    assert "has no room; name the adapter" in text
    assert complete(port, "first", prompts) == family.answers["first"]
