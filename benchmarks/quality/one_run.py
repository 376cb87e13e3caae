"""One run of the study: an adapter is trained on a task, and measured on it and on what the model could do before."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from peft_talan import set_trainable, talan_param_groups
from peft_talan.sft.models import load_model, load_tokenizer
from peft_talan.sft.prompts import encode
from peft_talan.sft.scores import score_rows

from ..measure import machine
from ..runs import DEVELOPMENT_SEED, Row, RunSettings
from ..training import adapted, make_batch
from ..training import train as train_on
from .arms import LEARNING_RATE_SCALE, TWO_STAGES, make_config, prepare
from .backbones import backbone_folder, weights_hash
from .tasks import KNOWN_TASKS, MIXTURES, TASKS, Example, held_out, items_to_train_on, plain_text, scored_items

EVALUATION_BATCH = 50
TEXT_WINDOW = 128
"""Tokens of plain text in a row; the stored runs have it, so it is not that of `peft_talan.sft.scores`."""


@dataclass(frozen=True)
class Settings(RunSettings):
    """All that a run depends on."""

    backbone: str
    task: str
    adapter: str
    seed: int
    variant: str = "default"
    axes: dict[str, Any] = field(default_factory=dict)
    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 1e-2
    rank: int = 8
    target_modules: str | tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    held_out: int = 200
    held_out_known: int = 20


@cache
def loaded(backbone: str, device: str = "cpu", dtype: str = "float32") -> tuple[Any, Any, str]:
    """The model, its tokenizer and a hash of its weights."""
    folder = backbone_folder(backbone)
    model = load_model(folder, "float32", "cpu")
    fingerprint = weights_hash(model)
    return model.to(device=device, dtype=getattr(torch, dtype)), load_tokenizer(folder), fingerprint


def answer_scores(model: Any, tokenizer: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Mean loss of an answer's token, and the share of answers that greedy decoding writes to the letter."""
    rows = [encode(tokenizer, example.row(tokenizer)) for example in examples]
    scores = score_rows(model, tokenizer, rows, batch_size=EVALUATION_BATCH)
    return {"loss": scores.loss, "exact_match": scores.exact_match}


@torch.no_grad()
def written_without_the_answer(model: Any, tokenizer: Any, examples: Sequence[Example]) -> float:
    """The share of answers that greedy decoding without a cache writes: for memories that see later tokens."""
    right = 0
    for example in examples:
        row = encode(tokenizer, example.row(tokenizer))
        tokens = list(row.prompt)
        for _ in row.completion:
            logits = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
        right += tokens == row.tokens
    return right / len(examples)


