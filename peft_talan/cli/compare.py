"""`peft-talan compare`: LoRA, LoRA of a matched size and TALAN on the user's own data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from . import models
from . import train_options as options
from .axes import with_axes
from .console import JSON_HELP, Misuse, need, note, print_json
from .merge import check_output


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: The command line.
    """
    app.command(
        "compare",
        epilog="Example: peft-talan compare --model Qwen/Qwen3-0.6B --data data.jsonl --output comparison --seeds 3",
    )(with_axes(compare))


def compare(
    model: options.Model,
    data: options.Data,
    output: Annotated[Path, Option("--output", "--output-dir", help="Folder for adapters, table and picture")],
    seeds: Annotated[int, Option(min=1, help="How many seeds each arm is trained with")] = 3,
    steps: options.Steps = None,
    epochs: options.Epochs = 1.0,
    batch_size: options.BatchSize = 8,
    accumulate: options.Accumulation = 1,
    learning_rate: options.LearningRate = 2e-4,
    max_length: options.MaxLength = 1024,
    rank: Annotated[int, Option("--rank", "--lora-r", min=1, help="Rank of LoRA and of TALAN's low-rank half")] = 16,
    bf16: options.Bf16 = None,
    processes: Annotated[int, Option(min=1, help="How many are trained at a time")] = 1,
    retention_text: Annotated[
        Path | None, Option(help="Plain text for retention", show_default="a page of English prose")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Write into a folder with files")] = False,
    as_json: Annotated[bool, Option("--json", help=JSON_HELP)] = False,
    dtype: models.Dtype = "auto",
    device: models.Device = None,
    dataset_config: options.DatasetConfig = None,
    split: options.Split = "train",
    gradient_checkpointing: options.Checkpointing = None,
    eval_data: options.EvalData = None,
    eval_split: options.EvalSplit = None,
    eval_rows: Annotated[
        int | None,
        Option(
            min=1,
            help="Rows of --data to hold out",
            show_default="a fifth, at most 200",
        ),
    ] = None,
    *,
    axes: dict[str, Any],
) -> None:
    """Train LoRA, LoRA with as many parameters as TALAN, and TALAN on your data; compare them on held-out rows.

    It reports the loss, the exact match and the loss on plain text, with 95% intervals over the seeds, as a table, a
    picture and JSON. Exact match: the share of answers that greedy decoding gives to the token.
    """
    options.check_training(model, data, learning_rate, epochs, eval_data)
    if dtype not in models.DTYPES:
        raise Misuse(f"--dtype {dtype}: choose one of {', '.join(models.DTYPES)}")
    if retention_text is not None and not retention_text.is_file():
        raise Misuse(f"--retention-text {retention_text}: no such file")
    check_output(output, overwrite)
    if device is not None:
        models.check_device(device)
    need("train", "datasets", "trl")
    need("analysis", "matplotlib")
    given = eval_data is not None or eval_split is not None
    rows, held_out = options.load_rows(data, dataset_config, split, eval_data, eval_split, eval_rows or 0, 0)
    if not given and held_out is None:
        rows, held_out = rows.split(min(200, max(1, len(rows) // 5)), 0)

    from ..sft.comparison import ARMS, Job
    from ..sft.models import load_tokenizer
    from ..sft.reporting import (
        compare_with_bars,
        comparison_table,
        difference_lines,
        draw_comparison,
        make_console,
    )
    from ..sft.scores import default_text
    from ..sft.training import describe_lengths

    tokenizer = load_tokenizer(model)
    for line in (line for part in (rows, held_out) for line in describe_lengths(tokenizer, part, max_length)):
        note(line)
    planned = steps or math.ceil(epochs * math.ceil(len(rows) / (batch_size * accumulate)))
    job = Job(
        model=model,
        rows=rows,
        held_out=held_out,
        text=default_text() if retention_text is None else retention_text.read_text(encoding="utf-8"),
        output=str(output),
        rank=rank,
        axes=axes,
        dtype=dtype,
        device=device,
        threads=1 if processes > 1 else None,
        arguments={
            "max_steps": planned,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulate,
            "learning_rate": learning_rate,
            "warmup_steps": 0.03,
            "max_length": max_length,
            "bf16": bf16,
            "gradient_checkpointing": gradient_checkpointing,
        },
    )
    bars = make_console(stderr=True)
    outcomes = compare_with_bars(job, ARMS, list(range(seeds)), processes=processes, steps=planned, console=bars)
    differences = difference_lines(outcomes)
    result = {
        "model": model,
        "data": data,
        "train_rows": len(rows),
        "held_out_rows": len(held_out),
        "steps": planned,
        "seeds": seeds,
        "differences": differences,
        "outcomes": [outcome.as_dict() for outcome in outcomes],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "comparison.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    draw_comparison(outcomes, output / "comparison.png")
    if as_json:
        print_json(result)
        return
    make_console().print(comparison_table(outcomes), *differences, sep="\n")
    print(output)
    if seeds < 3:
        note(f"{seeds} seed{'s' if seeds > 1 else ''} can't tell small differences from noise; --seeds 5 says more")
