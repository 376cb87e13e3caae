"""The options that training and comparing share: TRL's own names first, a short one beside some."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from .console import Misuse, need, note
from .sources import check_source

DATA_HELP = (
    "JSONL, JSON, csv or parquet file, or a data set's hub id; rows of 'messages', of 'prompt' and 'completion', "
    "or of 'text'"
)

Model = Annotated[str, Option("--model", "--model-name-or-path", help="Base model, hub id or folder")]
Data = Annotated[str, Option("--data", "--dataset-name", help=DATA_HELP)]
DatasetConfig = Annotated[str | None, Option(help="Configuration of a hub data set", show_default="its only one")]
Split = Annotated[str, Option("--dataset-train-split", "--split", help="Split of a hub data set to train on")]
EvalData = Annotated[
    str | None,
    Option("--eval-data", help="File or hub id to evaluate on", show_default="none"),
]
EvalSplit = Annotated[
    str | None,
    Option(
        "--dataset-test-split",
        "--eval-split",
        help="Split of the hub data set to evaluate on",
        show_default="none",
    ),
]
Steps = Annotated[
    int | None,
    Option("--max-steps", "--steps", min=1, help="Optimizer steps", show_default="those of --epochs"),
]
Epochs = Annotated[float, Option("--num-train-epochs", "--epochs", help="Times over the data")]
BatchSize = Annotated[
    int, Option("--per-device-train-batch-size", "--batch-size", min=1, help="Examples of a batch, on each device")
]
Accumulation = Annotated[
    int, Option("--gradient-accumulation-steps", "--accumulate", min=1, help="Batches of an optimizer step")
]
LearningRate = Annotated[float, Option(help="Highest learning rate")]
MaxLength = Annotated[int, Option(min=1, help="Where longer examples are cut, in tokens")]
Rank = Annotated[int, Option("--rank", "--lora-r", min=0, help="Rank of the low-rank half; 0: the side path alone")]
Bf16 = Annotated[bool | None, Option(help="Train in bfloat16", show_default="on a GPU that has it")]
Checkpointing = Annotated[
    bool | None,
    Option(help="Recompute activations to save memory", show_default="on a GPU"),
]


def check_training(model: str, data: str, learning_rate: float, epochs: float, eval_data: str | None) -> None:
    """Check what can be checked before anything heavy is imported.

    Args:
        model: The base model.
        data: The data.
        learning_rate: The highest learning rate.
        epochs: Times over the data.
        eval_data: What to evaluate on, if anything.

    Raises:
        Misuse: One can't be used.
    """
    for option, value in (("--learning-rate", learning_rate), ("--num-train-epochs", epochs)):
        if not 0 < value < float("inf"):
            raise Misuse(f"{option} {value}: give a positive number")
    check_source("--data", data, "dataset")
    check_source("--model", model, "model")
    if eval_data is not None:
        check_source("--eval-data", eval_data, "dataset")


def load_rows(
    data: str,
    config: str | None,
    split: str,
    eval_data: str | None,
    eval_split: str | None,
    eval_rows: int,
    seed: int,
) -> tuple[Any, Any]:
    """Read what to train and what to evaluate on, and tell what is seldom meant.

    Args:
        data: The data.
        config: The configuration of a hub data set.
        split: The split to train on.
        eval_data: The data to evaluate on.
        eval_split: The split to evaluate on.
        eval_rows: Rows to hold out of the data if there is neither; 0: none.
        seed: Of what is held out.

    Returns:
        Both; the latter None if there is nothing to evaluate on.

    Raises:
        Misuse: More than one thing to evaluate on was given, or a package is missing.
    """
    if sum((eval_data is not None, eval_split is not None, eval_rows > 0)) > 1:
        raise Misuse("--eval-data, --eval-split and --eval-rows: give one of them")
    own = (".jsonl", ".json", ".csv", ".tsv")
    if any(Path(name).suffix.lower() not in own for name in (data, eval_data or data)):
        need("train", "datasets")
    # The reader alone: faults of a file are reported before a trainer is imported.
    from ..sft.data import read_rows

    rows, held_out = read_rows(data, config=config, split=split), None
    if eval_data is not None:
        held_out = read_rows(eval_data)
    elif eval_split is not None:
        held_out = read_rows(data, config=config, split=eval_split)
    elif eval_rows:
        rows, held_out = rows.split(eval_rows, seed)
    for line in (*rows.notes, *(held_out.notes if held_out else ())):
        note(line)
    return rows, held_out
