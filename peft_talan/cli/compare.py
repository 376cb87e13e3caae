"""`peft-talan compare`: LoRA, LoRA of a matched size and TALAN on the user's own data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

from typer import Option

from ..axes import SidePathAxes
from .console import AsJson, Misuse, Overwrite, check_output, need, note, print_json
from .models import Device, Dtype, check_place
from .options import Sources, TrainingOptions, with_groups


@with_groups
def compare(
    sources: Sources,
    output: Annotated[Path, Option("--output", "--output-dir", help="Folder for adapters, table and picture")],
    training: TrainingOptions,
    seeds: Annotated[int, Option(min=1, help="How many seeds each arm is trained with")] = 3,
    rank: Annotated[int, Option("--rank", "--lora-r", min=1, help="LoRA's rank, alone and with the side path")] = 16,
    processes: Annotated[int, Option(min=1, help="How many are trained at a time")] = 1,
    retention_text: Annotated[
        Path | None, Option(help="Plain text for retention", show_default="a page of English prose")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    dtype: Dtype = "auto",
    device: Device = None,
    eval_rows: Annotated[
        int | None, Option(min=1, help="Rows of --data to hold out", show_default="a fifth, at most 200")
    ] = None,
    *,
    axes: SidePathAxes,
) -> None:
    """Train LoRA, LoRA with as many parameters as TALAN, and TALAN on your data; compare them on held-out rows.

    It reports the loss, the exact match and the loss on plain text, with 95% intervals over the seeds, as a table, a
    picture and JSON. Exact match: the share of answers that greedy decoding generates exactly.
    """
    training.check()
    sources.check(eval_rows or 0)
    if retention_text is not None and not retention_text.is_file():
        raise Misuse(f"--retention-text {retention_text}: no such file")
    check_output(output, overwrite)
    need("train", "datasets", "trl")
    need("analysis", "matplotlib", "scipy")
    rows, held_out = sources.read(eval_rows or 0, 0)
    if held_out is None:
        rows, held_out = rows.split(min(200, max(1, len(rows) // 5)), 0)
    check_place(dtype, device)

    from ..sft import reporting
    from ..sft.comparison import ARMS, Job
    from ..sft.display import make_console
    from ..sft.models import load_tokenizer
    from ..sft.prompts import encode_rows
    from ..sft.row_notes import describe_lengths
    from ..sft.scores import default_text

    tokenizer = load_tokenizer(sources.model)
    for part, name in ((rows, "rows"), (held_out, "held-out rows")):
        for line in describe_lengths(tokenizer, part, encode_rows(tokenizer, part), training.max_length, name):
            note(line)
    examples_per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    steps = training.max_steps or math.ceil(training.num_train_epochs * math.ceil(len(rows) / examples_per_step))
    job = Job(
        model=sources.model,
        rows=rows,
        held_out=held_out,
        text=default_text() if retention_text is None else retention_text.read_text(encoding="utf-8"),
        output=str(output),
        rank=rank,
        axes=vars(axes),
        dtype=dtype,
        device=device,
        threads=1 if processes > 1 else None,
        arguments={**vars(training), "max_steps": steps, "warmup_steps": 0.03},
    )
    outcomes = reporting.compare_with_bars(
        job, ARMS, list(range(seeds)), processes=processes, steps=steps, console=make_console(stderr=True)
    )
    differences = reporting.difference_lines(outcomes)
    result = {
        "model": sources.model,
        "data": sources.data,
        "train_rows": len(rows),
        "held_out_rows": len(held_out),
        "steps": steps,
        "seeds": seeds,
        "differences": differences,
        "outcomes": [outcome.as_dict() for outcome in outcomes],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "comparison.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    reporting.draw_comparison(outcomes, output / "comparison.png")
    if as_json:
        print_json(result)
        return
    make_console().print(reporting.comparison_table(outcomes), *differences, sep="\n")
    print(output)
    if seeds < 3:
        note(f"{seeds} seed{'s' if seeds > 1 else ''} can't tell small differences from noise; --seeds 5 says more")
