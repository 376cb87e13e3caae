"""Clients of a server: they ask, compare answers with those of `generate`, and are killed."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from .servers import PAGE, PAGES, Server

TOPICS = (
    "the sea", "a bridge", "bread", "the moon", "a clock", "ants", "the violin", "rain",
    "glass", "a lighthouse", "salt", "the desert", "a ladder", "owls", "paper", "iron",
)  # fmt: skip
COUNTED = ("requests", "lost", "wrong")


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


def ask(server: Server, messages: list[dict[str, str]], tokens: int, kill_after: int | None = None) -> tuple[int, Any]:
    """Send one request; its status, and the answer as it was sent.

    With `kill_after`, the answer is streamed and the connection broken off after so many bytes.
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


def measure_load(
    server: Server, topics: Sequence[str], clients: int, tokens: int, expected: dict[str, str] | None = None
) -> dict[str, Any]:
    """Let some clients send a request for each topic side by side, and compare the answers if they are known."""
    start, spent = time.perf_counter(), server.processor_seconds()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda topic: ask(server, message(topic), tokens), topics))
    seconds, spent = time.perf_counter() - start, server.processor_seconds() - spent
    whole = [answer for status, answer in answers if status == 200]
    new_tokens = sum(answer["usage"]["completion_tokens"] for answer in whole)
    counted = {"requests": len(topics), "lost": len(topics) - len(whole)}
    if new_tokens:
        counted |= {"tokens_per_second": new_tokens / seconds, "processor_seconds_per_token": spent / new_tokens}
    if expected is not None:
        texts = [answer["choices"][0]["message"]["content"] if status == 200 else None for status, answer in answers]
        counted["wrong"] = sum(text != expected[topic] for text, topic in zip(texts, topics, strict=True))
    return counted


def disturb(
    server: Server, topics: Sequence[str], clients: int, tokens: int, expected: dict[str, str]
) -> dict[str, Any]:
    """The same beside clients that are killed."""
    with ThreadPoolExecutor(2) as pool:
        killed = [pool.submit(ask, server, message(topic), tokens, 200) for topic in topics[: len(TOPICS)]]
        counted = measure_load(server, topics, clients, tokens, expected)
        statuses = [future.result()[0] for future in killed]
    return {**counted, "killed": len(statuses)}


def send_too_long(
    server: Server, topics: Sequence[str], clients: int, tokens: int, expected: dict[str, str]
) -> dict[str, Any]:
    """The same beside a prompt that is too long, and once more after it."""
    too_long = [{"role": "user", "content": "word " * (PAGE * PAGES + 1)}]
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(ask, server, too_long, tokens)
        counted = measure_load(server, topics, clients, tokens, expected)
        status, answer = refused.result()
    after = measure_load(server, topics, clients, tokens, expected)
    facts = {"status": status, "answer": str(answer)[:120], **{f"{name} after": after[name] for name in COUNTED}}
    return {**counted, "too_long": facts}


def soak(server: Server, topics: Sequence[str], requests: int, tokens: int) -> list[int]:
    """The memory of a server in MiB, before and after each tenth of many requests."""
    clients, piece = len(TOPICS), max(requests // 10, 1)
    used = [round(server.memory())]
    for done in range(0, requests, piece):
        asked = [topics[number % len(topics)] for number in range(done, done + piece)]
        if measure_load(server, asked, clients, tokens)["lost"]:
            raise RuntimeError(f"{server.folder}: requests were lost after {done} of {requests}")
        used.append(round(server.memory()))
    return used
