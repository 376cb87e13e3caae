"""`peft-talan train`: supervised fine-tuning with TRL's SFTTrainer, its most used arguments under their own names."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
from typer import Option

from ..axes import RECALL_AXES, SidePathAxes
from ..sft.data import Rows
from .checkpoints import check_resumed, last_checkpoint
from .console import (
    INTERRUPTED,
    AsJson,
    Misuse,
    as_json_text,
    check_output,
    is_given,
    need,
    note,
    print_json,
    stdout_kept_clean,
)
from .models import BASE_MODEL
from .options import Sources, TrainingOptions, with_groups

RIGHT_ANSWERS = "right_answers.json"
"""What `count_right` found of the held-out rows, in the output's folder."""

TRACKERS = ("none", "tensorboard", "wandb", "trackio")
EVALUATING_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    *EVALUATING_SCHEDULES,
)
"""Those of `transformers.SchedulerType` that need no more options; to import it takes seconds."""


@dataclass
class LoraOptions:
    """Fields of `TalanConfig`, by their names there."""

    r: Annotated[int, Option("--rank", "--lora-r", min=0, help="LoRA's rank; 0: the side path alone")] = 16
    lora_alpha: Annotated[int | None, Option(help="LoRA's alpha", show_default="twice the rank")] = None
    target_modules: Annotated[
        str, Option("--target-modules", "--lora-target-modules", help="LoRA's modules, with commas")
    ] = "all-linear"
    use_dora: Annotated[bool, Option("--use-dora", "--dora", help="Train DoRA beside the side path")] = False
    use_rslora: Annotated[bool, Option("--use-rslora", "--rslora", help="rsLoRA's scaling")] = False

    def fields(self) -> dict[str, Any]:
        """The fields, with what depends on others."""
        names = [name.strip() for name in self.target_modules.split(",")] if self.r else []
        modules = "all-linear" if names == ["all-linear"] else names
        return {**vars(self), "lora_alpha": self.lora_alpha or 2 * self.r, "target_modules": modules}


@dataclass
class RunOptions:
    """Arguments of `trl.SFTConfig` that `train` has alone, by their names there."""

    seed: Annotated[int, Option(help="Of initialization and order")] = 0
    packing: Annotated[bool, Option(help="Pack several examples into a row")] = False
    assistant_only_loss: Annotated[
        bool, Option("--assistant-only-loss", help="Train on the assistant's tokens of 'messages' alone")
    ] = False
    lr_scheduler_type: Annotated[str, Option(help="Schedule of the learning rate, such as cosine")] = "linear"
    warmup_steps: Annotated[float, Option(min=0, help="Steps of warm-up; below 1: their share of all steps")] = 0.03
    save_steps: Annotated[int, Option(min=1, help="Steps between checkpoints")] = 500
    save_total_limit: Annotated[int, Option(min=1, help="How many checkpoints are kept")] = 2
    logging_steps: Annotated[int, Option(min=1, help="Steps between logged losses")] = 10

    def check(self, evaluates: bool) -> None:
        """Refuse a schedule that is unknown, or that needs an evaluation where there is none."""
        if self.lr_scheduler_type not in SCHEDULES:
            raise Misuse(f"--lr-scheduler-type {self.lr_scheduler_type}: choose one of {', '.join(SCHEDULES)}")
        if self.lr_scheduler_type in EVALUATING_SCHEDULES and not evaluates:
            remedy = "give --eval-data or --eval-rows, on which it depends"
            raise Misuse(f"--lr-scheduler-type {self.lr_scheduler_type}: {remedy}")


RECALL_TRAINING: Mapping[str, float] = MappingProxyType(
    {"learning_rate": 3e-4, "side_path_lr_scale": 1.0, "prompt_loss_weight": 0.2}
)
"""Options of the training with `--window`, beside the axes."""

_RECALL_TEXT = ", ".join(
    f"--{name.replace('_', '-')} is {value}" for name, value in {**RECALL_TRAINING, **RECALL_AXES}.items()
)


