"""The main job at small size: fine-tune a real model with LoRA and with LoRA+TALAN, compare, save, reload, ask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option


@dataclass(frozen=True)
class DemoOptions:
    """One run of the demo; the help of `peft-talan demo` says what each option is."""

    model: Annotated[
        str | None, Option(help="Hub id or folder of a causal LM", show_default="SmolLM2-135M-Instruct from PyPI")
    ] = None
    task: Annotated[str, Option(help="reasoning-gym task")] = "chain_sum"
    recall_steps: Annotated[
        int, Option(min=0, help="Optimizer steps of each adapter of the recall beyond the window; 0: leave it out")
    ] = 80
    steps: Annotated[int, Option(min=1, help="Optimizer steps of each adapter of the task")] = 20
    batch_size: Annotated[int, Option(min=1, help="Examples of a step")] = 8
    learning_rate: Annotated[float, Option(help="Highest learning rate")] = 1e-3
    rank: Annotated[int, Option(min=1, help="LoRA's rank")] = 16
    held_out: Annotated[int, Option(min=2, help="Number of held-out items")] = 100
    seed: Annotated[int, Option(help="Of data, initialization and order")] = 0
    ask: Annotated[
        str | None,
        Option(help="Question for the reloaded adapter", show_default="a held-out one that it answered right"),
    ] = None
    output: Annotated[Path, Option(help="Folder for adapters, table and picture")] = Path("outputs/demo")