@torch.no_grad()
def text_loss(model: Any, tokenizer: Any) -> float:
    """Mean loss of a token of the held-out plain text, in whole windows; its exponential is the perplexity."""
    tokens = torch.tensor(tokenizer(plain_text()[1], add_special_tokens=False)["input_ids"], device=model.device)
    windows = tokens[: len(tokens) // TEXT_WINDOW * TEXT_WINDOW].view(-1, TEXT_WINDOW)
    parts = [(float(model(input_ids=rows, labels=rows, use_cache=False).loss), len(rows)) for rows in windows.split(4)]
    return sum(loss * size for loss, size in parts) / len(windows)


def measure(model: Any, tokenizer: Any, settings: Settings) -> Row:
    """Score on the task, or the mean over a mixture's tasks, and retention: the known tasks and the plain text."""
    items = scored_items(settings.task, settings.held_out, settings.seed)
    scores = {name: answer_scores(model, tokenizer, examples) for name, examples in items.items()}
    count = settings.held_out_known
    known = {name: answer_scores(model, tokenizer, held_out(name, count)) for name in KNOWN_TASKS if count}
    found: Row = {"text_loss": text_loss(model, tokenizer), "known": known}
    if settings.task in MIXTURES:
        found["tasks"] = dict(zip(TASKS, scores.values(), strict=True))
    for field_name in ("loss", "exact_match"):
        found[field_name] = sum(part[field_name] for part in scores.values()) / len(scores)
        if known:
            found[f"known_{field_name}"] = sum(part[field_name] for part in known.values()) / len(known)
    return found


def train(model: Any, tokenizer: Any, examples: Sequence[Example], settings: Settings) -> list[float]:
    """Fine-tune on the answers' tokens; the seed fixes the order."""
    rows = [encode(tokenizer, example.row(tokenizer)) for example in examples]
    order = random.Random(settings.seed)
    order.shuffle(rows)
    if settings.task in MIXTURES:
        # As Trainer's `group_by_length`: tasks of other lengths would be padding.
        rows.sort(key=lambda row: row.length)
    size = settings.batch_size
    batches = [rows[start : start + size] for start in range(0, size * settings.steps, size)]
    if settings.task in MIXTURES:
        order.shuffle(batches)
    scale = settings.axes.get(LEARNING_RATE_SCALE, 1.0)
    optimizer = torch.optim.AdamW(talan_param_groups(model, settings.learning_rate, side_path_lr_scale=scale))
    # The optimizer has all tensors and passes over those without a gradient.
    stages = {0: "low_rank", settings.steps // 2: "joint"} if settings.axes.get(TWO_STAGES, False) else {}

    def loss_of(step: int) -> torch.Tensor:
        if step in stages:
            set_trainable(model, stages[step])
        return model(**make_batch(model, tokenizer, batches[step]), use_cache=False).loss

    return train_on(model, optimizer, settings.steps, loss_of)


@cache
def _lm_eval_tasks(folder: Path | None) -> Any:
    """Those of the folder, or else all that lm-eval brings, which takes many seconds to look through."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)


def lm_eval_scores(model: Any, tokenizer: Any, tasks: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """Results of lm-eval tasks by name, where their data is at hand; or of a folder of YAML files."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped, manager = HFLM(pretrained=model, tokenizer=tokenizer), _lm_eval_tasks(folder)
    found = lm_eval.simple_evaluate(wrapped, tasks=list(tasks), task_manager=manager, bootstrap_iters=0)["results"]
    return {
        task: {name: value for name, value in scores.items() if isinstance(value, (int, float))}
        for task, scores in found.items()
    }


def run(
    settings: Settings,
    device: str = "cpu",
    dtype: str = "float32",
    adapters_folder: Path | None = None,
    lm_eval_tasks: Sequence[str] = (),
    lm_eval_folder: Path | None = None,
) -> Row:
    """Train and measure once; the adapter `base` is the backbone as it is."""
    if device == "cpu":
        torch.set_num_threads(1)
    started = time.perf_counter()
    base, tokenizer, fingerprint = loaded(settings.backbone, device, dtype)
    row: Row = {"settings": asdict(settings), "key": settings.key(), "weights": fingerprint}
    config, targets = None, settings.target_modules
    if settings.adapter != "base":
        targets = targets if isinstance(targets, str) else list(targets)
        config = make_config(settings.adapter, base, settings.rank, targets, settings.axes)
    torch.manual_seed(settings.seed)
    with adapted(base, config) as model:
        if config is not None:
            prepare(model, settings.variant, settings.axes)
            count = settings.steps * settings.batch_size
            examples = items_to_train_on(settings.task, count, settings.seed, settings.held_out)
            row |= {"trainable": model.get_nb_trainable_parameters()[0], "rank": config.r}
            row["losses"] = train(model, tokenizer, examples, settings)
        row |= {"train_seconds": time.perf_counter() - started, **measure(model, tokenizer, settings)}
        if settings.axes.get("talan_memory_scope") == "bidirectional":
            items = held_out(settings.task, settings.held_out)
            row["exact_match"] = written_without_the_answer(model, tokenizer, items)
        if lm_eval_tasks and settings.seed != DEVELOPMENT_SEED:
            row["lm_eval"] = lm_eval_scores(model, tokenizer, lm_eval_tasks, lm_eval_folder)
        if adapters_folder is not None and settings.adapter.endswith("+talan"):
            model.save_pretrained(adapters_folder / settings.key())
    return {**row, "seconds": time.perf_counter() - started, "machine": machine()}