@dataclass
class RecallOptions:
    """Training for recall from beyond a window."""

    window: Annotated[
        int | None,
        Option(
            min=2,
            help="Keys that a token sees in each block: gives the model a sliding window, and learns to recall what "
            f"lies further back. Unless they are given, {_RECALL_TEXT}",
            show_default="the model's own",
        ),
    ] = None

    def fill_in(self, context: typer.Context, training: TrainingOptions, axes: SidePathAxes) -> None:
        """Set what has other defaults with a window, unless it is given."""
        if self.window is None:
            return
        for options, name, value in (
            *((training, name, value) for name, value in RECALL_TRAINING.items()),
            *((axes, name, value) for name, value in RECALL_AXES.items()),
        ):
            if not is_given(context, name):
                setattr(options, name, value)


@with_groups
def train(
    sources: Sources,
    output: Annotated[Path, Option("--output", "--output-dir", help="Folder for the adapter and its checkpoints")],
    training: TrainingOptions,
    lora: LoraOptions,
    run: RunOptions,
    recall: RecallOptions,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Write into a folder with files; its old checkpoints are removed")
    ] = False,
    as_json: AsJson = False,
    eval_rows: Annotated[int, Option(min=0, help="Rows of --data to hold out")] = 0,
    eval_steps: Annotated[
        int | None, Option(min=1, help="Steps between evaluations", show_default="once at the end")
    ] = None,
    resume: Annotated[
        bool, Option("--resume-from-checkpoint", "--resume", help="Go on from the last checkpoint of --output")
    ] = False,
    report_to: Annotated[str, Option(metavar="|".join(TRACKERS), help="Tracker; several with commas")] = "none",
    run_name: Annotated[str | None, Option(help="Name of the run in the tracker", show_default="--output")] = None,
    *,
    context: typer.Context,
    axes: SidePathAxes,
) -> None:
    """Fine-tune a TALAN adapter on your data with TRL's SFTTrainer, and save it.

    Messages go through the chat template, texts never do; generate prompts the adapter in the same form.
    Ctrl-C saves a checkpoint, and the same command with --resume goes on from it.
    For several GPUs and 4-bit bases use the recipe of the docs' page on training.
    """
    recall.fill_in(context, training, axes)
    trackers = [name.strip() for name in report_to.split(",")]
    check_trackers(trackers)
    evaluates = bool(sources.eval_data or sources.eval_split or eval_rows)
    if eval_steps is not None and not evaluates:
        raise Misuse(f"--eval-steps {eval_steps}: there is nothing to evaluate on; give --eval-data or --eval-rows")
    training.check()
    run.check(evaluates)
    sources.check(eval_rows)
    last = last_checkpoint(output)
    if resume:
        check_resumed(output, last, recall.window)
    elif last is not None and not overwrite:
        raise Misuse(f"{output} has {last.name}; --resume goes on from it, --overwrite starts over")
    check_output(output, overwrite or resume, sources.model)
    if recall.window is not None and not resume:
        check_output(output / BASE_MODEL, True, sources.model)
    need("train", "datasets", "trl")
    with stdout_kept_clean():
        rows, held_out = sources.read(eval_rows, run.seed)
        if run.assistant_only_loss and rows.form != "messages":
            raise Misuse(f"--assistant-only-loss: for rows of 'messages', not of {rows.form!r}; leave it out")
        result = _train(
            sources.model,
            rows,
            held_out,
            output,
            last if resume else None,
            recall.window,
            adapter={**lora.fields(), **vars(axes)},
            **vars(training),
            **vars(run),
            logging_first_step=True,
            report_to=trackers,
            run_name=run_name or str(output),
            eval_strategy="steps" if held_out is not None else "no",
            # Larger than any run: the last step is evaluated in any case.
            eval_steps=eval_steps or 10**9,
        )
    if as_json:
        print_json(result)
    elif not result["finished"]:
        note(f"stopped at step {result['steps']}; the same command with --resume goes on from {result['checkpoint']}")
    else:
        if "eval_loss" in result:
            note(f"mean loss of all steps {result['loss']:.4f}, on held-out rows {result['eval_loss']:.4f}")
        if "right_answers" in result:
            from ..sft.display import make_console
            from ..sft.far_answers import right_answers_tables

            others = f"all in {output / RIGHT_ANSWERS}"
            make_console(stderr=True).print(right_answers_tables(result["right_answers"], others))
        print(output)
    if not result["finished"]:
        raise typer.Exit(INTERRUPTED)


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that are unknown or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise Misuse(f"--report-to {name}: choose of {', '.join(TRACKERS)}")
        if name != "none" and find_spec(name) is None:
            raise Misuse(f"--report-to {name}: the package is missing; pip install {name}")


