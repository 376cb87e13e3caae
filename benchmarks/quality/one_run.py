"""One run of the study: an adapter is trained on a task, and measured on it and on what the model could do before."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.nn import functional as F

from peft_talan import set_trainable, talan_param_groups
from peft_talan.demo.recall import take_step, warm_up_and_decay

from ..measure import machine
from ..supervised import IGNORED, Example, encode, load_base_model, make_batch
from .arms import FIRST_WRITE, LEARNING_RATE_SCALE, TWO_STAGES, make_config, set_first_write, trainable
from .backbones import backbone_folder, weights_hash
from .tasks import (
    DEVELOPMENT_SEED,
    KNOWN_TASKS,
    MIXTURES,
    TASKS,
    held_out,
    items_to_train_on,
    plain_text,
    scored_items,
)

EVALUATION_BATCH = 50
TEXT_WINDOW = 128


@dataclass(frozen=True)
class Settings:
    """All that a run depends on: two runs of equal settings are one run."""

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

    def key(self) -> str:
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@cache
def loaded(backbone: str, device: str, dtype: str) -> tuple[Any, Any, str]:
    model, tokenizer = load_base_model(backbone_folder(backbone))
    fingerprint = weights_hash(model)
    return model.to(device=device, dtype=getattr(torch, dtype)), tokenizer, fingerprint


@torch.no_grad()
def answer_scores(model: Any, tokenizer: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Mean loss of an answer's token, and the share of answers that greedy decoding gives to the letter.

    Greedy decoding gives an answer exactly if each of its tokens is the likeliest after the right ones before it, so
    one forward pass tells both.
    """
    total, tokens, right = 0.0, 0, 0
    for start in range(0, len(examples), EVALUATION_BATCH):
        rows = [encode(tokenizer, example) for example in examples[start : start + EVALUATION_BATCH]]
        batch = {name: part.to(model.device) for name, part in make_batch(rows, tokenizer.pad_token_id).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        counted = labels != IGNORED
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        total += float(losses.sum())
        tokens += int(counted.sum())
        right += int(((logits.argmax(-1) == labels) | ~counted).all(-1).sum())
    return {"loss": total / tokens, "exact_match": right / len(examples)}


@torch.no_grad()
def written_without_the_answer(model: Any, tokenizer: Any, examples: Sequence[Example]) -> float:
    """The share of answers that greedy decoding without a cache gives: for memories that see later tokens."""
    right = 0
    for example in examples:
        prompt, answer = encode(tokenizer, example)
        tokens = list(prompt)
        for _ in answer:
            logits = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
        right += tokens[len(prompt) :] == answer
    return right / len(examples)


@torch.no_grad()
def text_loss(model: Any, tokenizer: Any) -> float:
    """Mean loss of a token of the held-out plain text, in windows; its exponential is the perplexity."""
    tokens = torch.tensor(tokenizer(plain_text()[1], add_special_tokens=False)["input_ids"], device=model.device)
    windows = tokens[: len(tokens) // TEXT_WINDOW * TEXT_WINDOW].view(-1, TEXT_WINDOW)
    losses = [float(model(input_ids=row, labels=row, use_cache=False).loss) for row in windows.split(4)]
    sizes = [len(row) for row in windows.split(4)]
    return sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)


def measure(model: Any, tokenizer: Any, settings: Settings) -> dict[str, Any]:
    """Score on the task, or the mean over a mixture's tasks, and retention: the known tasks and the plain text."""
    items = scored_items(settings.task, settings.held_out, settings.seed)
    scores = {name: answer_scores(model, tokenizer, examples) for name, examples in items.items()}
    count = settings.held_out_known
    known = {name: answer_scores(model, tokenizer, held_out(name, count)) for name in KNOWN_TASKS if count}
    found: dict[str, Any] = {"text_loss": text_loss(model, tokenizer), "known": known}
    if settings.task in MIXTURES:
        found["tasks"] = dict(zip(TASKS, scores.values(), strict=True))
    for field_name in ("loss", "exact_match"):
        found[field_name] = sum(part[field_name] for part in scores.values()) / len(scores)
        if known:
            found[f"known_{field_name}"] = sum(part[field_name] for part in known.values()) / len(known)
    return found


def train(model: Any, tokenizer: Any, examples: Sequence[Example], settings: Settings) -> list[float]:
    """Fine-tune on the answers' tokens: AdamW, a short warm-up, a linear decay; the seed fixes the order."""
    rows = [encode(tokenizer, example) for example in examples]
    order = random.Random(settings.seed)
    order.shuffle(rows)
    if settings.task in MIXTURES:
        # As Trainer's `group_by_length`: tasks of other lengths would be padding.
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    size = settings.batch_size
    batches = [rows[start : start + size] for start in range(0, size * settings.steps, size)]
    if settings.task in MIXTURES:
        order.shuffle(batches)
    scale = settings.axes.get(LEARNING_RATE_SCALE, 1.0)
    optimizer = torch.optim.AdamW(talan_param_groups(model, settings.learning_rate, side_path_lr_scale=scale))
    schedule = warm_up_and_decay(optimizer, settings.steps)
    two_stages = settings.axes.get(TWO_STAGES, False)
    if two_stages:
        # The optimizer has both halves and passes over what has no gradient.
        set_trainable(model, "low_rank")
    losses = []
    model.train()
    for step in range(settings.steps):
        if two_stages and step == settings.steps // 2:
            set_trainable(model, "joint")
        padded = make_batch(batches[step], tokenizer.pad_token_id)
        batch = {name: t.to(model.device) for name, t in padded.items()}
        loss = model(**batch, use_cache=False).loss
        losses.append(take_step(model, loss, optimizer, schedule))
    model.eval()
    return losses


@cache
def _lm_eval_tasks(folder: Path | None) -> Any:
    """Those of the folder, or else all that lm-eval brings, which takes many seconds to look through."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)


def lm_eval_scores(model: Any, tokenizer: Any, tasks: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """Results of lm-eval tasks by name, where their data is at hand; or of a folder of YAML files."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    manager = _lm_eval_tasks(folder)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer)
    found = lm_eval.simple_evaluate(wrapped, tasks=list(tasks), task_manager=manager, bootstrap_iters=0)["results"]
    numbers = (int, float)
    return {
        task: {name: value for name, value in scores.items() if isinstance(value, numbers)}
        for task, scores in found.items()
    }


def run(
    settings: Settings,
    device: str = "cpu",
    dtype: str = "float32",
    adapters_folder: Path | None = None,
    lm_eval_tasks: Sequence[str] = (),
    lm_eval_folder: Path | None = None,
) -> dict[str, Any]:
    """Train and measure once; the adapter `base` is the backbone as it is."""
    if device == "cpu":
        torch.set_num_threads(1)
    started = time.perf_counter()
    base, tokenizer, fingerprint = loaded(settings.backbone, device, dtype)
    row: dict[str, Any] = {"settings": asdict(settings), "key": settings.key(), "weights": fingerprint}
    model = base
    if settings.adapter != "base":
        targets = settings.target_modules
        targets = targets if isinstance(targets, str) else list(targets)
        config = make_config(settings.adapter, base, settings.rank, targets, settings.axes)
        torch.manual_seed(settings.seed)
        model = get_peft_model(base, config)
        if FIRST_WRITE in settings.axes:
            set_first_write(model, settings.axes[FIRST_WRITE])
        wanted = settings.steps * settings.batch_size
        examples = items_to_train_on(settings.task, wanted, settings.seed, settings.held_out)
        row |= {"trainable": trainable(model), "rank": config.r, "losses": train(model, tokenizer, examples, settings)}
    row |= {"train_seconds": time.perf_counter() - started}
    row |= measure(model, tokenizer, settings)
    if settings.axes.get("talan_memory_scope") == "bidirectional":
        row["exact_match"] = written_without_the_answer(model, tokenizer, held_out(settings.task, settings.held_out))
    if lm_eval_tasks and settings.seed != DEVELOPMENT_SEED:
        row["lm_eval"] = lm_eval_scores(model, tokenizer, lm_eval_tasks, lm_eval_folder)
    if settings.adapter != "base":
        if adapters_folder is not None and settings.adapter.endswith("+talan"):
            model.save_pretrained(adapters_folder / settings.key())
        model.unload()
    return {**row, "seconds": time.perf_counter() - started, "machine": machine()}
