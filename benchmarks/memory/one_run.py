"""One run of the memory study: an adapter on a small window model is trained on one task and scored by distance."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch.nn import functional as F
from transformers import MistralForCausalLM

from peft_talan import talan_param_groups
from peft_talan.demo.recall import (
    LONG_CONTEXT,
    NAMES,
    SCORED_WINDOWS,
    TRAINED_WINDOWS,
    WINDOW,
    Task,
    Training,
    answer_logits,
    make_texts,
    recall,
    window_config,
)

from ..measure import code_version, machine
from ..quality.arms import MATCHED, make_config
from ..quality.backbones import weights_hash
from ..runs import Row, RunSettings
from ..training import adapted
from ..training import train as train_on

LINEAR, MLP = {**LONG_CONTEXT, "talan_mixer": "linear"}, {**LONG_CONTEXT, "talan_mixer": "mlp"}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("lora", {}),
    "LoRA, as many parameters": (MATCHED, LONG_CONTEXT),
    "TALAN, default (one block)": ("lora+talan", {}),
    "TALAN, all blocks": ("lora+talan", LONG_CONTEXT),
    "TALAN, all blocks, linear": ("lora+talan", LINEAR),
    "TALAN, all blocks, mlp": ("lora+talan", MLP),
}
"""By arm: the kind of adapter and the axes that differ from the package's defaults."""

Base = Literal["window", "full"]
"""What the base model was pretrained with: its window, or full attention that it then loses."""
BASE_STEPS: dict[tuple[Base, Task], int] = {
    ("window", "key"): 400,
    ("window", "pairs"): 400,
    ("window", "count"): 800,
    ("full", "key"): 400,
}
"""Steps after which the base model can do the task inside its window (or, `full`, with full attention)."""
STEPS: dict[Task, int] = {"key": 80, "pairs": 150, "count": 150}
"""Optimizer steps of an adapter, the same for every arm."""


@dataclass(frozen=True)
class Settings(RunSettings):
    """All that a run depends on; `scored` are distances in windows, `rows` the texts of each."""

    task: Task
    arm: str
    seed: int
    learning_rate: float
    base: Base = "window"
    steps: int = STEPS["key"]
    batch_size: int = 8
    rank: int = 8
    scored: tuple[int, ...] = SCORED_WINDOWS
    rows: int = 64


def config_of(arm: str, base: Any, rank: int = 8) -> LoraConfig:
    """The configuration of one of `ARMS`."""
    adapter, axes = ARMS[arm]
    return make_config(adapter, base, rank, "all-linear", axes)


def mean_of_last(losses: list[float]) -> float | None:
    """The mean loss of the last fifth of the steps, by which learning rates are chosen."""
    last = losses[-math.ceil(len(losses) / 5) :]
    return sum(last) / len(last) if last else None


def train(model: Any, task: Task, training: Training, names: int = NAMES) -> list[float]:
    """Train on the answers alone; not as the demo, whose schedule is Trainer's: the stored runs have this one."""
    optimizer = torch.optim.AdamW(talan_param_groups(model, training.learning_rate))
    generator = torch.Generator().manual_seed(training.seed)

    def loss_of(step: int) -> torch.Tensor:
        windows = training.windows[int(torch.randint(len(training.windows), (), generator=generator))]
        tokens, answers = make_texts(task, windows, training.batch_size, generator, names)
        return F.cross_entropy(answer_logits(model, tokens), answers)

    return train_on(model, optimizer, training.steps, loss_of)


@lru_cache(maxsize=2)
def base_of(
    task: Task, seed: int, base: Base, names: int = NAMES, steps: int | None = None
) -> tuple[Any, str, dict[int, float]]:
    """The base model, a hash of its weights, and its own recall by distance as far as it was measured."""
    torch.manual_seed(seed)
    model = MistralForCausalLM(window_config(task, names))
    if base == "full":
        model.config.sliding_window = None
    windows = TRAINED_WINDOWS if base == "full" else (1,)
    train(model, task, Training(steps or BASE_STEPS[base, task], 3e-3, windows=windows, seed=seed), names)
    model.config.sliding_window = WINDOW
    return model, weights_hash(model), {}


def run(settings: Settings) -> Row:
    """Train and score once, on one thread."""
    torch.set_num_threads(1)
    model, weights, base_recall = base_of(settings.task, settings.seed, settings.base)

    def recall_of(model: Any) -> dict[int, float]:
        return {windows: recall(model, settings.task, windows, settings.rows) for windows in settings.scored}

    if not base_recall.keys() >= set(settings.scored):
        base_recall |= recall_of(model)
    full_recall = {}
    if settings.base == "full":
        # What it can do before it loses its old keys.
        model.config.sliding_window = None
        full_recall = recall_of(model)
        model.config.sliding_window = WINDOW
    config = config_of(settings.arm, model, settings.rank)
    # Another seed than the base model's, so that the texts are other ones, too.
    training = Training(settings.steps, settings.learning_rate, settings.batch_size, seed=1000 + settings.seed)
    torch.manual_seed(settings.seed)
    with adapted(model, config) as tuned:
        started = time.process_time()
        losses = train(tuned, settings.task, training)
        seconds = time.process_time() - started
        return {
            "key": settings.key(),
            "settings": asdict(settings),
            "recall": recall_of(tuned),
            "base_recall": {windows: base_recall[windows] for windows in settings.scored},
            "full_attention_recall": full_recall,
            "last_loss": mean_of_last(losses),
            "losses": [round(loss, 4) for loss in losses[:: max(1, settings.steps // 50)]],
            "trainable": tuned.get_nb_trainable_parameters()[0],
            "rank": config.r,
            "processor_seconds": round(seconds, 1),
            "weights": weights,
            "code": code_version(),
            "machine": machine(),
        }
