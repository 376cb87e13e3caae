"""`peft-talan train`: supervised fine-tuning with TRL's SFTTrainer, its most used arguments under their own names."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from . import train_options as options
from .axes import with_axes
from .console import INTERRUPTED, JSON_HELP, Misuse, need, note, print_json, stdout_kept_clean
from .merge import check_output

TRACKERS = ("none", "tensorboard", "wandb", "trackio")


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: The command line.
    """
    app.command(
        "train",
        epilog="Example: peft-talan train --model Qwen/Qwen3-0.6B --data data.jsonl --output adapter "
        "--talan-layers 0.33,0.66",
    )(with_axes(train))


def train(
    model: options.Model,
    data: options.Data,
    output: Annotated[Path, Option("--output", "--output-dir", help="Folder for the adapter and its checkpoints")],
    steps: options.Steps = None,
    epochs: options.Epochs = 1.0,
    batch_size: options.BatchSize = 8,
    accumulate: options.Accumulation = 1,
    learning_rate: Annotated[
        float | None, Option(help="Highest learning rate", show_default="2e-4, with --window 3e-4")
    ] = None,
    max_length: options.MaxLength = 1024,
    rank: options.Rank = 16,
    lora_alpha: Annotated[int | None, Option(help="LoRA's alpha", show_default="twice the rank")] = None,
    target_modules: Annotated[
        str, Option("--target-modules", "--lora-target-modules", help="Modules of the low-rank half, with commas")
    ] = "all-linear",
    dora: Annotated[bool, Option("--use-dora", "--dora", help="DoRA as the low-rank half")] = False,
    rslora: Annotated[bool, Option("--use-rslora", "--rslora", help="rsLoRA's scaling")] = False,
    bf16: options.Bf16 = None,
    seed: Annotated[int, Option(help="Of initialization and order")] = 0,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Write into a folder with files; its old checkpoints are removed")
    ] = False,
    as_json: Annotated[bool, Option("--json", help=JSON_HELP)] = False,
    dataset_config: options.DatasetConfig = None,
    split: options.Split = "train",
    packing: Annotated[bool, Option(help="Pack several examples into a row")] = False,
    assistant_only_loss: Annotated[
        bool,
        Option(
            "--assistant-only-loss",
            help="Train on the assistant's tokens of 'messages' alone",
        ),
    ] = False,
    gradient_checkpointing: options.Checkpointing = None,
    lr_scheduler_type: Annotated[str, Option(help="Schedule of the learning rate, such as cosine")] = "linear",
    warmup_steps: Annotated[
        float,
        Option(min=0, help="Steps of warm-up; below 1: their share of all steps"),
    ] = 0.03,
    eval_data: options.EvalData = None,
    eval_split: options.EvalSplit = None,
    eval_rows: Annotated[int, Option(min=0, help="Rows of --data to hold out")] = 0,
    eval_steps: Annotated[
        int | None,
        Option(min=1, help="Steps between evaluations", show_default="once at the end"),
    ] = None,
    save_steps: Annotated[int, Option(min=1, help="Steps between checkpoints")] = 500,
    save_total_limit: Annotated[int, Option(min=1, help="How many checkpoints are kept")] = 2,
    resume: Annotated[
        bool,
        Option(
            "--resume-from-checkpoint",
            "--resume",
            help="Go on from the last checkpoint of --output",
        ),
    ] = False,
    logging_steps: Annotated[int, Option(min=1, help="Steps between logged losses")] = 10,
    report_to: Annotated[str, Option(metavar="|".join(TRACKERS), help="Tracker; several with commas")] = "none",
    run_name: Annotated[str | None, Option(help="Name of the run in the tracker", show_default="--output")] = None,
    window: Annotated[
        int | None,
        Option(
            min=2,
            help="Keys that a token sees in each block: gives the model a sliding window, and learns to recall what "
            "lies further back",
            show_default="the model's own",
        ),
    ] = None,
    *,
    axes: dict[str, Any],
) -> None:
    """Fine-tune a TALAN adapter on your data with TRL's SFTTrainer, and save it.

    Messages go through the chat template, texts never do; generate asks the adapter in the same form.
    Ctrl-C saves a checkpoint, and the same command with --resume goes on from it.
    For several GPUs and 4-bit bases use the recipe of the docs' page on training.
    """
    if learning_rate is None:
        learning_rate = 2e-4 if window is None else 3e-4
    if window is not None:
        axes.setdefault("talan_layers", "all")
    trackers = [name.strip() for name in report_to.split(",")]
    check_trackers(trackers)
    if eval_steps is not None and not (eval_data or eval_split or eval_rows):
        raise Misuse(f"--eval-steps {eval_steps}: there is nothing to evaluate on; give --eval-data or --eval-rows")
    options.check_training(model, data, learning_rate, epochs, eval_data)
    last = last_checkpoint(output)
    if resume and last is None:
        raise Misuse(f"--resume: {output} has no checkpoint; leave --resume out to begin")
    if last is not None and not resume and not overwrite:
        raise Misuse(f"{output} has {last.name}; --resume goes on from it, --overwrite begins anew")
    check_output(output, overwrite or resume)
    need("train", "datasets", "trl")
    with stdout_kept_clean():
        rows, held_out = options.load_rows(data, dataset_config, split, eval_data, eval_split, eval_rows, seed)
        result = _train(
            model,
            rows,
            held_out,
            output,
            last if resume else None,
            window,
            adapter={
                "r": rank,
                "lora_alpha": lora_alpha or 2 * rank,
                "target_modules": _modules(target_modules) if rank else [],
                "use_dora": dora,
                "use_rslora": rslora,
                **axes,
            },
            max_steps=steps or -1,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            learning_rate=learning_rate,
            lr_scheduler_type=lr_scheduler_type,
            warmup_steps=warmup_steps,
            max_length=max_length,
            packing=packing,
            assistant_only_loss=assistant_only_loss,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
            logging_steps=logging_steps,
            logging_first_step=True,
            save_steps=save_steps,
            save_total_limit=save_total_limit,
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
            note(f"loss {result['loss']:.4f}, on held-out rows {result['eval_loss']:.4f}")
        print(output)
    if not result["finished"]:
        raise typer.Exit(INTERRUPTED)


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that are unknown or not installed.

    Args:
        names: What `--report-to` lists.

    Raises:
        Misuse: One can't be used.
    """
    for name in names:
        if name not in TRACKERS:
            raise Misuse(f"--report-to {name}: choose of {', '.join(TRACKERS)}")
        if name != "none" and find_spec(name) is None:
            raise Misuse(f"--report-to {name}: the package is missing; pip install {name}")


def _modules(text: str) -> str | list[str]:
    return text if text == "all-linear" else [name.strip() for name in text.split(",")]


def last_checkpoint(output: Path) -> Path | None:
    """Find the last checkpoint in a run's folder.

    Args:
        output: The folder.

    Returns:
        The checkpoint's folder, if there is one that was written to its end.
    """
    found = [
        (int(folder.name.rpartition("-")[2]), folder)
        for folder in output.glob("checkpoint-*")
        # Trainer writes it last.
        if folder.name.rpartition("-")[2].isdecimal() and (folder / "trainer_state.json").is_file()
    ]
    return max(found)[1] if found else None


def _train(
    model: str,
    rows: Any,
    held_out: Any,
    output: Path,
    checkpoint: Path | None,
    window: int | None,
    adapter: dict[str, Any],
    **arguments: Any,
) -> dict[str, Any]:
    from peft_talan import TalanConfig
    from peft_talan.sft.models import load_tokenizer
    from peft_talan.sft.recall import ShrinkingWindow, last_answers, use_faster_side_path
    from peft_talan.sft.training import (
        StopOnInterrupt,
        TrainingProgress,
        describe_lengths,
        make_trainer,
        remove_checkpoints,
        save,
    )
    from peft_talan.sft.window import BASE_MODEL, save_with_window

    if window is not None and not arguments["assistant_only_loss"]:
        rows, held_out = last_answers(rows), held_out and last_answers(held_out)
    config = TalanConfig(task_type="CAUSAL_LM", **adapter)
    tokenizer = load_tokenizer(model)
    for line in describe_lengths(tokenizer, rows, arguments["max_length"]):
        note(line)
    if checkpoint is None:
        remove_checkpoints(output)
    stop = StopOnInterrupt(note)
    callbacks: list[Any] = [TrainingProgress(), stop]
    if window is not None:
        model = save_with_window(model, tokenizer, window, output / BASE_MODEL, resume=checkpoint is not None)
        callbacks.append(ShrinkingWindow(seed=arguments["seed"]))
    trainer = make_trainer(
        model, tokenizer, rows, config, output, eval_rows=held_out, callbacks=callbacks, **arguments
    )
    if window is not None:
        use_faster_side_path(trainer)
    outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    result = {"output": str(output), "steps": outcome.global_step, "loss": outcome.training_loss}
    if stop.requested and outcome.global_step < trainer.state.max_steps:
        return {**result, "finished": False, "checkpoint": str(last_checkpoint(output))}
    save(trainer, rows, output)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {**result, "finished": True, **({"eval_loss": evaluated[-1]} if evaluated else {})}
