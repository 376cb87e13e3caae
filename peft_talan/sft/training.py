"""Supervised fine-tuning through TRL's SFTTrainer: its arguments by their own names, and what programs add."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ..axes import refusal
from ..checkpoint.saved_files import remove_saved_files
from ..config import TalanConfig
from ..tuner.answers import NothingToRecall
from ..tuner.recall_start import initialize_talan_recall
from ..tuner.trainability import talan_param_groups
from ..tuner.whitening import initialize_talan_weights
from .callbacks import SavePromptForm
from .prompts import Encoded, PromptForm

START_BATCHES = 16
"""How many batches side paths start from; some thousand tokens are enough."""
KEYED_ROWS = 1600
"""How many rows keys start from: a pair is a token of an answer, and they are to fit all directions."""


def remove_checkpoints(output: Path) -> None:
    """Remove the checkpoints of an earlier run, which a new one must not be continued from."""
    for folder in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(folder)


def marked_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template if it marks what the assistant says, or TRL's marked version; refused without.

    None if there is no template.
    """
    template = str(tokenizer.chat_template) if tokenizer.chat_template else None
    if template is None:
        return None
    if not has_generation_markers(template):
        try:
            template = get_training_chat_template(tokenizer)
        except ValueError:
            remedy = (
                "the chat template has no {% generation %} marks around what the assistant says; leave the option "
                "out and give rows of 'prompt' and 'completion', whose completion alone is trained on, or add the "
                "marks to chat_template.jinja"
            )
            raise refusal("assistant_only_loss", True, remedy) from None
    if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        warnings.warn(
            "assistant_only_loss=True: the chat template's {% generation %} marks leave out the token that ends what "
            "the assistant says, and the model may not learn to stop; mark it in chat_template.jinja",
            stacklevel=2,
        )
    return template


def set_side_path_rate(trainer: Trainer, scale: float) -> None:
    """Let the side path of a trainer's model learn at `scale` times the trainer's learning rate, before it trains."""
    arguments, model = trainer.args, cast(PreTrainedModel, trainer.model)
    groups = talan_param_groups(model, arguments.learning_rate, scale, arguments.weight_decay)
    optimizer, options = trainer.get_optimizer_cls_and_kwargs(arguments, model)
    trainer.optimizer_cls_and_kwargs = (optimizer, {**options, "params": groups})


def start_from_data(trainer: Trainer, report: Callable[[str], None] = lambda line: None) -> None:
    """Start the side paths of a trainer's fresh adapter from the first batches that it would train on.

    As a memory of what their answers depend on beyond the window, where that can be; else what they read is whitened.
    `report` is told before it begins, as it takes minutes, and afterwards what was done.
    """
    model = cast(PeftModel, trainer.model)
    tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
    name = model.active_adapter
    keyed = cast(TalanConfig, model.peft_config[name]).talan_mixer == "delta"
    keyed_batches = math.ceil(KEYED_ROWS / trainer.args.per_device_train_batch_size)
    batches = list(islice(trainer.get_train_dataloader(), keyed_batches if keyed else START_BATCHES))
    rows = sum(len(batch["input_ids"]) for batch in batches)
    began = time.monotonic()
    report(f"side paths start from {rows} rows; it can take minutes")
    how = "as a memory"
    try:
        with trainer.accelerator.autocast():
            initialize_talan_recall(model, batches, name, tokenizer=tokenizer)
    except NothingToRecall as reason:
        how = f"whitened, not as a memory: {reason}"
        initialize_talan_weights(model, batches[:START_BATCHES], name)
    report(f"side paths have started {how} ({time.monotonic() - began:.0f} s)")


def _refuse_other_losses(*args: Any, **kwargs: Any) -> None:
    """Refuse arguments of `SFTTrainer` with which its loss is not a sum over the log-probabilities of tokens."""
    given = signature(SFTTrainer).bind_partial(*args, **kwargs).arguments
    arguments = given.get("args")
    for name, value, usual in (
        ("loss_type", getattr(arguments, "loss_type", "nll"), "nll"),
        ("label_smoothing_factor", getattr(arguments, "label_smoothing_factor", 0.0), 0.0),
        ("compute_loss_func", given.get("compute_loss_func"), None),
    ):
        if value != usual:
            raise ValueError(f"{name}={value!r}: prompt_loss_weight needs {usual!r}; give that, or a weight of 0")


