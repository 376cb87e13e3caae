"""Dataclasses as options of commands: the axes of the side path, and what training and comparing share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_args, get_type_hints

from typer import Option

from ..axes import SidePathAxes, check_axes, is_layers_name
from ..sft.data import Rows, read_rows
from .console import Misuse, note
from .sources import check_source

DATA_HELP = (
    "JSONL, JSON, csv or parquet file, or a data set's hub id; rows of 'messages', of 'prompt' and 'completion', "
    "or of 'text'"
)


@dataclass
class Sources:
    """The base model and the data of `train` and `compare`."""

    model: Annotated[str, Option("--model", "--model-name-or-path", help="Base model, hub id or folder")]
    data: Annotated[str, Option("--data", "--dataset-name", help=DATA_HELP)]
    dataset_config: Annotated[
        str | None, Option(help="Configuration of a hub data set", show_default="its only one")
    ] = None
    split: Annotated[str, Option("--dataset-train-split", "--split", help="Training split of hub data")] = "train"
    eval_data: Annotated[
        str | None, Option("--eval-data", help="File or hub id to evaluate on", show_default="none")
    ] = None
    eval_split: Annotated[
        str | None,
        Option(
            "--dataset-test-split",
            "--eval-split",
            help="Split of the hub data set to evaluate on",
            show_default="none",
        ),
    ] = None

    def check(self, eval_rows: int) -> None:
        """Refuse names that are nothing that can be loaded, and more than one thing to evaluate on."""
        if sum((self.eval_data is not None, self.eval_split is not None, eval_rows > 0)) > 1:
            raise Misuse("--eval-data, --eval-split and --eval-rows: give one of them")
        check_source("--data", self.data, "dataset")
        check_source("--model", self.model, "model")
        if self.eval_data is not None:
            check_source("--eval-data", self.eval_data, "dataset")

    def read(self, eval_rows: int, seed: int) -> tuple[Rows, Rows | None]:
        """Read the rows to train on and those to evaluate on, and note what is seldom meant.

        `eval_rows` of the data are held out if there is nothing else to evaluate on; 0: none.
        """
        rows, held_out = read_rows(self.data, config=self.dataset_config, split=self.split), None
        if self.eval_data is not None:
            held_out = read_rows(self.eval_data)
        elif self.eval_split is not None:
            held_out = read_rows(self.data, config=self.dataset_config, split=self.eval_split)
        elif eval_rows:
            rows, held_out = rows.split(eval_rows, seed)
        for line in (*rows.notes, *(held_out.notes if held_out else ())):
            note(line)
        return rows, held_out


@dataclass
class TrainingOptions:
    """Arguments of `make_trainer` that `train` and `compare` share: TRL's names, short ones beside some."""

    max_steps: Annotated[
        int | None,
        Option("--max-steps", "--steps", min=1, help="Optimizer steps", show_default="those of --epochs"),
    ] = None
    num_train_epochs: Annotated[float, Option("--num-train-epochs", "--epochs", help="Times over the data")] = 1.0
    per_device_train_batch_size: Annotated[
        int,
        Option("--per-device-train-batch-size", "--batch-size", min=1, help="Examples of a batch, on each device"),
    ] = 8
    gradient_accumulation_steps: Annotated[
        int, Option("--gradient-accumulation-steps", "--accumulate", min=1, help="Batches of an optimizer step")
    ] = 1
    learning_rate: Annotated[float, Option(help="Highest learning rate")] = 2e-4
    side_path_lr_scale: Annotated[
        float, Option(help="The side path's learning rate divided by that of the LoRA weights")
    ] = 5.0
    prompt_loss_weight: Annotated[
        float,
        Option(help="Of the mean loss of the prompts' tokens, beside the completions'; 0: none"),
    ] = 0.0
    max_length: Annotated[int, Option(min=1, help="Where longer examples are cut, in tokens")] = 1024
    bf16: Annotated[bool | None, Option(help="Train in bfloat16", show_default="on a GPU that has it")] = None
    gradient_checkpointing: Annotated[
        bool | None, Option(help="Recompute activations to save memory", show_default="on a GPU")
    ] = None

    def check(self) -> None:
        """Refuse numbers that can't be used."""
        for option, value in (("--learning-rate", self.learning_rate), ("--num-train-epochs", self.num_train_epochs)):
            if not 0 < value < float("inf"):
                raise Misuse(f"{option} {value}: give a positive number")
        if not 0 <= self.side_path_lr_scale < float("inf"):
            raise Misuse(f"--side-path-lr-scale {self.side_path_lr_scale}: give a number of at least 0, such as 5")
        if not 0 <= self.prompt_loss_weight < float("inf"):
            raise Misuse(f"--prompt-loss-weight {self.prompt_loss_weight}: give a number of at least 0, such as 0.2")


def parse_layers(text: str) -> str | list[int] | list[float]:
    """Read a name such as `all`, indices such as `10,-1` or fractions of the depth such as `0.33,0.66`."""
    if is_layers_name(text):
        return text
    parts = [part.strip() for part in text.split(",")]
    try:
        return [float(part) for part in parts] if any("." in part for part in parts) else [int(part) for part in parts]
    except ValueError:
        raise Misuse(
            f"--talan-layers {text!r}: give 'all', 'every_4', 'recall', block indices like 10,-1 or fractions of the "
            "depth like 0.33,0.66"
        ) from None


def _annotation(field: Field[Any], kind: Any) -> Any:
    """The type of a field with its option; that of an axis is made of its help and its choices."""
    if "help" not in field.metadata:
        return kind
    option: dict[str, Any] = {"help": field.metadata["help"]}
    if field.name == "talan_layers":
        shown = "a third of the depth; such as 10,-1 or 0.33,0.66"
        option |= {"parser": parse_layers, "metavar": "LIST", "show_default": shown}
    elif choices := get_args(kind):
        kind, option["metavar"] = str, "|".join(choices)
    return Annotated[kind, Option(**option)]


def _parameters(group: Any) -> list[inspect.Parameter]:
    kinds = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=_annotation(field, kinds[field.name]),
        )
        for field in fields(group)
        if field.name != "talan_memory_scope"  # Models that generate have one memory scope alone.
    ]


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Turn each parameter of a command that is a dataclass into an option for each of its fields, and check `axes`."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: p.annotation for name, p in signature.parameters.items() if is_dataclass(p.annotation)
    }
    members = {name: _parameters(group) for name, group in groups.items()}
    parameters = [
        shown
        for name, own in signature.parameters.items()
        for shown in members.get(name, [own.replace(kind=inspect.Parameter.KEYWORD_ONLY)])
    ]

    @wraps(command)
    def with_options(**options: Any) -> None:
        for name, group in groups.items():
            options[name] = group(**{member.name: options.pop(member.name) for member in members[name]})
        try:
            check_axes(options.get("axes", SidePathAxes()))
        except ValueError as error:
            raise Misuse(str(error)) from None
        command(**options)

    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del with_options.__wrapped__
    return with_options
