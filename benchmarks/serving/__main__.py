"""Serves side paths over loopback under load: every answer must be that of `generate`, at what speed.

SmolLM2-135M-Instruct gets a side path with random weights and is written to two folders, whole and with the LoRA
weights alone. One server runs the first folder and two run the second; they are measured in turns, the others
suspended, so the ratio of the last two says how much of a difference is chance. With `--adapters`, one server has four
TALAN adapters and four LoRA adapters by request, and the two others have eight LoRA adapters. Beside tokens per second
stands the time that processors spent on each token, which other programs on the machine change less. Then clients are
killed in the middle of answers, beside clients whose answers must stay; the first two servers get many requests while
their memory is watched and, where they have adapters, one of these comes and goes under new names; a prompt that is
longer than all pages; and at last only such an adapter that comes and goes.

    python -m benchmarks.serving --server transformers
    .venv-vllm/bin/python -m benchmarks.serving --server vllm
    .venv-vllm/bin/python -m benchmarks.serving --server vllm --adapters --clients 16
    python -m benchmarks.serving --table

vLLM lives in an environment of its own (`make test-vllm` makes it); the folders must have been written by then.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..pages import show
from ..runs import Row, append_line
from .clients import COUNTED, MEASURED, come_and_go, disturb, measure_load, send_too_long, soak
from .models import TOPICS, Answers, Question, ask_about, check_apart, expected_answers, write_adapters, write_folders
from .servers import SERVERS, Served, Server, all_serving, alone
from .table import PAGE_WITH_TABLE, RESULTS, tables


def take_turns(
    servers: Sequence[Server],
    questions: dict[str, list[Question]],
    clients: int,
    tokens: int,
    expected: Answers,
    turns: int,
) -> Iterator[Row]:
    """Measure the servers in turns, the others suspended; a row for each, with what was measured by turn."""
    rows: dict[str, list[Row]] = {server.name: [] for server in servers}
    for turn in range(turns):
        for place in range(len(servers)):
            # No server is always the first of a turn.
            server = servers[(place + turn) % len(servers)]
            with alone(server, servers):
                found = measure_load(server, questions[server.kind], clients, tokens, expected)
            rows[server.name].append(found)
    for name, found_by_turn in rows.items():
        sums = {field: sum(row[field] for row in found_by_turn) for field in COUNTED}
        by_turn = {field: [round(row[field], 6) for row in found_by_turn] for field in MEASURED}
        middle = statistics.median(by_turn["tokens_per_second"])
        row = {"served": name, "clients": clients, "turns": turns, **sums}
        yield {**row, "tokens_per_second": middle, "by turn": by_turn}


def measure(options: argparse.Namespace, served: dict[str, Served], about: dict[str, Any]) -> None:
    """Run the load, print each part of it and store it."""

    def report(row: Row) -> None:
        row = {**about, "machine": machine(), **row}
        print(json.dumps(row), flush=True)
        append_line(options.out, row)

    tokens, most = options.tokens, max(options.clients)
    if options.only:
        running = served = {options.only: served[options.only]}
    else:
        running = {**served, "lora again": served["lora"]}
    questions = {name: ask_about(one, options.requests) for name, one in served.items()}
    expected: Answers = {}
    for name, one in served.items():
        expected |= expected_answers(one, set(questions[name]) - set(expected), tokens)
    check_apart(expected)
    for start in range(options.starts):
        with all_serving(options.server, running, options.threads) as servers:
            for server in servers:  # The first answer waits for what is made when it is first used.
                with alone(server, servers):
                    measure_load(server, questions[server.kind], len(TOPICS), 2)
            for clients in () if options.only else options.clients:
                for row in take_turns(servers, questions, clients, tokens, expected, options.turns):
                    report(row)
            if start < options.starts - 1:
                continue
            row = disturb(servers[0], questions[servers[0].kind], most, tokens, expected)
            report({"served": servers[0].name, "clients": most, **row})
            for server in servers[:2] if options.soak else ():
                many = questions[server.kind] * (options.soak // options.requests + 1)
                with alone(server, servers):
                    row = soak(server, many[: options.soak], most, 4, expected)
                report({"served": server.name, "clients": most, **row})
            for server in servers[:2]:
                row = send_too_long(server, questions[server.kind], most, tokens, expected)
                report({"served": server.name, "clients": most, **row})
            for server in servers[:2] if options.adapters and options.visits else ():
                with alone(server, servers):
                    row = come_and_go(server, options.visits, 4, expected)
                report({"served": server.name, "clients": 1, **row})


def machine() -> str:
    """What the measurements depend on, the programs beside them included."""
    return f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=SERVERS, default="transformers")
    parser.add_argument(
        "--adapters", action="store_true", help="adapters by request in place of merged folders (vLLM)"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/serving"), help="where the models are written")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=64, help="of each server, in each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", choices=["talan", "lora"], help="one server alone, and no speed")
    parser.add_argument("--starts", type=int, default=1, help="of the servers: two that are equal differ, too")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per request, at most")
    parser.add_argument("--soak", type=int, default=1000, help="requests during which the memory is watched")
    parser.add_argument("--visits", type=int, default=40, help="of an adapter that is loaded and unloaded, at the end")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="put what is stored into the page, and run nothing")
    options = parser.parse_args()
    if options.table:
        show(tables(options.out), PAGE_WITH_TABLE)
        return
    if options.adapters and options.server == "transformers":
        parser.error("--adapters: transformers' server has no adapters by request; give --server vllm")
    server = f"{options.server}, adapters" if options.adapters else options.server
    about = {"server": server, "threads": options.threads, "tokens": options.tokens}
    served = write_adapters(options.folder) if options.adapters else write_folders(options.folder)
    measure(options, served, about)


if __name__ == "__main__":
    main()