def _train(
    model: str,
    rows: Rows,
    held_out: Rows | None,
    output: Path,
    checkpoint: Path | None,
    window: int | None,
    adapter: dict[str, Any],
    **arguments: Any,
) -> dict[str, Any]:
    from ..checkpoint.saved_files import replaced_at_success
    from ..config import TalanConfig
    from ..sft import training
    from ..sft.callbacks import StopOnInterrupt, TrainingProgress
    from ..sft.far_answers import count_right, describe_reading
    from ..sft.models import load_tokenizer
    from ..sft.prompts import PromptForm, encode_rows
    from ..sft.recall import ShrinkingWindow, last_answers
    from ..sft.row_notes import describe_far_answers, describe_lengths
    from ..sft.window import save_with_window

    asks = window is not None and not arguments["assistant_only_loss"]
    if asks:
        rows, held_out = last_answers(rows), held_out and last_answers(held_out)
    config = TalanConfig(task_type="CAUSAL_LM", **adapter)
    tokenizer = load_tokenizer(model)
    # Ours: TRL's own needs rows that aren't tokens yet.
    marked = training.marked_template(tokenizer) if arguments.pop("assistant_only_loss") else None
    encoded, encoded_held_out = encode_rows(tokenizer, rows, marked), None
    form, max_length = PromptForm.of(rows, tokenizer), arguments["max_length"]
    lines = describe_lengths(tokenizer, rows, encoded, max_length)
    if held_out is not None:
        encoded_held_out = encode_rows(tokenizer, held_out, marked)
        lines += describe_lengths(tokenizer, held_out, encoded_held_out, max_length, "held-out rows")
    if window is not None and asks and checkpoint is None:
        lines += describe_far_answers(tokenizer, rows, encoded, window)
    for line in lines:
        note(line)
    stop = StopOnInterrupt(note)
    callbacks: list[Any] = [TrainingProgress(), stop]
    # A run that is refused before its first step leaves what an earlier one left.
    with nullcontext() if window is None or checkpoint is not None else replaced_at_success(output / BASE_MODEL):
        if window is not None:
            model = save_with_window(model, tokenizer, window, output / BASE_MODEL, resume=checkpoint is not None)
            callbacks.append(ShrinkingWindow(seed=arguments["seed"]))
        trainer = training.make_trainer(
            model,
            tokenizer,
            encoded,
            form,
            config,
            output,
            eval_rows=encoded_held_out,
            callbacks=callbacks,
            **arguments,
        )
        if window is not None and checkpoint is None:
            if asks and rows.form != "text":
                note(describe_reading(trainer.model, tokenizer, encoded, max_length))
            training.start_from_data(trainer, note)
    if checkpoint is None:
        training.remove_checkpoints(output)
    del encoded, encoded_held_out  # gigabytes, of millions of rows
    outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    result = {"output": str(output), "steps": outcome.global_step, "loss": outcome.training_loss}
    if stop.requested and outcome.global_step < trainer.state.max_steps:
        return {**result, "finished": False, "checkpoint": str(last_checkpoint(output))}
    training.save(trainer, form, output)
    if asks and held_out is not None and held_out.form != "text":
        result["right_answers"] = count_right(trainer.model, tokenizer, held_out)
        if trainer.args.should_save:
            (output / RIGHT_ANSWERS).write_text(as_json_text(result["right_answers"]) + "\n", encoding="utf-8")
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {**result, "finished": True, **({"eval_loss": evaluated[-1]} if evaluated else {})}