class PromptLossTrainer(SFTTrainer):
    """Trains on the tokens of prompts, too, with a weight.

    `loss = mean over the completions' tokens + prompt_loss_weight * mean over the prompts' tokens`, so that the few
    tokens of an answer keep their weight and the model stays used to the text. Evaluations have the first part alone,
    which is logged as `completion_loss` beside `loss`, of the process that logs.

    Args:
        *args: As those of `SFTTrainer`.
        prompt_loss_weight (float): The weight, at least 0. Default 0, which is `SFTTrainer`.
        **kwargs: As those of `SFTTrainer`.

    Raises:
        ValueError: The weight can't be used, or not with the `loss_type`, the `label_smoothing_factor` or the
            `compute_loss_func`; or, in training, rows are split over several devices by their tokens.

    Examples:
        >>> trainer = PromptLossTrainer(model, arguments, train_dataset=rows, prompt_loss_weight=0.2)
    """

    def __init__(self, *args: Any, prompt_loss_weight: float = 0.0, **kwargs: Any) -> None:
        if not 0 <= prompt_loss_weight < math.inf:
            raise ValueError(f"prompt_loss_weight={prompt_loss_weight!r}: give a number of at least 0, such as 0.2")
        if prompt_loss_weight:
            _refuse_other_losses(*args, **kwargs)
        super().__init__(*args, **kwargs)
        self.prompt_loss_weight = prompt_loss_weight
        self._completions: list[tuple[torch.Tensor, torch.Tensor]] = []

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch."""
        if not self.prompt_loss_weight or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "labels" not in inputs:
            raise ValueError("prompt_loss_weight: its batches have no 'labels', as with context parallelism; give 0")
        answers = inputs["labels"] != -100
        real = inputs.get("attention_mask", torch.ones_like(answers)).bool()
        # The first token of a sample follows on no other one.
        follows = real[:, 1:] & real[:, :-1] & (inputs.get("position_ids", torch.ones_like(real)) != 0)[:, 1:]
        answered, prompted = answers[:, 1:], follows & ~answers[:, 1:]
        labels = torch.where(answers | F.pad(prompted, (1, 0)), inputs["input_ids"], -100)
        items = answered.sum() if num_items_in_batch is None else num_items_in_batch
        weight = self.prompt_loss_weight * items / prompted.sum().clamp(min=1)
        if num_items_in_batch is not None:
            # What is divided by the tokens of all batches of a step is a mean over this one.
            weight = weight / self.current_gradient_accumulation_steps
            if self.args.average_tokens_across_devices:
                weight = weight / (self.accelerator.num_processes // self.get_tp_size())

        def weighted(**arguments: Any) -> Any:
            outputs = model(**{**arguments, "labels": labels})
            self._completions.append((-(outputs.log_probs.detach() * answered).sum(), answered.sum()))
            outputs.log_probs = outputs.log_probs * (answered + weight * prompted)
            # What is logged of a batch is of the completions, as without a weight.
            outputs.label_mask, outputs.is_top1 = outputs.label_mask & answered, outputs.is_top1 & answered
            outputs.entropy = outputs.entropy * answered
            return outputs

        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the completions' part of the loss, too."""
        if "loss" in logs and self._completions:
            losses, tokens = (torch.stack(parts).sum() for parts in zip(*self._completions, strict=True))
            logs["completion_loss"] = float(losses / tokens.clamp(min=1))
            self._completions.clear()
        super().log(logs, start_time)


def _dataset(rows: Sequence[Encoded]) -> Dataset:
    """Rows as tokens: of other columns Arrow would give each row all keys of all rows, which templates write."""
    return Dataset.from_list([{"input_ids": row.tokens, "labels": row.labels} for row in rows])


def make_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    form: PromptForm,
    adapter: PeftConfig | None,
    output: Path,
    *,
    eval_rows: Sequence[Encoded] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    side_path_lr_scale: float = 1.0,
    prompt_loss_weight: float = 0.0,
    **arguments: Any,
) -> SFTTrainer:
    """Make a trainer whose adapter can be continued, and prompted later as it was trained: in the form of the rows."""
    has_accelerator = torch.accelerator.is_available()
    defaults = {
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": has_accelerator,
        "use_cpu": not has_accelerator,
        "dataloader_pin_memory": has_accelerator,
        "report_to": "none",
        "disable_tqdm": True,
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    trainer = PromptLossTrainer(
        model=model,
        prompt_loss_weight=prompt_loss_weight,
        args=SFTConfig(output_dir=str(output), **{**defaults, **given}),
        train_dataset=_dataset(rows),
        eval_dataset=None if eval_rows is None else _dataset(eval_rows),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[SavePromptForm(form), *callbacks],
    )
    # It would print the numbers among the program's results.
    trainer.remove_callback(PrinterCallback)
    if adapter is not None:
        set_side_path_rate(trainer, side_path_lr_scale)
    return trainer


def save(trainer: SFTTrainer, form: PromptForm, output: Path) -> None:
    """Save a trainer's adapter, its tokenizer and the form of the rows' prompts into a folder, in place of others."""
    if trainer.args.should_save:
        remove_saved_files(output)
    trainer.save_model(str(output))
    if trainer.args.should_save:
        form.save(output)
