"""Serves a kept side path over loopback under load: every answer must be that of `generate`, at what speed.

SmolLM2-135M-Instruct gets a side path with random weights and is written to two folders, whole and with the LoRA
weights alone. One server runs the first folder and two run the second, all at once; they are measured in turns, the
others suspended, so the ratio of the last two says how much of a difference is chance. Beside tokens per second stands
the time that processors spent on each token, which other programs on the machine change less. Then clients are killed
in the middle of answers, beside clients whose answers must stay; many requests are sent while the server's memory is
watched; and at last the first two servers get a prompt that is longer than all pages.

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
import statistics
from pathlib import Path
from typing import Any

from ..pages import show
from ..runs import Row, append_line
from .clients import COUNTED, TOPICS, disturb, expected_answers, measure_load, send_too_long, soak, write_folders
from .servers import SERVERS, all_serving, alone
from .table import NAME, PAGE_WITH_TABLE, RESULTS, ratios, table


def measure(options: argparse.Namespace, folders: dict[str, str], about: dict[str, Any]) -> None:
    """Run the load, print each part of it and store it."""

    def report(row: Row) -> None:
        row = {**about, **row}
        print(json.dumps(row), flush=True)
        append_line(options.out, row)

    topics = [TOPICS[number % len(TOPICS)] for number in range(options.requests)]
    expected = {name: expected_answers(folder, TOPICS, options.tokens) for name, folder in folders.items()}
    served = {"talan": folders["talan"], "lora": folders["lora"], "lora again": folders["lora"]}
    with all_serving(options.server, served, options.threads) as servers:
        for server in servers:  # The first answer waits for what is made when it is first used.
            with alone(server, servers):
                measure_load(server, topics, len(TOPICS), 2)
        for clients in options.clients:
            rows: list[Row] = []
            for turn in range(options.turns):
                for place in range(len(servers)):
                    # No server is always the first of a turn.
                    server = servers[(place + turn) % len(servers)]
                    right = expected[server.name.split()[0]]
                    with alone(server, servers):
                        found = measure_load(server, topics, clients, options.tokens, right)
                    rows.append({"served": server.name, **found})
            for name in served:
                sums = {field: sum(row[field] for row in rows if row["served"] == name) for field in COUNTED}
                of_name = [row["tokens_per_second"] for row in rows if row["served"] == name]
                row = {"served": name, "clients": clients, **sums, "tokens_per_second": statistics.median(of_name)}
                if name != "lora":
                    row |= {"speed": ratios(rows, name, "tokens_per_second")}
                    row |= {"processor time": ratios(rows, name, "processor_seconds_per_token")}
                report({"turns": options.turns, **row})
        most = max(options.clients)
        row = disturb(servers[0], topics, most, options.tokens, expected["talan"])
        report({"served": "talan", "clients": most, **row})
        if options.soak:
            used = soak(servers[0], TOPICS, options.soak, 4)
            report({"served": "talan", "requests": options.soak, "MiB": used})
        for server in servers[:2]:
            row = send_too_long(server, topics, most, options.tokens, expected[server.name])
            report({"served": server.name, "clients": most, **row})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=SERVERS, default="transformers")
    parser.add_argument("--folder", type=Path, default=Path("build/serving"), help="where the models are written")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=64, help="of each server, in each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per request, at most")
    parser.add_argument("--soak", type=int, default=1000, help="requests during which the memory is watched")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="put what is stored into the page, and run nothing")
    options = parser.parse_args()
    if options.table:
        show({NAME: table(options.out)}, PAGE_WITH_TABLE)
        return
    about = {"server": options.server, "threads": options.threads, "tokens": options.tokens}
    about["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}"
    measure(options, write_folders(options.folder), about)


if __name__ == "__main__":
    main()
