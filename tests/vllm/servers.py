"""vLLM's OpenAI server in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from . import engines

WITH_ADAPTERS = ["--enable-lora", "--max-lora-rank", 8]


@contextmanager
def serving(model: Path, words: list[Any], printed: Path, python: str = sys.executable, **more: str) -> Iterator[int]:
    """A server of a model with a few pages; gives its port once it is ready, and ends it afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    options = ["--model", model, "--port", port, "--dtype", "float32", "--max-model-len", 256, "--enforce-eager"]
    options += ["--block-size", engines.PAGE, "--num-gpu-blocks-override", 64, "--max-num-seqs", 8]
    options += ["--gpu-memory-utilization", 0.15, *words]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *map(str, options)]
    environment = {**os.environ, **engines.ENVIRONMENT, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", **more}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
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


def post(port: int, path: str, body: dict[str, Any] | None, engine: int | None = None) -> tuple[int, str]:
    """Send a request, be it to one of several engines, and get its status and its answer."""
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    words = None if body is None else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    if engine is not None:
        headers["X-data-parallel-rank"] = str(engine)
    connection.request("GET" if body is None else "POST", path, words, headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def complete(port: int, adapter: str, prompts: list[list[int]], engine: int | None = None) -> list[list[int]]:
    body = {"model": adapter, "prompt": prompts, "temperature": 0, "max_tokens": engines.NEW_TOKENS}
    body |= {"return_token_ids": True, "ignore_eos": True, "stop_token_ids": [2]}
    status, text = post(port, "/v1/completions", body, engine)
    assert status == 200, text
    choices = sorted(json.loads(text)["choices"], key=lambda choice: choice["index"])
    return [choice["token_ids"] for choice in choices]
