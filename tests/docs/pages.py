"""Runs the Python and shell blocks of Markdown pages: top to bottom, one namespace a page, one process for all pages.

`python -m tests.docs.pages REPORT FOLDER PAGE...`; FOLDER is where each page gets its working folder. The report says,
for each page, how many blocks ran and what went wrong. `<!-- skip: next "reason" -->` leaves a block out. Which shell
commands run and which are only checked is decided in `shell.py`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from ..offline_hub import write_conversations, write_far_answers
from .shell import run_block


def run_shell(example: Example) -> None:
    """Run a shell block."""
    run_block(example.parsed)


def run_page(page: Path) -> dict[str, object]:
    """Run one page in the current folder."""
    shell = [CodeBlockParser(language, run_shell) for language in ("sh", "bash")]
    document = Sybil(parsers=[PythonCodeBlockParser(), *shell, SkipParser()], path=str(page.parent)).parse(page)
    ran = 0
    for example in document.examples():
        try:
            example.evaluate()
        except Exception:  # noqa: BLE001 - whatever a page does wrong is for the report
            return {"ran": ran, "error": f"{page}:{example.line}\n{traceback.format_exc()}"}
        ran += 1
    return {"ran": ran, "error": None}


def main() -> None:
    """Run the pages and write the report."""
    report, folder, *pages = map(Path, sys.argv[1:])
    results = {}
    for number, page in enumerate(pages):
        working = folder / f"{number}_{page.stem}"
        working.mkdir(parents=True)
        os.chdir(working)
        if page.stem == "recall":
            write_far_answers(Path("data.jsonl"))
            write_far_answers(Path("held-out.jsonl"), 4)
        else:
            write_conversations(Path("data.jsonl"))
        print(f"## {page}", flush=True)
        results[str(page)] = run_page(page)
        # After every page: a run that is cut off still tells.
        report.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
