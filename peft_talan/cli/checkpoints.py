"""The last checkpoint of a run, and what a run that goes on from it must share with the one that wrote it."""

from __future__ import annotations

import json
from pathlib import Path

from .console import Misuse
from .models import BASE_MODEL

STATE = "trainer_state.json"
"""What Trainer writes last into a checkpoint."""


def last_checkpoint(output: Path) -> Path | None:
    """Return the last checkpoint in a run's folder that was written to its end, if there is one.

    Not with `transformers.trainer_utils.get_last_checkpoint`, which takes seconds to import, and unfinished ones.
    """
    steps = [
        (int(number), folder)
        for folder in output.glob("checkpoint-*")
        if (number := folder.name.rpartition("-")[2]).isdecimal() and (folder / STATE).is_file()
    ]
    return max(steps)[1] if steps else None


def check_resumed(output: Path, last: Path | None, window: int | None) -> None:
    """Refuse to go on without a checkpoint, without the window that a run began with, or with one that it had not."""
    if last is None:
        raise Misuse(f"--resume: {output} has no checkpoint; leave --resume out to begin")
    # `ShrinkingWindow` logs the window beside each loss, and `train` logs the first one.
    log = json.loads((last / STATE).read_text(encoding="utf-8"))["log_history"]
    began_with_one = any("window" in entry for entry in log)
    if began_with_one and window is None:
        raise Misuse(f"--resume: the run in {output} was started with --window; give the same --window")
    if window is not None and not began_with_one:
        raise Misuse(
            f"--window {window}: the run in {output} was started without; leave --window out, or start again with "
            "--overwrite"
        )
    if window is not None and not (output / BASE_MODEL).is_dir():
        raise Misuse(
            f"--resume: {output / BASE_MODEL}, the model with the window, is there no more; put it back, or start "
            "again with --overwrite"
        )
