"""The study's backbones: small Qwen3 models that are pretrained here, SmolLM2-135M-Instruct, or any hub id.

    python -m benchmarks.quality.backbones tiny-qwen3 tiny-qwen3-moe
    python -m benchmarks.quality.backbones small-qwen3

pretrains the small ones on tasks and plain text: float32, one thread, every batch drawn from its step's
number, so that the same versions on the same machine lead to the same weights. `--limit-seconds` stops early; the next
call continues. The folder is `$PEFT_TALAN_CACHE` or the user's cache.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from peft_talan.demo.base_model import default_model_folder
from peft_talan.sft.prompts import Encoded, encode

from ..training import make_batch, take_step
from .tasks import KNOWN_TASKS, PROMPTS, SHORT_TASKS, TASKS, example_of, held_out, plain_text, to_train_on

VOCABULARY = 768
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": None,
}


class Pretraining(NamedTuple):
    """What one of the backbones that are pretrained here is pretrained on, where it differs from the others.

    `tasks` are drawn evenly, by rows, or by batches if `sorted_rows`, which saves padding; a batch of plain text comes
    every `text_every` steps; the cosine of the learning rate would end at the step `horizon`.
    """

    tasks: tuple[str, ...] = tuple(KNOWN_TASKS)
    steps: int = 1800
    horizon: int = 2000
    sorted_rows: bool = False
    text_every: int = 1
    shape: Mapping[str, int] = MappingProxyType({})


SMALL_TASKS = (*KNOWN_TASKS, *(3 * list(SHORT_TASKS)))
SMALL_SHAPE = {"num_hidden_layers": 4, "intermediate_size": 256}
PRETRAINED_HERE = {
    "tiny-qwen3": Pretraining(),
    "tiny-qwen3-moe": Pretraining(),
    "small-qwen3": Pretraining(SMALL_TASKS, 7500, 7500, sorted_rows=True, text_every=4, shape=SMALL_SHAPE),
}
REAL = "SmolLM2-135M-Instruct"
TASK_ROWS, TEXT_ROWS, TEXT_TOKENS = 24, 4, 64
LEARNING_RATE = 3e-3
KNOWN_ITEMS = 8000
HELD_OUT_KNOWN, HELD_OUT_SHORT = 100, 1000
"""Items of each task that no backbone is pretrained on; of a short form as many as any study holds out of its task."""


def cache_folder() -> Path:
    return Path(os.environ.get("PEFT_TALAN_CACHE", Path.home() / ".cache" / "peft_talan"))


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    if name != "tiny-qwen3-moe":
        return Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, **PRETRAINED_HERE[name].shape}))
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 192, "decoder_sparse_step": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **experts))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE on the study's own texts, every digit a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    examples = [example for task in (*KNOWN_TASKS, *TASKS) for example in to_train_on(task, 400, 0, ())]
    texts = [plain_text()[0], *(f"{example.messages[0][1]}\n{example.answer}" for example in examples)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def encoded_items(task: str, tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """What is pretrained on of one task; short forms stand in changing prompts."""
    is_short = task in SHORT_TASKS
    items = to_train_on(task, KNOWN_ITEMS, 0, held_out(task, HELD_OUT_SHORT if is_short else HELD_OUT_KNOWN))
    if is_short:
        prompts = itertools.cycle(PROMPTS)
        items = [example_of(next(prompts).format(example.messages[0][1]), example.answer) for example in items]
    return [encode(tokenizer, example.row(tokenizer)) for example in items]


def pretrain(name: str, limit_seconds: float) -> bool:
    """Pretrain for at most so long, and return whether it is finished."""
    folder = cache_folder() / name
    if (folder / "config.json").exists():
        return True
    started = time.monotonic()
    torch.set_num_threads(1)
    tokenizer, recipe = make_tokenizer(), PRETRAINED_HERE[name]
    encoded = {task: encoded_items(task, tokenizer) for task in dict.fromkeys(recipe.tasks)}
    known = [encoded[task] for task in recipe.tasks]
    prose = tokenizer(plain_text()[0], add_special_tokens=False)["input_ids"]
    model = make_model(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / recipe.horizon)) + 0.01)
    )
    unfinished, first = folder.with_suffix(".unfinished.pt"), 0
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if unfinished.exists():
        saved = torch.load(unfinished, weights_only=True)
        first = saved["step"]
        for part, stateful in parts.items():
            stateful.load_state_dict(saved[part])
    model.train()
    bar = tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc=name, mininterval=5)
    for step in bar:
        draw = random.Random(step)
        drawn = [draw.choice(known)] if recipe.sorted_rows else known
        rows = [draw.choice(draw.choice(drawn)) for _ in range(TASK_ROWS)]
        starts = [draw.randrange(len(prose) - TEXT_TOKENS) for _ in range(TEXT_ROWS)]
        loss = model(**make_batch(model, tokenizer, rows), use_cache=False).loss
        if step % recipe.text_every == 0:
            text = torch.tensor([prose[start : start + TEXT_TOKENS] for start in starts])
            loss = loss + 0.5 * model(input_ids=text, labels=text, use_cache=False).loss
        bar.set_postfix(loss=f"{take_step(model, loss, optimizer, schedule):.3f}", refresh=False)
        if time.monotonic() - started > limit_seconds and step + 1 < recipe.steps:
            folder.parent.mkdir(parents=True, exist_ok=True)
            states = {part: stateful.state_dict() for part, stateful in parts.items()}
            torch.save({**states, "step": step + 1}, unfinished)
            return False
    model.eval()
    beside = folder.with_suffix(f".{os.getpid()}")
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.rename(folder)
    unfinished.unlink(missing_ok=True)
    return True


def weights_hash(model: Any) -> str:
    """Twelve hexadecimal digits that tell one set of weights from another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def backbone_folder(name: str) -> str:
    """The folder of one of the study's own backbones, or the name as it is: a folder or a hub id."""
    if name == REAL:
        return default_model_folder()
    if name not in PRETRAINED_HERE:
        return name
    folder = cache_folder() / name
    if not (folder / "config.json").exists():
        raise SystemExit(f"{name} is not pretrained yet; run: python -m benchmarks.quality.backbones {name}")
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=list(PRETRAINED_HERE), default=list(PRETRAINED_HERE))
    parser.add_argument("--limit-seconds", type=float, default=math.inf)
    options = parser.parse_args()
    for name in options.names:
        print(name, "finished" if pretrain(name, options.limit_seconds) else "to be continued")


if __name__ == "__main__":
    main()
