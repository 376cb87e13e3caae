"""`peft-talan train`: supervised fine-tuning with TRL, its most used options; TRL itself takes the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from . import axes
from .console import JSON_HELP, Misuse, need, print_json, stdout_kept_clean
from .merge import check_output


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: The command line.
    """
    app.command(
        "train",
        epilog="Example: peft-talan train --model Qwen/Qwen3-0.6B --data data.jsonl --output adapter "
        "--talan-layers 0.33,0.66",
    )(train)


def train(
    context: typer.Context,
    model: Annotated[str, Option(help="Base model, hub id or folder")],
    data: Annotated[str, Option(help="JSONL file of messages, prompt/completion or text; or a dataset's hub id")],
    output: Annotated[Path, Option(help="The folder for the adapter")],
    steps: Annotated[int | None, Option(min=1, help="Optimizer steps [default: --epochs]")] = None,
    epochs: Annotated[float, Option(help="Times over the data")] = 1.0,
    batch_size: Annotated[int, Option(min=1, help="Examples a step and device")] = 8,
    accumulate: Annotated[int, Option(min=1, help="Batches a step")] = 1,
    learning_rate: Annotated[float, Option(help="Highest learning rate")] = 2e-4,
    max_length: Annotated[int, Option(min=1, help="Longest example, in tokens")] = 1024,
    packing: Annotated[bool, Option(help="Several examples a row")] = False,
    rank: Annotated[int, Option(min=0, help="Rank of the low-rank half; 0: the side path alone")] = 16,
    lora_alpha: Annotated[int | None, Option(help="LoRA's alpha [default: twice the rank]")] = None,
    target_modules: Annotated[str, Option(help="Modules of the low-rank half, with commas")] = "all-linear",
    dora: Annotated[bool, Option("--dora", help="DoRA as the low-rank half")] = False,
    rslora: Annotated[bool, Option("--rslora", help="rsLoRA's scaling")] = False,
    bf16: Annotated[bool | None, Option(help="[default: on a GPU that has it]")] = None,
    seed: Annotated[int, Option(help="Of initialisation and order")] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Write into a folder with files")] = False,
    as_json: Annotated[bool, Option("--json", help=JSON_HELP)] = False,
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
    """Fine-tune a TALAN adapter on your data with TRL's SFTTrainer, and save it.

    For everything that TRL can do (several GPUs, 4-bit bases, evaluation, trackers) use the recipe of the docs' page
    on training.
    """
    if not learning_rate > 0:
        raise Misuse(f"--learning-rate {learning_rate}: give a positive number such as 2e-4")
    check_output(output, overwrite)
    chosen = axes.read_axes(context.params)
    need("train", "datasets", "trl")
    import torch
    from datasets import load_dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from peft_talan import TalanConfig

    modules = target_modules if target_modules == "all-linear" else target_modules.split(",")
    adapter = TalanConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=lora_alpha or 2 * rank,
        target_modules=modules if rank else [],
        use_dora=dora,
        use_rslora=rslora,
        **chosen,
    )
    has_gpu = torch.cuda.is_available()
    with stdout_kept_clean():
        if Path(data).is_file():
            examples = load_dataset("json", data_files=data, split="train")
        else:
            examples = load_dataset(data, split="train")
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(output),
                max_steps=steps or -1,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulate,
                learning_rate=learning_rate,
                max_length=max_length,
                packing=packing,
                bf16=has_gpu and torch.cuda.is_bf16_supported() if bf16 is None else bf16,
                use_cpu=not has_gpu,
                seed=seed,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=examples,
            peft_config=adapter,
        )
        outcome = trainer.train()
        trainer.save_model(str(output))
    result = {"output": str(output), "steps": outcome.global_step, "loss": outcome.training_loss}
    if as_json:
        print_json(result)
    else:
        print(output)
