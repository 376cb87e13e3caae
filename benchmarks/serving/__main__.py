"""Serves side paths over loopback under load: every answer must be that of `generate`, at what speed.

SmolLM2-135M-Instruct gets a side path with random weights and is written to two folders, whole and with the LoRA
weights alone. One server runs the first folder and two run the second; they are measured in turns, the others
suspended, so the ratio of the last two says how much of a difference is chance. With `--adapters`, one server has four
TALAN adapters and four LoRA adapters by request, and the two others have eight LoRA adapters. Beside tokens per second
stands the time that processors spent on each token, which other programs on the machine change less. Then clients are
killed in the middle of answers, beside clients whose answers must stay; many requests are sent while the server's
memory is watched, and one more adapter comes and goes; and at last the first two servers get a prompt that is longer
than all pages.

    python -m benchmarks.serving --server transformers
    .venv-vllm/bin/python -m benchmarks.serving --server vllm
    .venv-vllm/bin/python -m benchmarks.serving --server vllm --adapters --clients 16
    python -m benchmarks.serving --table

vLLM lives in an environment of its own (`make test-vllm` makes it); the folders must have been written by then.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

from ..pages import show
from ..runs import Row, append_line
from .clients import COUNTED, disturb, measure_load, send_too_long, soak, visit
from .models import TOPICS, Answers, ask_about, check_apart, expected_answers, write_adapters, write_folders
from .servers import SERVERS, Served, all_serving, alone
from .table import PAGE_WITH_TABLE, RESULTS, ratios, tables


def measure(
    options: argparse.Namespace, served: dict[str, Served], visitor: Served | None, about: dict[str, Any]
) -> None:
    """Run the load, print each part of it and store it."""

    def report(row: Row) -> None:
        row = {**about, **row}
        print(json.dumps(row), flush=True)
        append_line(options.out, row)

    tokens, most = options.tokens, max(options.clients)
    if options.turns:
        running = {**served, "lora again": served["lora"]}
    else:
        running = served = {"talan": served["talan"]}
    questions = {name: ask_about(one, options.requests) for name, one in served.items()}
    expected: Answers = {}
    for name, one in served.items():
        expected |= expected_answers(one, set(questions[name]) - set(expected), tokens)
    check_apart(expected)
    of_visitor = expected_answers(visitor, ask_about(visitor, 2), tokens) if visitor is not None else {}
    with all_serving(options.server, running, options.threads) as servers:
        for server in servers:  # The first answer waits for what is made when it is first used.
            with alone(server, servers):
                measure_load(server, questions[server.kind], len(TOPICS), 2)
        for clients in options.clients if options.turns else ():
            rows: list[Row] = []
            for turn in range(options.turns):
                for place in range(len(servers)):
                    # No server is always the first of a turn.
                    server = servers[(place + turn) % len(servers)]
                    with alone(server, servers):
                        found = measure_load(server, questions[server.kind], clients, tokens, expected)
                    rows.append({"served": server.name, **found})
            for name in (server.name for server in servers):
                sums = {field: sum(row[field] for row in rows if row["served"] == name) for field in COUNTED}
                of_name = [row["tokens_per_second"] for row in rows if row["served"] == name]
                row = {"served": name, "clients": clients, **sums, "tokens_per_second": statistics.median(of_name)}
                if name != "lora":
                    row |= {"speed": ratios(rows, name, "tokens_per_second")}
                    row |= {"processor time": ratios(rows, name, "processor_seconds_per_token")}
                report({"turns": options.turns, **row})
        first = {"served": "talan", "clients": most}
        report({**first, **disturb(servers[0], questions["talan"], most, tokens, expected)})
        if options.soak:
            meanwhile = None
            if visitor is not None:
                (folder,) = visitor.adapters.values()
                meanwhile = functools.partial(visit, servers[0], folder=folder, tokens=4, expected=of_visitor)
            many = (questions["talan"] * (options.soak // options.requests + 1))[: options.soak]
            report({**first, **soak(servers[0], many, most, 4, expected, meanwhile)})
        for server in servers[:2]:
            row = send_too_long(server, questions[server.kind], most, tokens, expected)
            report({"served": server.name, "clients": most, **row})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=SERVERS, default="transformers")
    parser.add_argument(
        "--adapters", action="store_true", help="adapters by request in place of merged folders (vLLM)"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/serving"), help="where the models are written")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=64, help="of each server, in each turn")
    parser.add_argument("--turns", type=int, default=5, help="0: only the first server, and no speed")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per request, at most")
    parser.add_argument("--soak", type=int, default=1000, help="requests during which the memory is watched")
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
    about["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}"
    served, visitor = write_adapters(options.folder) if options.adapters else (write_folders(options.folder), None)
    measure(options, served, visitor, about)


if __name__ == "__main__":
    main()
