"""Supervised fine-tuning with TRL: any causal LM, any dataset or JSONL file, TALAN or plain LoRA, DoRA and rsLoRA.

It is TRL's own `trl sft` with one line more: the LoRA options become a TalanConfig. All of TRL's arguments work, from
the command line or from a file:

    python benchmarks/recipes/sft.py --config benchmarks/recipes/one_gpu.yaml --dataset_name my.jsonl
    accelerate launch --config_file benchmarks/recipes/eight_gpus_fsdp2.yaml benchmarks/recipes/sft.py --config ...

Each line of a JSONL file is an object with `messages`, with `prompt` and `completion`, or with `text`. To evaluate
while training (`--eval_strategy steps`), name a folder with `train.jsonl` and `test.jsonl`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from peft_talan import TalanConfig, talan_param_groups
from peft_talan.analysis import SidePathMonitor


@dataclass
class TalanArguments:
    """The side path beside TRL's LoRA options."""

    talan: bool = field(default=True, metadata={"help": "False: plain LoRA (or DoRA, rsLoRA), to compare with."})
    talan_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": """Fields of TalanConfig, such as '{"talan_slots": 16}'."""}
    )
    side_path_lr_scale: float = field(
        default=1.0, metadata={"help": "The side path's learning rate, divided by learning_rate."}
    )
    monitor: bool = field(default=False, metadata={"help": "Log write-back norms, gates and slot usage."})

    def __post_init__(self) -> None:
        """Read the options that came as text."""
        if isinstance(self.talan_options, str):
            self.talan_options = json.loads(self.talan_options)


def parse_arguments(
    arguments: list[str] | None = None,
) -> tuple[ScriptArguments, SFTConfig, ModelConfig, TalanArguments]:
    """Read the command line, and the file that `--config` names."""
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, TalanArguments))
    return parser.parse_args_and_config(arguments, fail_with_unknown_args=True)


def load_data(script_args: ScriptArguments) -> DatasetDict:
    """Load a JSON or JSONL file, or a dataset by its name."""
    if Path(script_args.dataset_name).is_file():
        return load_dataset("json", data_files={script_args.dataset_train_split: script_args.dataset_name})
    return load_dataset(script_args.dataset_name, name=script_args.dataset_config)


def choose_split(dataset: DatasetDict, split: str, argument: str) -> Dataset:
    """Take one split; a ValueError names the argument if there is no such split."""
    if split not in dataset:
        raise ValueError(f"{argument}={split!r}: the dataset has {', '.join(map(repr, dataset))}; name one of these")
    return dataset[split]


def main() -> None:
    script_args, training_args, model_args, talan_args = parse_arguments()
    model_args.use_peft = True
    adapter = get_peft_config(model_args)
    if talan_args.talan:
        adapter = TalanConfig.from_lora(adapter, **(talan_args.talan_options or {}))
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    dataset = load_data(script_args)
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=choose_split(dataset, script_args.dataset_train_split, "dataset_train_split"),
        eval_dataset=None
        if training_args.eval_strategy == "no"
        else choose_split(dataset, script_args.dataset_test_split, "dataset_test_split"),
        quantization_config=get_quantization_config(model_args),
        peft_config=adapter,
    )
    if talan_args.talan and talan_args.side_path_lr_scale != 1.0:
        groups = talan_param_groups(
            trainer.model, training_args.learning_rate, talan_args.side_path_lr_scale, training_args.weight_decay
        )
        trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"params": groups})
    if talan_args.talan and talan_args.monitor:
        trainer.add_callback(SidePathMonitor(trainer.log))
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    main()
