"""Clients of a server: they ask, compare answers with those of `generate`, and are killed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

from .models import Answers, Question
from .servers import PAGE, PAGES, Server

COUNTED = ("requests", "lost", "wrong")
MEASURED = ("tokens_per_second", "processor_seconds_per_token")
"""The second is of the server's processes, and other programs on the machine change it less."""


def post(server: Server, path: str, body: dict[str, Any], kill_after: int | None = None) -> tuple[int, Any]:
    """Send one request; its status, and the answer as it was sent.

    With `kill_after`, the connection is broken off after so many bytes.
    """
    connection = HTTPConnection("127.0.0.1", server.port, timeout=900)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if kill_after is not None:
        response.read(kill_after)
        connection.close()
        return response.status, None
    sent = response.read().decode(errors="replace")
    is_json = response.status == 200 and response.headers.get_content_type() == "application/json"
    return response.status, json.loads(sent) if is_json else sent


def ask(server: Server, question: Question, tokens: int, kill_after: int | None = None) -> tuple[int, Any]:
    """Ask one question; the answer is streamed to a client that is killed."""
    body = {"model": question.model, "messages": question.messages, "temperature": 0, "max_tokens": tokens}
    return post(server, "/v1/chat/completions", {**body, "stream": kill_after is not None}, kill_after)


def measure_load(
    server: Server,
    questions: Sequence[Question],
    clients: int,
    tokens: int,
    expected: Answers | None = None,
    cut: bool = False,
) -> dict[str, Any]:
    """Let some clients ask the questions side by side, and compare the answers if they are known, be it cut off."""
    start, spent = time.perf_counter(), server.processor_seconds()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda question: ask(server, question, tokens), questions))
    seconds, spent = time.perf_counter() - start, server.processor_seconds() - spent
    whole = [answer for status, answer in answers if status == 200]
    new_tokens = sum(answer["usage"]["completion_tokens"] for answer in whole)
    counted = {"requests": len(questions), "lost": len(questions) - len(whole)}
    if new_tokens:
        counted |= dict(zip(MEASURED, (new_tokens / seconds, spent / new_tokens), strict=True))
    if expected is not None:
        texts = [answer["choices"][0]["message"]["content"] if status == 200 else None for status, answer in answers]
        right = [
            bool(text) and (expected[question].startswith(text) if cut else text == expected[question])
            for text, question in zip(texts, questions, strict=True)
        ]
        counted["wrong"] = right.count(False)
    return counted


def disturb(
    server: Server, questions: Sequence[Question], clients: int, tokens: int, expected: Answers
) -> dict[str, Any]:
    """The same beside clients that are killed."""
    with ThreadPoolExecutor(2) as pool:
        killed = [pool.submit(ask, server, question, tokens, 200) for question in questions[:16]]
        counted = measure_load(server, questions, clients, tokens, expected)
        statuses = [future.result()[0] for future in killed]
    return {**counted, "killed": len(statuses)}


def send_too_long(
    server: Server, questions: Sequence[Question], clients: int, tokens: int, expected: Answers
) -> dict[str, Any]:
    """The same beside a prompt that is too long, and once more after it."""
    messages = [{"role": "user", "content": "word " * (PAGE * PAGES + 1)}]
    body = {"model": questions[0].model, "messages": messages, "temperature": 0, "max_tokens": tokens}
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(post, server, "/v1/chat/completions", body)
        counted = measure_load(server, questions, clients, tokens, expected)
        status, answer = refused.result()
    after = measure_load(server, questions, clients, tokens, expected)
    facts = {"status": status, "answer": str(answer)[:120], **{f"{name} after": after[name] for name in COUNTED}}
    return {**counted, "too_long": facts}


def visit(server: Server, guest: str, tokens: int, expected: Answers) -> int:
    """Load an adapter of the server under a new name, ask it, and unload it; how many of the answers are wrong."""
    name, folder = next(iter(server.served.adapters.items()))
    statuses = [post(server, "/v1/load_lora_adapter", {"lora_name": guest, "lora_path": folder})[0]]
    renamed = {Question(guest, topic): text for (model, topic), text in expected.items() if model == name}
    counted = measure_load(server, [*renamed], 1, tokens, renamed, cut=True)
    statuses.append(post(server, "/v1/unload_lora_adapter", {"lora_name": guest})[0])
    if statuses != [200, 200]:
        raise RuntimeError(f"{server.name}: loading and unloading {name} as {guest} gave {statuses}")
    wrong: int = counted["wrong"]
    return wrong


def soak(
    server: Server, questions: Sequence[Question], clients: int, tokens: int, expected: Answers
) -> dict[str, Any]:
    """The memory of a server in MiB, before and after each tenth of many questions, and how many answers are wrong.

    Where it has adapters, one of them visits beside each tenth, under a name of its own.
    """
    piece, wrong, has_guests = max(len(questions) // 10, 1), [0, 0], bool(server.served.adapters)
    used = [round(server.memory())]
    for done in range(0, len(questions), piece):
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(visit, server, f"visitor-{done}", tokens, expected) if has_guests else None
            counted = measure_load(server, questions[done : done + piece], clients, tokens, expected, cut=True)
            wrong = [wrong[0] + counted["wrong"], wrong[1] + (other.result() if other else 0)]
        used.append(round(server.memory()))
    found = {"requests": len(questions), "wrong": wrong[0], "MiB": used}
    return found | ({"visits": len(used) - 1, "wrong in visits": wrong[1]} if has_guests else {})


def come_and_go(server: Server, visits: int, tokens: int, expected: Answers) -> dict[str, Any]:
    """The memory of a server in MiB, before and after each visit of one of its adapters."""
    used, wrong = [round(server.memory())], 0
    for number in range(visits):
        wrong += visit(server, f"guest-{number}", tokens, expected)
        used.append(round(server.memory()))
    return {"visits alone": visits, "wrong in visits": wrong, "MiB": used}
