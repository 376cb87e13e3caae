"""Makes the support matrix of the documentation from the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_results(path: Path) -> list[dict[str, Any]]:
    """The last result of each type, in the order of the file; a line that was cut off is none."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["family"], row["type"]] = row
    return list(rows.values())


def page(rows: list[dict[str, Any]]) -> str:
    """The page's text."""
    raise NotImplementedError
