"""Generation with a bounded cache: the key stands at the start of up to 100,000 tokens, which are fed in chunks.

    python -m benchmarks.memory.generation
    python -m benchmarks.memory.generation --arms "TALAN, all blocks" --longest-trained 8 --steps 200 \\
        --soft-cap 7 --simulated 120000

With `--simulated`, short texts in training fill the memories as long ones would: in each, 32 tokens before the text,
or all filler that attention can't reach from the key, count many times. How many tokens they stand for is drawn from
30 on, each order of magnitude as often, up to a limit that grows from 100 to the given one in the first 70% of the
steps.

A static cache of a window model holds the window's keys alone, and the side paths' sums beside them: the bytes are
counted after the last token. Results go to `benchmarks/results/memory_generation.jsonl`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Cache, StaticCache

from peft_talan import TalanConfig, talan_param_groups, talan_token_counts
from peft_talan.demo.recall import (
    BEGIN,
    FIRST_FILLER,
    FIRST_PAIR,
    LATEST_KEY,
    REACH,
    SCORED_SEED,
    WINDOW,
    Training,
    answer_logits,
    make_texts,
)
from peft_talan.sft.intervals import Interval

from ..measure import machine
from ..runs import append_line
from ..training import adapted
from ..training import train as train_on
from .one_run import ARMS, STEPS, base_of, config_of, train

RESULTS = Path(__file__).parents[1] / "results" / "memory_generation.jsonl"
SETTINGS = ("rows", "seed", "chunk", "learning_rate", "steps", "soft_cap", "simulated")
EVERY = 20
"""The curve has the mean loss of so many steps."""
EARLIER = 32
"""Tokens before a text that stand for a long one."""
UNREACHED = LATEST_KEY + 1 + REACH + 1
"""A text's first token that counts many times: what stands near the key can hold it by attention."""


def tensor_bytes(*tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def cache_bytes(cache: Cache) -> dict[str, int]:
    """The bytes of all tensors that a cache holds for one batch: keys and values, and the latent memories."""
    keys = sum(tensor_bytes(layer.keys, layer.values) for layer in cache.layers)
    memories = sum(tensor_bytes(*vars(memory).values()) for memory in getattr(cache, "latent_memories", ()))
    return {"keys_and_values": keys, "memories": memories}


@torch.no_grad()
def answer_in_chunks(model: Any, tokens: torch.Tensor, chunk: int) -> tuple[torch.Tensor, Cache]:
    """Feed texts through a static cache in chunks, and return the likeliest next tokens, [rows], and the cache."""
    cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + 1)
    seen = 0
    for part in tqdm(tokens.split(chunk, dim=1), desc=f"{tokens.shape[1]} tokens", leave=False):
        positions = torch.arange(seen, seen + part.shape[1])[None]
        output = model(input_ids=part, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        seen += part.shape[1]
    return output.logits[:, -1].argmax(-1), cache


def make_counted_texts(
    windows: int, lengths: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Texts of `key` some of whose tokens stand for many.

    Args:
        windows: The length of a text.
        lengths: How many tokens those that count stand for together, [rows].
        generator: Draws the texts.

    Returns:
        Token ids, [rows, tokens], the answers, [rows], and counts, [rows, tokens]. In half of the calls, and in all of
        short texts, other tokens before the text count; else those of the text from `UNREACHED` on.
    """
    rows = len(lengths)
    tokens, answers = make_texts("key", windows, rows, generator)
    counted = slice(UNREACHED, tokens.shape[1] - 1)
    if tokens.shape[1] <= UNREACHED + 1 or torch.rand((), generator=generator) < 0.5:
        earlier = torch.randint(FIRST_FILLER, FIRST_PAIR, (rows, EARLIER + 1), generator=generator)
        earlier[:, 0] = BEGIN
        tokens, counted = torch.cat([earlier, tokens[:, 1:]], 1), slice(0, EARLIER)
    counts = torch.ones(tokens.shape)
    counts[:, counted] = (lengths / len(range(*counted.indices(tokens.shape[1])))).clamp(min=1).unsqueeze(1)
    return tokens, answers, counts


def train_simulated(model: Any, training: Training, simulated: float) -> list[float]:
    """Train as `one_run.train` does, on texts that fill the memories as up to `simulated` tokens would."""
    optimizer = torch.optim.AdamW(talan_param_groups(model, training.learning_rate))
    generator = torch.Generator().manual_seed(training.seed)

    def loss_of(step: int) -> torch.Tensor:
        windows = training.windows[int(torch.randint(len(training.windows), (), generator=generator))]
        longest = 100 * (simulated / 100) ** min(1.0, step / (0.7 * training.steps))
        drawn = torch.rand(training.batch_size, generator=generator)
        tokens, answers, counts = make_counted_texts(windows, 30 * (longest / 30) ** drawn, generator)
        with talan_token_counts(model, counts):
            return F.cross_entropy(answer_logits(model, tokens), answers)

    return train_on(model, optimizer, training.steps, loss_of)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["LoRA", "TALAN, all blocks"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1_008, 10_000, 100_000])
    parser.add_argument("--chunk", type=int, default=400)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=STEPS["key"])
    parser.add_argument("--longest-trained", type=int, default=10, help="windows of the longest text in training")
    parser.add_argument("--soft-cap", type=float, default=TalanConfig.talan_soft_cap, help="talan_soft_cap")
    parser.add_argument(
        "--simulated", type=int, default=None, help="tokens that texts in training stand for at most; 100 or more"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    torch.set_num_threads(1)
    model, weights, _ = base_of("key", options.seed, "window")
    windows = tuple(range(1, options.longest_trained + 1))
    training = Training(options.steps, options.learning_rate, 16, windows, 1000 + options.seed)
    for arm in options.arms:
        torch.manual_seed(options.seed)
        config = config_of(arm, model)
        if isinstance(config, TalanConfig):
            config.talan_soft_cap = options.soft_cap
        with adapted(model, config) as tuned:
            if options.simulated is None:
                losses = train(tuned, "key", training)
            else:
                losses = train_simulated(tuned, training, options.simulated)
            parts = [losses[start : start + EVERY] for start in range(0, len(losses), EVERY)]
            for length in options.tokens:
                generator = torch.Generator().manual_seed(SCORED_SEED + length)
                tokens, answers = make_texts("key", length // WINDOW, options.rows, generator)
                started = time.process_time()
                found, cache = answer_in_chunks(tuned, tokens, options.chunk)
                share = Interval.of_share(int((found == answers).sum()), options.rows)
                row = {
                    "arm": arm,
                    "tokens": tokens.shape[1],
                    "longest_trained": options.longest_trained,
                    "recall": [share.mean, share.low, share.high],
                    "bytes_a_row": {name: size // options.rows for name, size in cache_bytes(cache).items()},
                    "processor_seconds": round(time.process_time() - started, 1),
                    "settings": {name: getattr(options, name) for name in SETTINGS},
                    "losses": [round(sum(part) / len(part), 3) for part in parts],
                    "weights": weights,
                    "machine": machine(),
                }
                append_line(options.results, row)
                print(arm, row["tokens"], row["recall"], row["bytes_a_row"], flush=True)


if __name__ == "__main__":
    main()
