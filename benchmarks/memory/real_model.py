"""A fact at the start of a real text, asked for beyond the window, with the weights of a real model.

    python -m benchmarks.memory.real_model

SmolLM2-135M-Instruct is a Llama; Mistral's architecture is the same with a sliding window, so its weights are loaded
into a Mistral configuration. The text is a story of 1889, the fact one of 16 colours; LoRA and LoRA+TALAN with side
paths in all blocks are trained on texts of an eighth of the length to the whole of it, and scored on the whole, which
is longer than the reach of attention through all blocks. A step takes some seconds on one core. Results go to
`benchmarks/results/memory_real_model.jsonl`; runs that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, MistralConfig, MistralForCausalLM

from peft_talan import talan_param_groups
from peft_talan.demo.recall import take_step, warm_up_and_decay

from ..measure import append_line, machine
from ..quality.arms import make_config, trainable
from ..quality.backbones import REAL, backbone_folder
from ..quality.study import finished
from ..quality.tasks import plain_text
from .one_run import ARMS

RESULTS = Path(__file__).parents[1] / "results" / "memory_real_model.jsonl"
COLOURS = [
    "red",
    "blue",
    "green",
    "yellow",
    "black",
    "white",
    "orange",
    "purple",
    "pink",
    "brown",
    "grey",
    "gold",
    "silver",
    "violet",
    "scarlet",
    "olive",
]
FACT, QUESTION = "The colour of the door is {}.\n", "\nThe colour of the door is"
TRAIN_TEXT, HELD_OUT_TEXT = 0, 1
PARTS = (1, 2, 4, 8)
"""A training step's texts are the longest divided by one of these."""


@dataclass(frozen=True)
class Settings:
    """All that a run depends on.

    Args:
        model: SmolLM2's name, a folder or a hub id of a Llama.
        arm: One of `ARMS`, or `base`.
        seed: Of the adapter and the texts.
        window: Keys that a token sees.
        tokens: Fact and text before the question, of the longest texts.
        steps: Optimizer steps.
        batch_size: Texts a step.
        learning_rate: The highest.
        rows: Held-out texts.
    """

    model: str
    arm: str
    seed: int
    window: int
    tokens: int
    steps: int
    batch_size: int
    learning_rate: float
    rows: int

    def key(self) -> str:
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def load_with_window(folder: str, window: int) -> MistralForCausalLM:
    """Load a Llama's weights into a Mistral configuration with a sliding window."""
    fields = AutoConfig.from_pretrained(folder).to_dict()
    left_out = ("model_type", "architectures", "transformers_version", "dtype", "sliding_window", "layer_types")
    config = MistralConfig(**{k: v for k, v in fields.items() if k not in left_out}, sliding_window=window)
    model: MistralForCausalLM = MistralForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    return model


def make_rows(
    tokenizer: Any, part: int, rows: int, tokens: int, draw: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of one length, a fact before and a question after them, and the first tokens of the answers."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    story = encode(plain_text()[part])
    texts, answers = [], []
    for _ in range(rows):
        colour, start = draw.choice(COLOURS), draw.randrange(len(story) - tokens)
        fact = encode(FACT.format(colour))
        # Colours differ in length: the story gives way, so that all texts have one length.
        texts.append(fact + story[start : start + tokens - len(fact)] + encode(QUESTION))
        answers.append(encode(" " + colour)[0])
    return torch.tensor(texts), torch.tensor(answers)


def run(settings: Settings) -> dict[str, Any]:
    """Train and score once, on one thread."""
    torch.set_num_threads(1)
    folder = backbone_folder(settings.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = load_with_window(folder, settings.window)
    losses = []
    if settings.arm != "base":
        adapter, axes = ARMS[settings.arm]
        torch.manual_seed(settings.seed)
        model = get_peft_model(model, make_config(adapter, model, 8, "all-linear", axes))
        optimizer = torch.optim.AdamW(talan_param_groups(model, settings.learning_rate))
        schedule = warm_up_and_decay(optimizer, settings.steps)
        draw = random.Random(settings.seed)
        for _ in tqdm(range(settings.steps), desc=f"{settings.arm}, seed {settings.seed}"):
            tokens = settings.tokens // draw.choice(PARTS)
            texts, answers = make_rows(tokenizer, TRAIN_TEXT, settings.batch_size, tokens, draw)
            logits = model(input_ids=texts, use_cache=False, logits_to_keep=1).logits[:, -1]
            loss = F.cross_entropy(logits, answers)
            losses.append(take_step(model, loss, optimizer, schedule))
    model.eval()
    texts, answers = make_rows(tokenizer, HELD_OUT_TEXT, settings.rows, settings.tokens, random.Random(1))
    with torch.no_grad():
        parts = [model(input_ids=part, use_cache=False, logits_to_keep=1).logits[:, -1] for part in texts.split(4)]
    right = torch.cat(parts).argmax(-1) == answers
    counts = {"trainable": trainable(model) if losses else 0, "recall": float(right.float().mean())}
    return {"key": settings.key(), "settings": asdict(settings), **counts, "losses": losses, "machine": machine()}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=REAL, help="SmolLM2-135M-Instruct, a folder or a hub id")
    parser.add_argument("--arms", nargs="+", choices=["base", *ARMS], default=["base", "LoRA", "TALAN, all blocks"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--window", type=int, default=8, help="keys that a token sees in each block")
    parser.add_argument("--tokens", type=int, default=256, help="before the question")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=64, help="held-out texts")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = vars(make_parser().parse_args(arguments))
    arms, seeds, results = options.pop("arms"), options.pop("seeds"), options.pop("results")
    done = finished(results)
    for seed in seeds:
        for arm in arms:
            settings = Settings(arm=arm, seed=seed, **options)
            if settings.key() not in done:
                started = time.process_time()
                row = {**run(settings), "processor_seconds": round(time.process_time() - started, 1)}
                append_line(results, row)
                print(f"{arm}, seed {seed}: {100 * row['recall']:.0f}% right", flush=True)


if __name__ == "__main__":
    main()
